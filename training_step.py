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
from utils import PRECISIONS, InputError, lr_multiplier, to_unit_range


def autocast_dtype(args, device):
    """The type that convolutions and matrix products of the training take (--amp).

    By default bfloat16 where the processor computes in it, which needs no scaling of the loss, and
    float32 elsewhere.
    """
    if args.amp in PRECISIONS:
        return PRECISIONS[args.amp]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def build_optimizer(args, model, first_step, total_steps, resumed=None):
    """The optimizer over what is trained, and the schedule, which moves at every step.

    The schedule follows from the flags and the step alone; the optimizer goes on from `resumed`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # not the word embedding
    fused = True if args.fused_optimizer else None  # None: whatever else torch thinks best
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(trained, args.lr, fused=fused)
    else:
        optimizer = torch.optim.SGD(trained, args.lr, momentum=args.momentum, fused=fused)
    if resumed:
        try:
            was_adam = "betas" in resumed["optimizer"]["param_groups"][0]
            if was_adam != (args.optimizer == "adam"):
                raise ValueError("it is of another --optimizer")
            optimizer.load_state_dict(resumed["optimizer"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"--resume: {resumed['path']}: its optimizer: {error}") from None
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = args.lr
        group["fused"], group["foreach"] = fused, None
    settle_state(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_multiplier(step, args.warmup_steps, total_steps),
        last_epoch=first_step - 1,
    )
    return optimizer, scheduler


def settle_state(optimizer):
    """Brings an optimizer's state to what its fused form takes for granted.

    That form reads parameter and state by their place in memory, so both need one layout, and a
    checkpoint may have another. And where SGD's very first step is left out, it would take memory
    as it finds it for the momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group.get("momentum"):
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))
            for name, value in state.items():
                if name == "step":
                    state[name] = value.to(parameter.device if group["fused"] else "cpu")
                elif isinstance(value, torch.Tensor):
                    state[name] = torch.empty_like(parameter).copy_(value)


class Averages:
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


def mean_averages(readings):
    """The mean of what Averages.read gave several times. Counts are all the same."""
    return {
        dtype: torch.stack([r[dtype] for r in readings]).mean(0) if dtype.is_floating_point else one
        for dtype, one in readings[0].items()
    }


class Mover:
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

    def __init__(self, network, optimizer, dtype, at=lambda place: None, skipped=(0, 0)):
        self.network, self.optimizer, self.dtype, self.at = network, optimizer, dtype, at
        self.criterion = MILNCELoss()
        self.device = next(network.parameters()).device
        self.averages = Averages(network)
        self.move = Mover(self.device)
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
                self.at(f"the forward pass of micro-batch {n + 1}")
                if n:
                    self.averages.write(before)
                embeddings.append(self.embed(batch))
                moved.append(self.averages.read())

        self.at("the loss")
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
            self.at(f"the backward pass of micro-batch {n + 1}")
            with self.adding_up(last=n == len(batches) - 1):
                again = self.embed(batch) if len(batches) > 1 else embeddings[n]
                torch.autograd.backward(again, self.scaler.scale(gradient))
        self.update(loss.detach(), before, mean_averages(moved))
        return loss.detach()

    def adding_up(self, last):
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
