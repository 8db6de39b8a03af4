"""One step of the training: micro-batches, precision, the optimizer, and steps that are left out.

With --accum_steps N a step has N micro-batches of b clips. All are embedded first, keeping nothing
for a backward pass; the loss of all N*b clips (of all ranks) gives the gradient of the embeddings;
then each micro-batch is embedded again and handed its share of it. So every clip has the negatives
of the whole batch, at the memory of one micro-batch (gradient caching, Gao et al., arXiv
2101.06983).

BatchNorm normalises each micro-batch by its own statistics, as it does each GPU's batch; its
running averages move once a step, by the mean of the micro-batches' statistics.
"""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from loss import MILNCELoss
from s3dg import to_unit_range


class BatchNormBuffers:
    """All buffers of a model, which are BatchNorm's running averages and counts."""

    def __init__(self, model):
        self.groups = {}
        for buffer in model.buffers():
            self.groups.setdefault(buffer.dtype, []).append(buffer)

    def read(self):
        """A copy of their values: {dtype: one-dimensional tensor}."""
        return {
            dtype: torch.cat([b.reshape(-1) for b in group]) for dtype, group in self.groups.items()
        }

    def write(self, values):
        for dtype, group in self.groups.items():
            parts = values[dtype].split([buffer.numel() for buffer in group])
            torch._foreach_copy_(
                group, [part.view_as(buffer) for buffer, part in zip(group, parts, strict=True)]
            )


def mean_buffers(readings):
    """The mean of what BatchNormBuffers.read gave several times. Counts are all the same."""
    return {
        dtype: torch.stack([r[dtype] for r in readings]).mean(0) if dtype.is_floating_point else one
        for dtype, one in readings[0].items()
    }


class HostToDevice:
    """Copies batches to the GPU, from page-locked memory, while it computes what came before."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.launched = None  # an event after the work on the batch before the last

    def __call__(self, *tensors):
        if self.stream is None:
            return tensors
        computing = torch.cuda.current_stream(self.device)
        if self.launched:
            # The GPU has the last batch to do meanwhile. A host that never waited would run ahead
            # and fill the memory with batches.
            self.launched.synchronize()
        self.launched = computing.record_event()
        with torch.cuda.stream(self.stream):
            moved = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        computing.wait_stream(self.stream)
        for tensor in moved:
            tensor.record_stream(computing)  # its memory is not free before that stream is past it
        return moved


class TrainingStep:
    """Calling it with a step's micro-batches does the step and returns its loss, on the device.

    A step whose loss or gradient is not finite is left out, and model, optimizer and averages stay
    as they were. That is decided on the device, which the host need not wait for (it does without a
    fused optimizer); all ranks decide alike. With float16 a gradient that overflows lowers the
    loss' scale; that step is left out, too, but is no bad one unless the scale is below 1.

    network: the model or its DistributedDataParallel. at: is told how far the step is.
    """

    def __init__(self, network, optimizer, dtype, enter_stage=lambda place: None, skipped=(0, 0)):
        self.network, self.optimizer, self.dtype, self.enter_stage = (
            network,
            optimizer,
            dtype,
            enter_stage,
        )
        self.criterion = MILNCELoss()
        self.device = next(network.parameters()).device
        self.averages = BatchNormBuffers(network)
        self.move = HostToDevice(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        total, in_row = skipped
        self.counts = torch.tensor([total, in_row, 0], device=self.device)

    def skipped(self):
        """Waits for the device: all skipped steps, the bad ones in a row now, the most in a row."""
        return self.counts.tolist()

    def embed(self, batch):
        """batch: "video" uint8 [b, 3, T, H, W], "text" [b, (K,) words]; gives [b, D], [b*K, D]."""
        video, text = self.move(batch["video"], batch["text"])
        shorter = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=shorter):
            return self.network(to_unit_range(video), text.flatten(0, -2))

    def __call__(self, batches):
        before, moved, embeddings = self.averages.read(), [], []
        with torch.set_grad_enabled(len(batches) == 1):
            for n, batch in enumerate(batches):
                self.enter_stage(f"the forward pass of micro-batch {n + 1}")
                if n:
                    self.averages.write(before)
                embeddings.append(self.embed(batch))
                moved.append(self.averages.read())

        self.enter_stage("the loss")
        videos, texts = (
            torch.cat(p).detach().requires_grad_() for p in zip(*embeddings, strict=True)
        )
        loss = self.criterion(videos, texts)
        loss.backward()

        self.optimizer.zero_grad()
        gradients = zip(
            videos.grad.chunk(len(batches)), texts.grad.chunk(len(batches)), strict=True
        )
        for n, (batch, gradient) in enumerate(zip(batches, gradients, strict=True)):
            self.enter_stage(f"the backward pass of micro-batch {n + 1}")
            with self.no_sync_unless_last(last=n == len(batches) - 1):
                again = self.embed(batch) if len(batches) > 1 else embeddings[n]
                torch.autograd.backward(again, self.scaler.scale(gradient))
        self.update(loss.detach(), before, mean_buffers(moved))
        return loss.detach()

    def no_sync_unless_last(self, last):
        """The ranks' gradients are summed with the last micro-batch's."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def update(self, loss, before, after):
        """The optimizer's step and the averages', where loss and gradient are finite."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        finite = torch.isfinite(loss + get_total_norm(gradients, norm_type=torch.inf))
        skipped = bad = ~finite
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            bad = ~torch.isfinite(loss) | (skipped & (self.scaler.scale(torch.ones_like(loss)) < 1))
        elif self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped.float()
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.averages.write({d: torch.where(finite, after[d], before[d]) for d in before})
        total, in_row, most = self.counts
        in_row = (in_row + 1) * bad
        self.counts = torch.stack((total + skipped, in_row, torch.maximum(most, in_row)))
