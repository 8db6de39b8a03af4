"""MIL-NCE, the loss of Miech et al. (CVPR 2020), section 3.2.

In a process group the batch is the union of the ranks' batches. A rank has b of the B videos and
their b*K texts. It scores its own videos against all texts and all videos against its own texts,
never the whole B x B*K.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather_batch(local):
    """[b, ...], of one shape on every rank -> [world_size * b, ...] on all, in rank order."""
    if world_size() == 1:
        return local
    gathered = local.new_empty((world_size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_single(gathered, local.contiguous())
    return gathered


class DistributedLogSumExp(torch.autograd.Function):
    """video [b, D], text [b*K, D] -> lse [b]: lse_i = logsumexp{x_ijk, x_jik for all j, k}.

    j runs over all ranks' batches; x_ijk = v_i . t_jk. Backward gives a rank the gradient of every
    rank's denominators with respect to its own embeddings. All it needs from the other ranks is
    two numbers per video, lse and the gradient arriving there; their embeddings it has already.
    """

    @staticmethod
    def forward(ctx, video, text):
        videos, texts = all_gather_batch(video), all_gather_batch(text)  # [B, D], [B*K, D]
        rows = video @ texts.t()  # [b, B*K]: x_ijk of own i
        columns = videos @ text.t()  # [B, b*K]: x_ijk of own j
        by_candidate = columns.view(videos.shape[0], video.shape[0], -1)  # [B, b, K]
        lse = torch.logaddexp(rows.logsumexp(1), by_candidate.logsumexp((0, 2)))
        ctx.save_for_backward(videos, texts, rows, columns, lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        videos, texts, rows, columns, lse = ctx.saved_tensors
        candidates = texts.shape[0] // videos.shape[0]
        own = torch.stack((gradient, lse), dim=1)  # [b, 2]
        union = all_gather_batch(own)  # [B, 2]
        of_own_texts, of_texts = (x.repeat_interleave(candidates, 0) for x in (own, union))
        return (
            score_gradient(rows, own, of_texts) @ texts,
            score_gradient(columns, union, of_own_texts).t() @ videos,
        )


def score_gradient(scores, of_video, of_text):
    """The gradient of all denominators in scores [n, m].

    of_video [n, 2] and of_text [m, 2] hold (g, lse), the gradient arriving at a denominator and
    its value: x_ijk is a term of lse_i and of lse_j. No term exceeds its logsumexp: exp is stable.
    """
    gradient = (scores - of_video[:, 1:]).exp_().mul_(of_video[:, :1])
    return gradient.add_((scores - of_text[:, 1]).exp_().mul_(of_text[:, 0]))


class MILNCELoss(nn.Module):
    """mean_i( logsumexp{x_ijk, x_jik for all j, k} - logsumexp_k x_iik ), x_ijk = v_i . t_jk.

    Both directions of the denominator hold the positives, as in the public release: the minimum
    is log 2. The value is the union batch's on every rank; so is the gradient, once it is averaged
    over the ranks as DistributedDataParallel does.
    """

    def forward(self, video_embd, text_embd):
        """video_embd: [b, D]. text_embd: [b*K, D]; row i*K + k is candidate k of video i."""
        # Scores of a shorter type would round away what tells a positive from a negative.
        dtype = torch.promote_types(video_embd.dtype, torch.float32)
        with torch.autocast(video_embd.device.type, enabled=False):
            return self.loss(video_embd.to(dtype), text_embd.to(dtype))

    def loss(self, video_embd, text_embd):
        own_texts = text_embd.view(video_embd.shape[0], -1, text_embd.shape[1])  # [b, K, D]
        positives = torch.einsum("bd,bkd->bk", video_embd, own_texts).logsumexp(dim=1)
        loss = (DistributedLogSumExp.apply(video_embd, text_embd) - positives).mean()

        if world_size() > 1:
            # Show the union's value and keep the gradient of the rank's own mean.
            union = loss.detach().clone()
            dist.all_reduce(union)
            loss = loss + (union / world_size() - loss.detach())
        return loss
