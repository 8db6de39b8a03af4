"""The release's way and ours of a forward pass, an evaluation and a training step of a model.

    plain     the release's way: S3D in float32, contiguous, run by autograd as it is, with the
              dense loss of bench_loss.py and Adam without a fused kernel. plain_copy removes the
              optimizations of s3dg.S3D: temporal convolutions have three dimensions again, and
              max-pools copy their input to pad it. Pixels become floats on the host. (Float32
              only: with three dimensions the temporal convolutions' gradient is wrong in bfloat16
              on some CPUs, see s3dg.TemporalConv3d.)
    ours      as the scripts run it: channels innermost; fuse_for_inference, video_features,
              TrainingStep with fused Adam.

Both copy a given model, so the weights are the same, and take the same batches, which are in the
host's memory: "video" uint8 [b, 3, T, H, W], "text" int64 [b, K, words].
"""

import copy
import math
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_loss import dense_loss
from torch import nn

from s3dg import to_unit_range

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import get_args
from evaluation.features import video_features
from s3dg import (
    S3D,
    VOCABULARY_ROWS,
    MaxPool3dTFPadding,
    TemporalConv3d,
    compute_in_2d,
    fuse_for_inference,
)
from training.optimizer import build_optimizer, build_scheduler
from training.step import TrainingStep
from video_loader import TRAINING_WORDS

# --- model and clips -----------------------------------------------------------------------------


def new_model():
    torch.manual_seed(1)
    return S3D(init="kaiming_normal")


def draw_batch(options, clips, device):
    """Draw a batch of coarse blocks, as clips of noise have equal means. All calls are equal."""
    generator = torch.Generator().manual_seed(1)
    size = clips, 3, math.ceil(options.frames / 4), 4, 4
    blocks = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    size = clips, options.candidates, TRAINING_WORDS
    text = torch.randint(0, VOCABULARY_ROWS, size, generator=generator)
    video = F.interpolate(blocks, (options.frames, options.size, options.size))
    batch = {"video": video, "text": text}
    return {n: t.pin_memory() for n, t in batch.items()} if device.type == "cuda" else batch


def settle_averages(model, batch):
    """Set BatchNorm's running averages from this batch: a new model embeds all clips alike."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm3d)]
    for layer in layers:
        layer.momentum = 1.0
    with torch.no_grad():
        model(to_unit_range(batch["video"]), mode="video")
    for layer in layers:
        layer.momentum = 0.1


def plain_copy(model, device):
    """Copy the model without the optimizations of s3dg.py. The copy computes the same values."""
    plain = copy.deepcopy(model).to(device)
    for module in plain.modules():
        if isinstance(module, TemporalConv3d):
            module.forward = types.MethodType(nn.Conv3d.forward, module)
        elif isinstance(module, MaxPool3dTFPadding):
            module.forward = types.MethodType(padding_pool, module)
    return plain


def padding_pool(pool, x):
    return pool.pool(F.pad(x, pool.padding))


def our_copy(model, device):
    return copy.deepcopy(model).to(device, memory_format=torch.channels_last_3d)


# --- inference: (model, batch, device, dtype) -> a function that embeds the batch: [tensor] -------


def plain_forward(model, batch, device, dtype):
    plain, video = plain_copy(model, device).eval(), to_unit_range(batch["video"].to(device))

    @torch.no_grad()
    def run():
        return [plain(video, mode="video")]

    return run


def our_forward(model, batch, device, dtype):
    fast = fuse_for_inference(our_copy(model, device), dtype)
    video = to_unit_range(batch["video"].to(device))

    @torch.inference_mode()
    def run():
        return [fast(video, mode="video")]

    return run


def plain_evaluation(model, batch, device, dtype):
    plain = plain_copy(model, device).eval()

    @torch.no_grad()
    def run():
        return [plain(batch["video"].float().to(device) / 255, mode="video").cpu()]

    return run


def our_evaluation(model, batch, device, dtype):
    fast = fuse_for_inference(our_copy(model, device), dtype)
    dataset = OneVideo(batch["video"])
    reading = {"batch_size": len(dataset.windows), "workers": 0, "sample_timeout": math.inf}

    def run():
        return [torch.from_numpy(video_features(fast, dataset, device, **reading)[0])]

    return run


class OneVideo:
    """A data set of one video with these windows."""

    def __init__(self, windows):
        self.windows = windows
        self.item_spec = {"video": (windows.shape, windows.dtype)}

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"video": self.windows}


# --- training: (network, step, scheduler); step takes micro-batches and returns the loss ----------


def plain_trainer(model, device, args, total_steps=1):
    """Build the plain trainer. Its step takes only one micro-batch."""
    network = plain_copy(model, device).train()
    optimizer = build_optimizer(network, args.optimizer, args.lr, fused=False)
    scheduler = build_scheduler(optimizer, args.warmup_steps, total_steps)

    def step(batches):
        (batch,) = batches
        video, text = batch["video"].float().to(device) / 255, batch["text"].to(device)
        optimizer.zero_grad()
        loss, _ = dense_loss(*network(video, text.flatten(0, -2)))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return network, step, scheduler


def our_trainer(model, device, dtype, args, total_steps=1):
    network = our_copy(model, device).train()
    network.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        network.compile()
    optimizer = build_optimizer(network, args.optimizer, args.lr, fused=bool(args.fused_optimizer))
    scheduler = build_scheduler(optimizer, args.warmup_steps, total_steps)
    return network, TrainingStep(network, optimizer, dtype), scheduler


def plain_step(model, batch, device, dtype):
    """Return a function that runs a step and returns the gradients."""
    network, step, _ = plain_trainer(model, device, get_args(argv=["--warmup_steps=0"]))
    return lambda: compute_gradients(network, step, [batch])


def our_step(model, batch, device, dtype, *flags):
    """Return a function that runs a step with these training flags and returns the gradients."""
    args = get_args(argv=["--warmup_steps=0", *flags])
    network, step, _ = our_trainer(model, device, dtype, args)
    parts = zip(*(tensor.chunk(args.accum_steps) for tensor in batch.values()), strict=True)
    batches = [dict(zip(batch, part, strict=True)) for part in parts]
    return lambda: compute_gradients(network, step, batches)


def our_step_in_2d(model, batch, device, dtype, *flags):
    """Return our_step's function for the model with the layers of s3dg.compute_in_2d."""
    return our_step(compute_in_2d(copy.deepcopy(model)), batch, device, dtype, *flags)


def compute_gradients(network, step, batches):
    step(batches)
    return [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
