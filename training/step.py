"""One training step: forward, loss, backward, update."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from loss import MILNCELoss
from s3dg import input_format, to_unit_range

Batch = dict[str, torch.Tensor]  # "video" uint8 [b, 3, T, H, W], "text" int64 [b, (K,) words]


def distribute(network: torch.nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap a network to average its gradients over all ranks.

    The weights and buffers of rank 0 are broadcast here, and buffers never again: training does not
    use the running statistics. Validation and checkpoints use those of rank 0.
    """
    ids = [device] if device.type == "cuda" else None
    network = DistributedDataParallel(network, device_ids=ids)
    network.broadcast_buffers = False  # in forward; the argument would exclude them here, too
    return network


class TrainingStep:
    """The step of one rank. Call it with the step's micro-batches; it returns the loss.

    A step whose loss or gradient is not finite is skipped: model, optimizer and running statistics
    do not change. The device makes this decision, so the host does not wait for it (except without
    a fused optimizer), and all ranks make the same one. With float16, a gradient that overflows
    lowers the loss scale. That step is also skipped, but counts as bad only if the scale falls
    below 1.

    network: the S3D, or its DistributedDataParallel. dtype: of convolutions and matrix products.
    enter_stage: called with the name of each stage of the step, for the watchdog. skipped: the
    counts (all skipped steps, bad ones in a row) to continue from.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        enter_stage: Callable[[str], None] = lambda stage: None,
        skipped: tuple[int, int] = (0, 0),
    ):
        self.network, self.optimizer = network, optimizer
        self.dtype, self.enter_stage = dtype, enter_stage
        self.criterion = MILNCELoss()
        self.device = next(network.parameters()).device
        _, self.layout = input_format(network)
        self.bn_buffers = BatchNormBuffers(network)
        self.to_device = HostToDevice(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        total, in_row = skipped
        self.counts = torch.tensor([total, in_row, 0], device=self.device)

    def __call__(self, batches: list[Batch]) -> torch.Tensor:
        return self.plain_step(*batches) if len(batches) == 1 else self.cached_step(batches)

    def plain_step(self, batch: Batch) -> torch.Tensor:
        """Do one step on a batch. Returns the loss, on the device."""
        self.optimizer.zero_grad()
        bn_before = self.bn_buffers.read()

        self.enter_stage("the forward pass")
        video_embd, text_embd = self.embed(batch)
        bn_after = self.bn_buffers.read()

        self.enter_stage("the loss")
        loss = self.criterion(video_embd, text_embd)

        self.enter_stage("the backward pass")
        self.scaler.scale(loss).backward()

        self.update(loss.detach(), bn_before, bn_after)
        return loss.detach()

    def cached_step(self, batches: list[Batch]) -> torch.Tensor:
        """Do one step on micro-batches whose clips all have the negatives of the whole batch.

        Gradient caching (Gao et al., arXiv 2101.06983): embed all micro-batches, keeping nothing
        for a backward pass; compute the loss of all their clips, over all ranks, and its gradient
        with respect to the embeddings; embed each micro-batch again and backpropagate its part. So
        the memory is that of one micro-batch, for a third more computation. BatchNorm normalizes
        each micro-batch by its own statistics, as it does each GPU's batch; its running statistics
        move once, by the mean over the micro-batches.
        """
        self.optimizer.zero_grad()
        bn_before, bn_after, embeddings = self.bn_buffers.read(), [], []
        for number, batch in enumerate(batches, 1):
            self.enter_stage(f"the forward pass of micro-batch {number}")
            self.bn_buffers.write(bn_before)
            with torch.no_grad():
                embeddings.append(self.embed(batch))
            bn_after.append(self.bn_buffers.read())

        self.enter_stage("the loss")
        video_embd, text_embd = (
            torch.cat(parts).requires_grad_() for parts in zip(*embeddings, strict=True)
        )
        loss = self.criterion(video_embd, text_embd)
        self.scaler.scale(loss).backward()
        gradients = zip(*(e.grad.chunk(len(batches)) for e in (video_embd, text_embd)), strict=True)

        for number, (batch, gradient) in enumerate(zip(batches, gradients, strict=True), 1):
            self.enter_stage(f"the backward pass of micro-batch {number}")
            with self.no_sync_unless_last(number == len(batches)):
                torch.autograd.backward(self.embed(batch), gradient)

        self.update(loss.detach(), bn_before, torch.stack(bn_after).mean(0))
        return loss.detach()

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed a batch: float32 [b, D] and [b*K, D]."""
        video, text = self.to_device(batch["video"], batch["text"])
        autocast = torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )
        with autocast, self.bn_buffers.without_counting():
            clips = to_unit_range(video, self.dtype, self.layout)
            return self.network(clips, text.flatten(0, -2))

    def no_sync_unless_last(self, last: bool) -> contextlib.AbstractContextManager:
        """Make DistributedDataParallel sum the ranks' gradients in the last micro-batch only."""
        if last or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def update(self, loss: torch.Tensor, bn_before: torch.Tensor, bn_after: torch.Tensor) -> None:
        """Update the weights and the running statistics, if loss and gradient are finite."""
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
        self.bn_buffers.write(torch.where(finite, bn_after, bn_before))
        self.bn_buffers.count(finite.long())
        total, in_row, most = self.counts
        in_row = (in_row + 1) * bad
        self.counts = torch.stack((total + skipped, in_row, torch.maximum(most, in_row)))

    def skipped(self) -> list[int]:
        """Return how many steps were skipped: all, bad ones in a row now, the most in a row.

        Waits for the device.
        """
        return self.counts.tolist()

    def prime_ddp_buckets(self, batch: Batch) -> None:
        """Run the first backward pass of DistributedDataParallel before the first step.

        After that pass, it rearranges the gradients and sums the ranks in another order. So without
        it, a resumed run would not be bit-identical to an uninterrupted one.
        """
        self.network.train()
        before = self.bn_buffers.read()
        sum(embedding.sum() for embedding in self.embed(batch)).backward()
        self.network.zero_grad()
        self.bn_buffers.write(before)


class BatchNormBuffers:
    """The running statistics of a network's BatchNorm layers, read and written as a whole.

    They are few and small. One tensor for all of them needs fewer kernels, and so does counting the
    steps once instead of in each forward pass of each layer.
    """

    def __init__(self, network: torch.nn.Module):
        self.layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        self.counters = [layer.num_batches_tracked for layer in self.layers]
        self.stats = [s for layer in self.layers for s in (layer.running_mean, layer.running_var)]

    def read(self) -> torch.Tensor:
        """Copy the statistics to one tensor, one-dimensional."""
        return torch.cat(self.stats)

    def write(self, values: torch.Tensor) -> None:
        torch._foreach_copy_(self.stats, values.split([len(s) for s in self.stats]))

    def count(self, steps: torch.Tensor) -> None:
        """Add to every layer's num_batches_tracked."""
        torch._foreach_add_(self.counters, steps)

    @contextlib.contextmanager
    def without_counting(self) -> Iterator[None]:
        """Keep the layers from counting their batches. Their outputs do not depend on the count."""
        for layer in self.layers:
            layer.num_batches_tracked = None
        try:
            yield
        finally:
            for layer, counter in zip(self.layers, self.counters, strict=True):
                layer.num_batches_tracked = counter


class HostToDevice:
    """Copy batches to the GPU, from page-locked memory, while it computes the step before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.launched = None  # an event: the work on the batch before the previous one is done
        self.copied = None  # an event: the previous batch has arrived
        self.held = ()  # that batch
        self.arrival = None  # an optional event to record when the next batch has arrived

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.stream is None:
            return tensors
        computing = torch.cuda.current_stream(self.device)
        if self.launched:
            # Meanwhile the GPU computes the previous batch. Without this wait, the host would run
            # ahead and fill the memory with batches.
            self.launched.synchronize()
            # PyTorch keeps tensors that it has page-locked itself until they are copied. It does
            # not know those of BatchMemory, whose memory is reused for the next clips.
            self.copied.synchronize()
        self.held = tensors
        self.launched = computing.record_event(torch.cuda.Event(blocking=True))
        with torch.cuda.stream(self.stream):
            moved = tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)
        self.copied = self.stream.record_event(torch.cuda.Event(blocking=True))
        computing.wait_event(self.copied)
        if self.arrival:
            self.arrival.record(computing)
            self.arrival = None
        for tensor in moved:
            tensor.record_stream(computing)  # keeps its memory until that stream has used it
        return moved
