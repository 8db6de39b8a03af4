"""The optimizer, and the schedule of the learning rate."""

import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(
    model: torch.nn.Module, name: str, lr: float, *, momentum: float = 0.9, fused: bool = True
) -> Optimizer:
    """Build Adam ("adam") or SGD ("sgd") for the trainable parameters.

    lr: the peak learning rate. fused: one kernel updates all weights, without a device sync.
    """
    trained = [p for p in model.parameters() if p.requires_grad]  # not the word embedding
    options = {"fused": True if fused else None}  # None: the default of torch
    if name == "adam":
        optimizer = torch.optim.Adam(trained, lr, **options)
    else:
        optimizer = torch.optim.SGD(trained, lr, momentum=momentum, **options)
    match_state_layout(optimizer)
    return optimizer


def resume_optimizer(optimizer: Optimizer, saved: dict) -> None:
    """Load the state of a checkpoint, but keep this run's learning rate and kernels.

    Raises ValueError if the checkpoint is of another optimizer.
    """
    own = [{name: group[name] for name in ("lr", "fused")} for group in optimizer.param_groups]
    try:
        was_adam = "betas" in saved["param_groups"][0]
        if was_adam != isinstance(optimizer, torch.optim.Adam):
            raise ValueError("it belongs to another --optimizer")
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"its optimizer cannot be resumed: {error}") from None
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options, foreach=None)
    match_state_layout(optimizer)


def match_state_layout(optimizer: Optimizer) -> None:
    """Give the optimizer's state the memory layout that its fused kernel expects.

    The kernel combines parameter and state in the order of memory, so both need the same layout; a
    checkpoint may have another. Also initialize the momentum of SGD: if its first step is skipped,
    the kernel would use uninitialized memory.
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


def build_scheduler(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, first_step: int = 0
) -> LambdaLR:
    """Build the schedule of the learning rate, which depends on the step alone."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(
        optimizer,
        lambda step: lr_multiplier(step, warmup_steps, total_steps),
        last_epoch=first_step - 1,
    )


def lr_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate relative to its peak: linear warmup, then cosine decay to 0."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
