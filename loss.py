"""MIL-NCE, the loss of Miech et al. (CVPR 2020), section 3.2.

In a process group the batch is the union of the ranks' batches. A rank has b of the B videos and
their b*K texts, K candidates per video, all embedded in D dimensions. It scores its own videos
against all texts and all videos against its own texts, never the whole B x B*K.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable


def get_world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather_batch(local: torch.Tensor) -> torch.Tensor:
    """Concatenate the tensors [b, ...] of all ranks, of one shape, in rank order: [B, ...]."""
    if get_world_size() == 1:
        return local
    gathered = local.new_empty((get_world_size() * local.shape[0], *local.shape[1:]))
    # Its name in older versions is all_gather_into_tensor.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(gathered, local.contiguous())
    return gathered


class DistributedLogSumExp(torch.autograd.Function):
    """The log-denominators of MIL-NCE: video [b, D], text [b*K, D] -> lse [b].

    lse_i = logsumexp{x_ijk, x_jik for all j, k}, where x_ijk = v_i . t_jk and j runs over all
    ranks' videos. Backward computes the gradient of every rank's denominators with respect to the
    rank's own embeddings. It gathers two numbers per video, lse and the gradient with respect to
    it; the embeddings were gathered by forward.
    """

    @staticmethod
    def forward(ctx, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        videos, texts = all_gather_batch(video), all_gather_batch(text)  # [B, D], [B*K, D]
        rows = video @ texts.t()  # [b, B*K]: x_ijk of own i
        columns = videos @ text.t()  # [B, b*K]: x_ijk of own j
        by_candidate = columns.view(videos.shape[0], video.shape[0], -1)  # [B, b, K]
        lse = torch.logaddexp(rows.logsumexp(1), by_candidate.logsumexp((0, 2)))
        ctx.save_for_backward(videos, texts, rows, columns, lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        videos, texts, rows, columns, lse = ctx.saved_tensors
        candidates = texts.shape[0] // videos.shape[0]
        own = torch.stack((gradient, lse), dim=1)  # [b, 2]
        union = all_gather_batch(own)  # [B, 2]
        of_own_texts, of_texts = (x.repeat_interleave(candidates, 0) for x in (own, union))
        return (
            differentiate_scores(rows, own, of_texts) @ texts,
            differentiate_scores(columns, union, of_own_texts).t() @ videos,
        )


def differentiate_scores(
    scores: torch.Tensor, of_video: torch.Tensor, of_text: torch.Tensor
) -> torch.Tensor:
    """Compute the gradient of the loss with respect to scores [n, m], through the denominators.

    x_ijk is a term of lse_i and of lse_j. of_video [n, 2] and of_text [m, 2] have (g, lse) of these
    two, where g is the gradient with respect to lse. Result [n, m]: g_i exp(x_ijk - lse_i) +
    g_j exp(x_ijk - lse_j). No term exceeds its logsumexp, so that exp cannot overflow.
    """
    gradient = (scores - of_video[:, 1:]).exp_().mul_(of_video[:, :1])
    return gradient.add_((scores - of_text[:, 1]).exp_().mul_(of_text[:, 0]))


class MILNCELoss(nn.Module):
    """The mean over the B videos of -log( sum_k e^x_iik / sum_jk (e^x_ijk + e^x_jik) ).

    x_ijk = v_i . t_jk is the score of video i and candidate k of video j. Both directions of the
    denominator contain the positives, as in the public release, so the minimum is log 2. The value
    is that of the union batch on every rank; so is the gradient, after DistributedDataParallel has
    averaged it over the ranks.
    """

    def forward(self, video_embd: torch.Tensor, text_embd: torch.Tensor) -> torch.Tensor:
        """Compute the loss [] of video_embd [b, D] and text_embd [b*K, D], in float32 or wider.

        Row i*K + k of text_embd is candidate k of video i.
        """
        # In a narrower type, scores of positives and negatives could round to the same value.
        dtype = torch.promote_types(video_embd.dtype, torch.float32)
        with torch.autocast(video_embd.device.type, enabled=False):
            return self.compute_loss(video_embd.to(dtype), text_embd.to(dtype))

    def compute_loss(self, video_embd: torch.Tensor, text_embd: torch.Tensor) -> torch.Tensor:
        own_texts = text_embd.view(video_embd.shape[0], -1, text_embd.shape[1])  # [b, K, D]
        positives = torch.einsum("bd,bkd->bk", video_embd, own_texts).logsumexp(dim=1)
        loss = (DistributedLogSumExp.apply(video_embd, text_embd) - positives).mean()

        if get_world_size() > 1:
            # Return the value of the union batch and keep the gradient of the rank's own mean.
            union = loss.detach().clone()
            dist.all_reduce(union)
            loss = loss + (union / get_world_size() - loss.detach())
        return loss
