"""The optimizer, and the schedule of the learning rate."""

import math

import torch

from utils import InputError


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
    match_state_layout(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: lr_multiplier(step, args.warmup_steps, total_steps),
        last_epoch=first_step - 1,
    )
    return optimizer, scheduler


def match_state_layout(optimizer):
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


def lr_multiplier(step, warmup_steps, total_steps):
    """The learning rate's share of its peak: linear from 0, then half a cosine to 0 (steps)."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
