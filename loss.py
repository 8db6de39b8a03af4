"""MIL-NCE, the loss of Miech et al. (CVPR 2020), section 3.2."""

import torch
import torch.distributed as dist
from torch import nn


class AllGather(torch.autograd.Function):
    """Concatenates the ranks' tensors; backward returns to each rank the sum of all its gradients.

    [b, D] on each rank -> [world_size * b, D] on all, in rank order. Every rank must bring the same
    shape.
    """

    @staticmethod
    def forward(ctx, local):
        gathered = local.new_empty((dist.get_world_size() * local.shape[0], *local.shape[1:]))
        dist.all_gather_single(gathered, local.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        local = gradient.new_empty(
            (gradient.shape[0] // dist.get_world_size(), *gradient.shape[1:])
        )
        dist.reduce_scatter_single(local, gradient)
        return local


class MILNCELoss(nn.Module):
    """mean_i( logsumexp{x_ijk, x_jik for all j, k} - logsumexp_k x_iik ), x_ijk = v_i . t_jk.

    Both directions of the denominator hold the positives, as in the public release: the minimum
    is log 2. In a process group the batch is the union of all ranks' batches, of equal size, and
    each rank scores its own share only: its videos against all texts, all videos against its
    texts. The value is the union's on every rank; so is the gradient, once it is averaged over the
    ranks as DistributedDataParallel does.
    """

    def forward(self, video_embd, text_embd):
        """video_embd: [B, D]. text_embd: [B*K, D]; row b*K + k is candidate k of video b."""
        batch, candidates = video_embd.shape[0], text_embd.shape[0] // video_embd.shape[0]
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        all_videos = AllGather.apply(video_embd) if distributed else video_embd
        all_texts = AllGather.apply(text_embd) if distributed else text_embd

        video_to_text = video_embd @ all_texts.t()  # [B, all B * K]
        text_to_video = all_videos @ text_embd.t()  # [all B, B * K]
        text_to_video = text_to_video.view(-1, batch, candidates).transpose(0, 1).flatten(1)
        everything = torch.cat((video_to_text, text_to_video), dim=1)
        positives = torch.einsum("bd,bkd->bk", video_embd, text_embd.view(batch, candidates, -1))
        loss = (everything.logsumexp(dim=1) - positives.logsumexp(dim=1)).mean()

        if distributed:
            # Show the union's value and keep the local gradient.
            union = loss.detach().clone()
            dist.all_reduce(union)
            loss = loss + (union / dist.get_world_size() - loss.detach())
        return loss
