"""Test and measure training on this machine's GPU, in one command and less than ten minutes.

    python benchmarks/gpu_selftest.py                   # a report, and log/gpu_selftest.json
    python benchmarks/gpu_selftest.py --sections 2 6    # only these
    python benchmarks/gpu_selftest.py --quick           # small; the default without a GPU

A section passes, fails, or is not measured. Checks are of values: none depends on a time. A section
or part that raises an exception fails, with one line. The others still run, and the exit status is
1. Parts that need a missing GPU, or do not fit in their section's share of the time, are marked
"not measured". The JSON file is written after every section. It has the numbers of the report and
nothing else.

    error      |a - b| / |b|; for a layer, of its output and of the gradients of its input and
               weights, each against the 3-d layer in float32 on the same bfloat16 numbers
    ms         for a layer, forward and backward; for a step, the time from step to step, the GPU's
               time by its own clock, and the host's time to launch a step
    2D         the layers as s3dg.compute_in_2d makes them
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import faulthandler
import functools
import gc
import json
import math
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import bench_step
import numpy as np
import torch
import torch.distributed as dist
import ways
from bench_decode import processor
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "toy")]
import prepare  # noqa: E402

import s3dg  # noqa: E402
from args import get_args, make_folder, positive  # noqa: E402
from distributed.device import check_compiler, pick_device, training_dtype  # noqa: E402
from main_distributed import training_set  # noqa: E402
from training.checkpoint import list_checkpoints  # noqa: E402
from training.log import read_records  # noqa: E402
from training.step import TrainingStep, distribute  # noqa: E402
from utils import atomic_write, die_with_parent, input_error, one_line, run_script  # noqa: E402
from video_loader import StepSampler, training_batches  # noqa: E402

NO_GPU = "not measured: no GPU"
NO_TIME = "not measured: out of time"
SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OutOfTime(BaseException):
    """The section has used its share of the time. Libraries do not catch a BaseException."""


@dataclasses.dataclass
class Bench:
    """State that the sections share. ends: when the current section's share of the time ends."""

    device: torch.device
    quick: bool
    folder: Path  # for files; removed at the end
    ends: float = 0.0

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def small(self) -> SimpleNamespace:
        """The sizes of the clips of checks, for draw_batch."""
        frames, size = (4, 32) if self.quick else (8, 64)
        return SimpleNamespace(frames=frames, size=size, candidates=2)

    def draw(self, clips: int) -> dict[str, torch.Tensor]:
        return ways.draw_batch(self.small, clips, self.device)

    def on_gpu(self, part: Callable) -> Callable | str:
        return part if self.gpu else NO_GPU


def start_clock(bench: Bench, seconds: float) -> None:
    """Raise OutOfTime after this many seconds, wherever the interpreter is then."""

    def end(number, frame):
        raise OutOfTime

    bench.ends = time.monotonic() + seconds
    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def run_parts(bench: Bench, parts: dict[str, Callable[[], Any] | str]) -> dict[str, Any]:
    """Run the parts of a section; one that raises fails alone. A string is its own result."""
    results = {}
    for name, part in parts.items():
        try:
            if time.monotonic() > bench.ends:
                raise OutOfTime
            results[name] = part if isinstance(part, str) else part()
        except OutOfTime:
            results[name] = NO_TIME
        except Exception as error:
            results[name] = {"passed": False, "error": describe(error)}
    return results


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"[:300]


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the time of a run, after one that is not counted."""
    run()
    return 1000 / repeats * bench_step.seconds(lambda: [run() for _ in range(repeats)], device)


# --- 1. versions and bandwidth --------------------------------------------------------------------


def report_machine(bench: Bench) -> dict[str, Any]:
    """Report the versions, and the bandwidth from the host's memory to the GPU's."""
    found = {
        "processor": f"{processor()}, {len(os.sched_getaffinity(0))} usable",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "type of --amp auto": str(training_dtype("auto", bench.device)),
    }
    if not bench.gpu:
        return found | {"GPU": NO_GPU, "host to device": NO_GPU}
    properties = torch.cuda.get_device_properties(bench.device)
    pageable = torch.zeros(2**28, dtype=torch.uint8)
    sources = {"pageable": pageable, "page-locked": pageable.pin_memory()}
    times = {
        name: milliseconds(lambda source=source: source.to(bench.device), bench.device, 4)
        for name, source in sources.items()
    }
    return found | {
        "GPU": f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB",
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "host to device, GB/s": {name: 2**28 / ms / 1e6 for name, ms in times.items()},
    }


# --- 2. layers ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """Identical layers of the S3D: one of them, the shape of their input, and their number."""

    kind: str
    module: nn.Module
    shape: tuple[int, ...]
    count: int


def collect_layers(frames: int, size: int, clips: int) -> list[Layer]:
    """List every distinct convolution, pool and BatchNorm of the S3D. Computes nothing."""
    with torch.device("meta"):
        model, video = s3dg.S3D(), torch.empty(clips, 3, frames, size, size)
    found: dict[tuple, list[nn.Module]] = collections.defaultdict(list)

    def note(module, inputs, output):
        found[label(module), tuple(inputs[0].shape)].append(module)

    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.BatchNorm3d | nn.MaxPool3d):
            module.register_forward_hook(note)
    model(video, mode="video", mixed5c=True)
    return [
        Layer(next(kind for kind in ("Conv", "Norm", "Pool") if kind in name), m[0], shape, len(m))
        for (name, shape), m in found.items()
    ]


def label(module: nn.Module) -> str:
    """Describe a layer briefly."""
    sizes = {}
    if not isinstance(module, nn.BatchNorm3d):
        sizes = {n: s3dg.triple(getattr(module, n)) for n in ("kernel_size", "stride", "padding")}
    words = ("x".join(map(str, size)) for size in sizes.values())
    kind, channels = type(module).__name__, getattr(module, "out_channels", "")
    return " ".join(f"{kind} {' / '.join(words)} {channels}".split())


def three_dimensional(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer as PyTorch does, even if s3dg.py computes it differently."""
    kind = next(k for k in (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d) if isinstance(module, k))
    return kind.forward(module, x)


def two_dimensional(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a layer as s3dg.compute_in_2d makes it."""
    return s3dg.compute_in_2d(copy.copy(module))(x)


def has_two_dimensional(module: nn.Module) -> bool:
    """Check whether a layer has a 2D way. A kernel over both time and space has none."""
    module = s3dg.compute_in_2d(copy.copy(module))
    return type(module) not in (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)


def measure_layers(bench: Bench) -> dict[str, Any]:
    """Compare 3D and 2D layers in float32 and bf16: error and time for each shape."""
    options = (8, 64, 2) if bench.quick else (16, 224, 32)
    layers = collect_layers(*options)
    parts = {
        f"{label(layer.module)} on {'x'.join(map(str, layer.shape))}": (
            lambda layer=layer: compare_ways(bench, layer)
        )
        for layer in layers
    }
    rows = run_parts(bench, parts)
    done = [
        (layer, row) for layer, row in zip(layers, rows.values(), strict=True) if "3D ms" in row
    ]
    totals = {
        kind: {
            way: sum(layer.count * sum(row.get(way, row["3D ms"])) for layer, row in of_kind)
            for way in ("3D ms", "2D ms")
        }
        for kind in ("Conv", "Norm", "Pool")
        if (of_kind := [(layer, row) for layer, row in done if layer.kind == kind])
    }
    return {"clips": "{2} of {0}x{1}x{1}".format(*options), "bf16, all layers": totals} | {
        "layers measured": f"{len(done)} of {len(layers)}",
        "layers": rows,
    }


def compare_ways(bench: Bench, layer: Layer) -> dict[str, Any]:
    """Measure the ways for one shape: {"3D ms", "2D error", ..}, bf16 unless float32 is named."""
    torch.manual_seed(1)
    module = copy.deepcopy(layer.module).to_empty(device=bench.device)
    if layer.kind != "Pool":
        module.reset_parameters()
    module.to(memory_format=torch.channels_last_3d)
    x = torch.randn(layer.shape, device=bench.device).bfloat16()
    x = x.to(memory_format=torch.channels_last_3d)
    row: dict[str, Any] = {"layers": layer.count, "passed": True}
    exact, upstream = None, None
    for name, dtype, way in (
        ("3D float32 ", torch.float32, three_dimensional),
        ("2D float32 ", torch.float32, two_dimensional),
        ("3D ", torch.bfloat16, three_dimensional),
        ("2D ", torch.bfloat16, two_dimensional),
    ):
        if way is two_dimensional and not has_two_dimensional(module):
            continue
        own = x.to(dtype, copy=True).requires_grad_()
        autocast = torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32)

        def forward(way=way, own=own, autocast=autocast):
            with autocast:
                return way(module, own)

        output = forward()
        if upstream is None:
            upstream = torch.randn_like(output).bfloat16()
        arriving = upstream.to(output.dtype)
        wanted = [own, *module.parameters()]

        def backward(output=output, wanted=wanted, arriving=arriving):
            return torch.autograd.grad(output, wanted, arriving, retain_graph=True)

        found = [tensor.detach().float() for tensor in (output, *backward()[:2])]
        exact = exact or found
        error = [bench_step.distance(a, b) for a, b in zip(found, exact, strict=True)]
        repeats = 1 if bench.quick else 5
        row[f"{name}ms"] = [milliseconds(f, bench.device, repeats) for f in (forward, backward)]
        row[f"{name}error"] = error
        # A pool may pass its gradient to any of several equal values. The 3-d convolution of
        # TemporalConv3d is not used, and is wrong on some CPUs.
        checked = error[:1] if layer.kind == "Pool" else error
        limit = 0.0 if layer.kind == "Pool" else 0.03 if dtype == torch.bfloat16 else 1e-3
        unused = isinstance(module, s3dg.TemporalConv3d) and way is three_dimensional
        row["passed"] &= unused or all(value <= limit for value in checked)
    return row


# --- 3. the step ----------------------------------------------------------------------------------


def gradients(bench: Bench, model: nn.Module, batch: dict, *flags: str, **others) -> torch.Tensor:
    """Run one step and return its gradients as one vector. others: `way`, `device`, `dtype`."""
    way, device = others.get("way", ways.our_step), others.get("device", bench.device)
    run = way(model, batch, device, others.get("dtype", torch.float32), *flags)
    return bench_step.numbers(run)


def within(value: float, limit: float) -> dict[str, Any]:
    return {"error": value, "limit": limit, "passed": value <= limit}


def check_step(bench: Bench) -> dict[str, Any]:
    """Check that all ways of the step compute the same gradients, and that it learns."""
    model = ways.new_model()
    precise = copy.deepcopy(model).double()
    pair = bench.draw(2)
    batch = {name: torch.cat((t, t)) for name, t in pair.items()}  # halves of equal statistics
    exact = functools.cache(lambda: gradients(bench, precise, batch))

    def same(*flags: str, **others) -> Callable[[], dict]:
        def compare():
            return within(
                bench_step.distance(gradients(bench, precise, batch, *flags, **others), exact()),
                1e-5,  # BatchNorm of a few values amplifies rounding
            )

        return compare

    def compiled() -> dict:
        check_compiler()
        dtype = training_dtype("auto", bench.device)
        eager, own = (
            bench_step.distance(gradients(bench, model, batch, *flags, dtype=dtype), exact())
            for flags in ((), ("--compile",))
        )
        return within(own, 2 * eager + 1e-4) | {"error of eager": eager}

    return run_parts(
        bench,
        {
            "float64, against the CPU": bench.on_gpu(same(device=torch.device("cpu"))),
            "layouts: against contiguous, by autograd alone": same(way=ways.plain_step),
            "--grad_checkpoint": same("--grad_checkpoint"),
            "--accum_steps=2": same("--accum_steps=2"),
            **{
                f"a NaN batch, {name}": lambda dtype=dtype: check_nan(bench, model, dtype)
                for name, dtype in SHORT.items()
            },
            "two runs": lambda: compare_runs(bench, model),
            "50 steps": lambda: check_learning(bench, model),
            "2D": same(way=ways.our_step_in_2d),
            "--compile, against eager": bench.on_gpu(compiled),
        },
    )


def new_trainer(bench: Bench, model: nn.Module, dtype: torch.dtype, *flags: str) -> tuple:
    """Free the memory of earlier trainers and build one, see ways.our_trainer."""
    release_memory()
    if "--compile" in flags:
        torch.compiler.reset()
    args = get_args(argv=["--warmup_steps=0", *flags])
    return ways.our_trainer(model, bench.device, dtype, args)


def snapshot(network: nn.Module, step: TrainingStep) -> list[torch.Tensor]:
    """Copy weights, statistics and the optimizer's state."""
    states = step.optimizer.state.values()
    tensors = [*network.state_dict().values(), *(t for s in states for t in s.values())]
    return [tensor.detach().clone() for tensor in tensors]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def check_nan(bench: Bench, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Check that a batch of NaN changes nothing, and that the batches around it do."""
    network, step, _ = new_trainer(bench, model, dtype)
    batch = bench.draw(2)

    def move() -> bool:
        """Run steps until one is not skipped: in float16 the scale of the loss must adapt first."""
        for _ in range(30):
            before = step.skipped()[0]
            step([batch])
            if step.skipped()[0] == before:
                return True
        return False

    moved, kept, before = move(), snapshot(network, step), step.skipped()[0]
    step([batch | {"video": batch["video"] * float("nan")}])
    unchanged, skipped = all_equal(kept, snapshot(network, step)), step.skipped()[0] - before
    moved = moved and move() and not all_equal(kept, snapshot(network, step))
    return {
        "unchanged to the bit": unchanged,
        "skipped steps": skipped,
        "moves before and after": moved,
        "passed": unchanged and skipped == 1 and moved,
    }


def compare_runs(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Compare two runs of three steps. PyTorch guarantees equal bits on the CPU only."""
    ends = []
    for _ in range(2):
        network, step, _ = new_trainer(bench, model, training_dtype("auto", bench.device))
        for _ in range(3):
            step([bench.draw(2)])
        ends.append(snapshot(network, step))
    equal = all_equal(*ends)
    return {"equal to the bit": equal, "passed": equal or bench.gpu}


def check_learning(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """Train on one batch, whose loss must fall."""
    _, step, _ = new_trainer(bench, model, training_dtype("auto", bench.device), "--lr=3e-5")
    options = SimpleNamespace(frames=4, size=64, candidates=2)
    batch = ways.draw_batch(options, 3, bench.device)
    losses = torch.stack([step([batch]) for _ in range(50)]).tolist()
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    return {"first five": first, "last five": last, "passed": last < 0.9 * first}


# --- 4. and 5.: device syncs, layouts, kernels ----------------------------------------------------


def check_syncs(bench: Bench) -> dict[str, Any]:
    """Run a step in which any device sync raises an error."""
    model = ways.new_model()

    def run(dtype: torch.dtype, *flags: str) -> dict[str, Any]:
        _, step, _ = new_trainer(bench, model, dtype, *flags)
        batches = [bench.draw(4)] * (2 if flags else 1)
        step(batches), step(batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"passed": True}

    accumulated = {"bf16, --accum_steps=2": lambda: run(torch.bfloat16, "--accum_steps=2")}
    plain = {name: lambda dtype=dtype: run(dtype) for name, dtype in SHORT.items()}
    return run_parts(bench, plain | accumulated)


def profile_step(bench: Bench) -> dict[str, Any]:
    """Report the layout of each activation, the top kernels and the shares of a step's time."""
    options = bench.small if bench.quick else clip_options(16, 224)
    dtype = training_dtype("auto", bench.device)
    network, step, _ = new_trainer(bench, ways.new_model(), dtype)
    batch = ways.draw_batch(options, 2 if bench.quick else 64, bench.device)
    layouts: collections.Counter = collections.Counter()
    others = []

    def note(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == 5:
                innermost = output.is_contiguous(memory_format=torch.channels_last_3d)
                layouts["channels innermost" if innermost else "another layout"] += 1
                if not innermost:
                    others.append(f"{name}: shape {list(output.shape)}, {output.stride()}")

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in network.named_modules()]
    step([batch])
    for hook in hooks:
        hook.remove()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * bench.gpu
    with torch.profiler.profile(activities=activities) as profiler:
        step([batch])
        if bench.gpu:
            torch.cuda.synchronize()
    kernel = torch.autograd.DeviceType.CUDA
    events = profiler.key_averages()
    times = collections.Counter()  # of operations, on the device that computes
    kernels = collections.Counter()
    for event in events:
        on_device = event.self_device_time_total if bench.gpu else event.self_cpu_time_total
        (kernels if event.device_type == kernel else times)[event.key] += on_device / 1000
    total = sum(times.values()) or 1.0
    groups = {
        "convolution": "conv",
        "BatchNorm": "batch_norm",
        "pool": "pool",
        "copies": r"copy_|clone|aten::cat|contiguous|[Mm]emcpy|constant_pad",
        "optimizer": "adam|sgd",
    }
    shares = {
        group: f"{sum(t for name, t in times.items() if re.search(pattern, name)) / total:.1%}"
        for group, pattern in groups.items()
    }
    return {
        "clips": f"{list(batch['video'].shape)}, {dtype}",
        "operations, ms": total,
        "activations": dict(layouts),
        "not channels innermost": others,
        "shares of operations": shares,
        "top operations, ms": dict(times.most_common(10)),
        "top kernels, ms": dict(kernels.most_common(20)) if bench.gpu else NO_GPU,
    }


# --- 6. speed and memory --------------------------------------------------------------------------


def clip_options(frames: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(frames=frames, size=size, candidates=4)


def measure_speed(bench: Bench) -> dict[str, Any]:
    """Measure variants of the step by batch size, against the eager float32 step of this run."""
    model, fast = ways.new_model(), training_dtype("auto", bench.device)
    found = {}
    kinds, ends = [(4, 32)] if bench.quick else [(16, 224), (32, 200)], bench.ends
    for number, (frames, size) in enumerate(kinds):
        start_clock(bench, max(1.0, (ends - time.monotonic()) / (len(kinds) - number)))
        found[f"{frames}x{size}x{size}"] = measure_clip_size(bench, model, frames, size, fast)
    if bench.quick:
        found["16x224x224 and 32x200x200"] = "not measured: --quick" if bench.gpu else NO_GPU
    if not bench.gpu:
        found["GPU ms, host ms, peak MiB"] = NO_GPU
    return found


def measure_clip_size(
    bench: Bench, model: nn.Module, frames: int, size: int, fast: torch.dtype
) -> dict[str, Any]:
    """Measure all variants with clips of one size. The baseline comes first, --compile last.

    A variant differs from "as is" only as its name states.
    """
    options, baseline = clip_options(frames, size), []
    in_2d = s3dg.compute_in_2d(copy.deepcopy(model))

    def row(clips, dtype, *flags, micro_batches=1, benchmark=False, model=model):
        def measure():
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = benchmark
            try:
                _, step, _ = new_trainer(bench, model, dtype, *flags)
                batches = [ways.draw_batch(options, clips, bench.device)] * micro_batches
                measured = measure_step(bench, step, batches)
            finally:
                torch.backends.cudnn.benchmark = before
            if dtype == torch.float32:
                baseline.append(measured["clips/s"])
            return measured | {"of float32": measured["clips/s"] / max(baseline, default=math.nan)}

        return measure

    def largest(dtype, *flags):
        if bench.quick:
            return 2
        kind = bench_step.Row("training step", "", ways.our_step, dtype, flags)
        return bench_step.largest_batch(kind, model, options, bench.device)

    def find_largest():
        sparing = largest(fast, "--grad_checkpoint")
        return {"float32": largest(torch.float32), "as is": largest(fast), "sparing": sparing}

    rows = run_parts(bench, {"largest batches": find_largest})
    if "sparing" not in (found := rows["largest batches"]):
        return rows
    most, sparing = found["as is"], found["sparing"]
    sizes = [2**n for n in range(5, 12) if 2**n <= most] or [most]
    precise = sorted({min(32, found["float32"]), found["float32"]})
    plans = {f"float32, {clips} clips": row(clips, torch.float32) for clips in precise}
    plans |= {f"as is, {clips} clips": row(clips, fast) for clips in sizes}
    for clips in sorted({sizes[0], sizes[-1]}):
        plans |= {
            f"cudnn.benchmark, {clips} clips": bench.on_gpu(row(clips, fast, benchmark=True)),
            f"fp16, {clips} clips": bench.on_gpu(row(clips, torch.float16)),
            f"2D, {clips} clips": row(clips, fast, model=in_2d),
            f"2D, cudnn.benchmark, {clips} clips": bench.on_gpu(
                row(clips, fast, benchmark=True, model=in_2d)
            ),
        }
    count = 8192 // most if bench.gpu and not bench.quick else 2
    plans |= {
        f"--grad_checkpoint, {sparing} clips": row(sparing, fast, "--grad_checkpoint"),
        f"--accum_steps={count}, {most} clips each": row(most, fast, micro_batches=count),
        f"--compile, {most} clips": bench.on_gpu(row(most, fast, "--compile")),
    }
    return rows | run_parts(bench, plans)


def measure_step(bench: Bench, step: TrainingStep, batches: list[dict]) -> dict[str, Any]:
    """Measure a step: clips per second, memory, and the time of the GPU and of the host."""
    clips, repeats = sum(len(batch["video"]) for batch in batches), 5 if len(batches) == 1 else 1
    for _ in range(2 if len(batches) == 1 else 0):
        step(batches)
    step(batches[:2])  # now with the optimizer's state, and all that is chosen at first use
    if not bench.gpu:
        took = bench_step.seconds(lambda: step(batches), bench.device)
        return {"clips/s": clips / took, "step ms": took * 1000}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step(batches)
    host = time.perf_counter() - began  # the GPU was idle before
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run():
        start.record()
        for _ in range(repeats):
            step(batches)
        end.record()

    took = bench_step.seconds(run, bench.device) / repeats
    return {
        "clips/s": clips / took,
        "step ms": took * 1000,
        "GPU ms": start.elapsed_time(end) / repeats,
        "host ms": host * 1000,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
    }


# --- 7. feeding -----------------------------------------------------------------------------------


class FilledClips:
    """A data set whose items cost no more than filling their memory."""

    def __init__(self, item_spec: dict):
        self.item_spec = item_spec

    def __getitem__(self, key):
        return {
            name: torch.full(shape, key[1] % 100, dtype=dtype)
            for name, (shape, dtype) in self.item_spec.items()
        }


def make_toy(bench: Bench) -> list[str]:
    """Make a small training set, once, and return the flags that select it."""
    folder = bench.folder / "toy"
    if not folder.exists():
        for item in prepare.plan_training(folder, 1, 8 if bench.gpu else 2):
            prepare.make_video(1, folder, item)
        header, *names = (folder / "howto100m_videos.csv").read_text().splitlines(keepends=True)
        # An epoch ends with a checkpoint, so it must have more steps than a run here.
        (folder / "howto100m_videos.csv").write_text("".join([header, *names * 1000]))
        lines = [path.read_text() for path in (folder / "captions").glob("*.csv")]
        words = sorted(set(s3dg.tokenize(" ".join(lines))))
        np.save(folder / "dict.npy", np.array(words, dtype=np.str_))
        torch.save(torch.randn(len(words) + 1, s3dg.WORD_DIM), folder / "word2vec.pth")
    return [
        f"--train_csv={folder}/howto100m_videos.csv",
        f"--video_path={folder}/videos",
        f"--caption_root={folder}/captions",
        f"--word2vec_path={folder}/word2vec.pth",
        f"--token_to_word_path={folder}/dict.npy",
    ]


def measure_feeding(bench: Bench) -> dict[str, Any]:
    """Feed the step from workers that only fill memory, and from workers that decode toy videos."""
    frames, size, clips, steps = (4, 32, 4, 3) if bench.quick else (16, 224, 256, 10)
    flags = [f"--num_frames={frames}", f"--video_size={size}", *make_toy(bench)]
    flags += [f"--crop_only={int(not bench.quick)}"]
    args = get_args(argv=flags)
    dataset = training_set(args, s3dg.load_words(args.token_to_word_path))
    workers = min(2 if bench.quick else 32, len(os.sched_getaffinity(0)))
    filled = FilledClips(dataset.item_spec)
    _, step, _ = new_trainer(bench, ways.new_model(), training_dtype("auto", bench.device))

    def feed(source, take: Callable[[list], Any] | None) -> Callable[[], dict]:
        def run():
            return measure_feed(bench, source, len(dataset), clips, steps, workers, take)

        return run

    return {"clips": f"{clips} of {frames}x{size}x{size}", "workers": workers} | run_parts(
        bench,
        {
            "filling alone": feed(filled, None),
            "filling, with the step": feed(filled, step),
            "decoding alone": feed(dataset, None),
            "decoding, with the step": feed(dataset, step),
        },
    )


def measure_feed(
    bench: Bench, source, length: int, clips: int, steps: int, workers: int, take: Callable | None
) -> dict[str, Any]:
    """Measure the clips per second after the first batch, and the workers' CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    reading = training_batches(
        source,
        StepSampler(length, clips, steps),
        quarantined=set(),
        workers=workers,
        prefetch=3 * clips,
        timeout=60,
        pin_memory=bench.gpu,
    )
    bad, waited, began = 0, 0.0, 0.0
    with contextlib.closing(reading):
        for number in range(steps):
            requested = time.perf_counter()
            batch = next(reading)
            waited += time.perf_counter() - requested if number else 0.0
            bad += len(batch["bad"])
            if take:
                take([batch])
            if number == 0:
                if bench.gpu:
                    torch.cuda.synchronize()
                began = time.perf_counter()
        if bench.gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "clips/s": clips * (steps - 1) / took,
        "waiting ms per step": 1000 * waited / (steps - 1),
        "worker cores per 1,000 clips/s": 1000 * spent / (clips * steps),
        "replaced samples": bad,
        "passed": bad == 0,
    }


# --- 8. faults ------------------------------------------------------------------------------------


def check_faults(bench: Bench) -> dict[str, Any]:
    """Kill a worker, stop and resume a training, and let one run out of memory."""
    flags = ["--num_frames=4", "--video_size=32", "--crop_only=0", "--batch_size=2"]
    flags += ["--warmup_steps=2", "--num_thread_reader=2", "--n_display=1", "--epochs=100000"]
    flags += ["--prefetch=6"]
    flags += ["--nproc_per_node=1", "--checkpoint_every=0", "--checkpoint_dir=run", "--resume"]
    flags += ["--max_bad_fraction=1", f"--log_root={bench.folder}/log", *make_toy(bench)]
    flags += [f"--checkpoint_root={bench.folder}/checkpoint", f"--device={bench.device.type}"]
    return run_parts(
        bench,
        {
            "a worker killed, then SIGTERM": lambda: stop_training(bench, flags, kill=True),
            "resume": lambda: stop_training(bench, flags, kill=False),
            "out of memory": bench.on_gpu(lambda: exhaust_memory(bench, flags)),
        },
    )


def start_training(bench: Bench, script: list, flags: list[str]) -> subprocess.Popen:
    with open(bench.folder / "output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, *map(str, script), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )


def stop_training(bench: Bench, flags: list[str], kill: bool) -> dict[str, Any]:
    """Start or resume a training, kill a worker if `kill`, wait for steps, then send SIGTERM."""
    records, checkpoints = bench.folder / "log/run.jsonl", bench.folder / "checkpoint/run"

    def last_step() -> int:
        return max((r["step"] for r in read_records(records) if "loss" in r), default=0)

    def await_steps(count: int) -> int:
        goal = last_step() + count
        while last_step() < goal:
            if process.poll() is not None:
                raise RuntimeError(f"the training ended early: {last_line(bench)}")
            time.sleep(0.1)
        return last_step()

    before = last_step()
    process = start_training(bench, [ROOT / "main_distributed.py"], flags)
    try:
        reached = await_steps(1)
        if kill:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            workers = [pid for pid in map(int, children.split()) if is_python(pid)]
            os.kill(workers[0], signal.SIGKILL)
            reached = await_steps(4)  # three batches are read ahead
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    saved = [step for (_, step), _ in list_checkpoints(checkpoints)]
    logged = [r for r in read_records(records) if "loss" in r]
    steps = [r["step"] for r in logged]
    # The new worker was forked after the clips' memory had been page-locked. If it cannot write
    # there, its samples are replaced.
    replaced = logged[-1]["bad_samples"]
    return {
        "exit status": status,
        "steps": f"{before + 1} to {steps[-1]}",
        "replaced samples": replaced,
        "checkpoint of step": saved[-1] if saved else None,
        "passed": status == os.EX_TEMPFAIL
        and saved[-1:] == [steps[-1]]
        and steps == list(range(1, steps[-1] + 1))
        and steps[-1] >= reached
        and replaced == 0,
    }


def is_python(pid: int) -> bool:
    """Check whether a child is a data worker: a fork of this interpreter."""
    return Path(f"/proc/{pid}/exe").resolve() == Path(sys.executable).resolve()


def last_line(bench: Bench) -> str:
    return ((bench.folder / "output.txt").read_text().strip().splitlines() or ["no output"])[-1]


def exhaust_memory(bench: Bench, flags: list[str]) -> dict[str, Any]:
    """Train in 64 MiB of the GPU's memory, too little for the model and Adam's state."""
    share = 2**26 / torch.cuda.get_device_properties(bench.device).total_memory
    script = (
        "import runpy, sys, torch; "
        f"torch.cuda.set_per_process_memory_fraction({share}); "
        f"sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_path({str(ROOT / 'main_distributed.py')!r}, run_name='__main__')"
    )
    process = start_training(bench, ["-c", script], [*flags, "--checkpoint_dir=memory"])
    try:
        status = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    named = "out of memory" in (bench.folder / "output.txt").read_text()
    return {
        "exit status": status,
        "last line": last_line(bench)[:200],
        "passed": status == 1 and named,
    }


# --- 9. NCCL --------------------------------------------------------------------------------------


def check_nccl(bench: Bench) -> dict[str, Any]:
    """Compare DistributedDataParallel in a group of one rank with the step without it."""
    backend = "nccl" if bench.gpu else "gloo"
    return run_parts(
        bench,
        {"nccl": NO_GPU} | {backend: lambda: compare_with_group(bench, backend)},
    )


def compare_with_group(bench: Bench, backend: str) -> dict[str, Any]:
    """Compare a step in float64 with and without a process group."""
    model, batch = ways.new_model().double(), bench.draw(2)
    exact = gradients(bench, model, batch)
    network, step, _ = new_trainer(bench, model, torch.float32)
    store = f"file://{bench.folder}/store"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        joined = TrainingStep(distribute(network, bench.device), step.optimizer, torch.float32)
        joined.prime_ddp_buckets(batch)
        found = bench_step.numbers(lambda: ways.compute_gradients(network, joined, [batch]))
        total = torch.ones(2**20, device=bench.device)
        dist.all_reduce(total)
        compared = within(bench_step.distance(found, exact), 1e-9)
        intact = bool((total == 1).all())
        return compared | {"all_reduce": intact, "passed": compared["passed"] and intact}
    finally:
        dist.destroy_process_group()


# --- the report -----------------------------------------------------------------------------------


class Section(NamedTuple):
    title: str
    run: Callable[[Bench], dict[str, Any]]
    seconds: int
    needs_gpu: bool = False


SECTIONS = {
    1: Section("versions and bandwidth", report_machine, 10),
    2: Section("layers, 3D against 2D", measure_layers, 100),
    3: Section("the step", check_step, 100),
    4: Section("a step without a device sync", check_syncs, 15, needs_gpu=True),
    5: Section("layouts and kernels", profile_step, 20),
    6: Section("speed and memory", measure_speed, 160),
    7: Section("feeding", measure_feeding, 40),
    8: Section("faults", check_faults, 120),
    9: Section("NCCL at world size 1", check_nccl, 15),
}


def run_section(bench: Bench, section: Section) -> dict[str, Any]:
    """Run a section within its time: {"status", "seconds", "result" or "reason"}."""
    if section.needs_gpu and not bench.gpu:
        return {"status": NO_GPU, "seconds": 0.0}
    began = time.monotonic()
    try:
        start_clock(bench, section.seconds)
        result = section.run(bench)
        outcome = {"status": "failed" if has_failed(result) else "passed", "result": result}
    except OutOfTime:
        outcome = {"status": NO_TIME}
    except Exception as error:
        outcome = {"status": "failed", "reason": describe(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        release_memory()
    return outcome | {"seconds": time.monotonic() - began}


def has_failed(result: Any) -> bool:
    """Check whether a part, at any depth, has "passed": False."""
    if not isinstance(result, dict):
        return False
    return result.get("passed") is False or any(map(has_failed, result.values()))


def lines_of(result: dict[str, Any], indent: str = "  ") -> list[str]:
    """Format a section's result, one line for each value or innermost dict."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            lines += [f"{indent}{name}", *lines_of(value, indent + "  ")]
        elif isinstance(value, dict):
            words = (f"{key} {format_value(v)}" for key, v in value.items() if key != "passed")
            verdict = {True: "ok: ", False: "FAILED: "}.get(value.get("passed"), "")
            lines.append(f"{indent}{name}: {verdict}{', '.join(words)}".rstrip(": "))
        else:
            lines.append(f"{indent}{name}: {format_value(value)}")
    return lines


def format_value(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(format_value, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("log/gpu_selftest.json"))
    parser.add_argument("--quick", action="store_true", help="small; the default without a GPU")
    parser.add_argument("--sections", type=positive(int), nargs="+", choices=SECTIONS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    with input_error("--device"):
        device = pick_device(options.device)
    make_folder(options.out.parent, "out")
    chosen = {number: SECTIONS[number] for number in options.sections or SECTIONS}
    report: dict[str, Any] = {"device": str(device), "sections": {}}
    # End the process if it hangs in code that Python cannot interrupt.
    faulthandler.dump_traceback_later(sum(s.seconds for s in chosen.values()) + 15, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, options.quick or device.type == "cpu", Path(folder))
        report["quick"] = bench.quick
        for number, section in chosen.items():
            outcome = {"title": section.title, **run_section(bench, section)}
            report["sections"][str(number)] = outcome
            reason = f": {outcome['reason']}" if "reason" in outcome else ""
            print(f"\n{number}. {section.title}: {outcome['status']}{reason}", end=" ")
            print(f"({outcome['seconds']:.1f} s)")
            print("\n".join(lines_of(outcome.get("result", {}))), flush=True)
            with atomic_write(options.out) as file:
                file.write(json.dumps(report, indent=1).encode())
    failed = [n for n, outcome in report["sections"].items() if outcome["status"] == "failed"]
    print(f"\nfailed sections: {', '.join(failed) or 'none'}; numbers in {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_script(main)
