"""Measure the forward pass, training step and evaluation: the release's way and ours, in one run.

    python benchmarks/bench_step.py                         # about six minutes on two cores
    python benchmarks/bench_step.py --size 224              # on a GPU: the largest batch that fits
    python benchmarks/bench_step.py --frames 32 --size 200
    python benchmarks/bench_step.py --profile               # only profile our step
    python benchmarks/bench_step.py --effective 8192        # only measure a step of that many clips

ways.py describes the plain way, which is the release's, and ours. Each round runs every way once,
on a new copy of the model, so that noise affects all of them; a time is the fastest pass of all
rounds. On a GPU, each way gets the largest power of two of clips that fits in memory and in tensors
of 2^31 elements. There PyTorch's default lets float32 convolutions use TF32, and cuDNN tries its
algorithms, in both ways. The row "2D" has the layers of s3dg.compute_in_2d, which no script uses.

    of the peak    floating-point operations of the plain model per second (convolutions and matrix
                   products, without the recomputation of --grad_checkpoint and --accum_steps) over
                   those of a large matrix product in the way's type, measured in this run (TF32 for
                   float32 on a GPU)
    MiB            peak memory less weights and batch, over two passes; on a CPU, of the resident
                   set of a new process
    apart          |a - b| / |b| over all embeddings, or over all gradients of a step, where b is
                   the plain way in float64. Because of BatchNorm, a new model amplifies rounding,
                   above all in its gradient: compare with the plain way's own distance. Empty for
                   --accum_steps, which normalizes smaller batches.
"""

import argparse
import copy
import gc
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_decode import processor
from bench_loss import resident, run_isolated
from torch.utils.flop_counter import FlopCounterMode
from ways import (
    draw_batch,
    new_model,
    our_evaluation,
    our_forward,
    our_step,
    our_step_in_2d,
    plain_copy,
    plain_evaluation,
    plain_forward,
    plain_step,
    settle_averages,
)

from s3dg import to_unit_range

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from distributed.device import BF16_UNITS, cpu_flags, training_dtype


class Row(NamedTuple):
    """A row of a table: a way, a function of ways.py, with its type and flags."""

    table: str
    name: str
    way: Callable
    dtype: torch.dtype = torch.float32
    flags: tuple = ()


def list_rows(short, compiled):
    """List all rows. The plain way is first in its table; rows with flags follow the one without.

    short: the type of mixed precision. compiled: add a row with --compile.
    """
    named = f"ours, {str(short).removeprefix('torch.')}"
    rows = []
    for table, plain, ours in (
        ("forward", plain_forward, our_forward),
        ("training step", plain_step, our_step),
        ("evaluation", plain_evaluation, our_evaluation),
    ):
        rows += [Row(table, "plain", plain), Row(table, "ours, float32", ours)]
        if short != torch.float32:
            rows.append(Row(table, named, ours, short))
        if ours is our_step:
            flags = ["--grad_checkpoint", "--accum_steps=4", *["--compile"] * compiled]
            rows += [Row(table, f"{named}, {flag}", ours, short, (flag,)) for flag in flags]
            rows.append(Row(table, f"{named}, 2D", our_step_in_2d, short))
    return rows


# --- measuring -----------------------------------------------------------------------------------


def prepare_pass(row, model, options, clips, device):
    """Free the other rows' GPU memory. Return a function that runs the row's pass."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row.way(model, draw_batch(options, clips, device), device, row.dtype, *row.flags)


def seconds(run, device):
    """Return how long run() takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_peak(row, options, clips, device):
    """Run two passes: peak MiB in addition to weights and batch, and seconds of the second pass.

    On a CPU, measures in a new process.
    """
    if device.type == "cuda":
        return peak(row, options, clips, device)
    return run_isolated(peak, row, options, clips, device)


def peak(row, options, clips, device):
    """Measure in this process, see measure_peak."""
    run = prepare_pass(row, new_model(), options, clips, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
    run()
    took = seconds(run, device)
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20, took
    return resident("VmHWM") - before, took


def largest_batch(row, model, options, device):
    """Return the largest power of two of clips that fits on the GPU."""
    first_layer = 64 * math.ceil(options.frames / 2) * math.ceil(options.size / 2) ** 2
    clips = 2
    while 2 * clips * first_layer < 2**31 and fits(row, model, options, 2 * clips, device):
        clips *= 2
    return clips


def fits(row, model, options, clips, device):
    try:
        run = prepare_pass(row, model, options, clips, device)
        run(), run()  # the second also has the optimizer's state
    except torch.OutOfMemoryError:
        return False
    return True


def matmul_rate(dtype, device, size):
    """Return the floating-point operations per second of a square matrix product."""
    matrix = torch.randn(size, size, device=device).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    fastest = min(seconds(lambda: matrix @ matrix, device) for _ in range(3))
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / fastest


def count_operations(model, options, device):
    """Count the floating-point operations per clip: {table: operations}."""
    plain, batch = plain_copy(model, device), draw_batch(options, 2, device)
    video, text = to_unit_range(batch["video"].to(device)), batch["text"].to(device)
    with FlopCounterMode(display=False) as counter:
        embedding = plain(video, mode="video")
        forward = counter.get_total_flops() / 2
        (embedding.sum() + plain(None, text.flatten(0, -2), mode="text").sum()).backward()
    step = counter.get_total_flops() / 2
    return {"forward": forward, "training step": step, "evaluation": forward}


def differences(rows, model, options, clips, device):
    """Compare each row's first pass with the plain way's in float64: {row: |a - b| / |b|}.

    Also returns that of our step in float64, in which rounding cannot hide other differences.
    """
    precise, found = copy.deepcopy(model).double(), {}
    for row in rows:
        if row.name == "plain":
            exact = numbers(prepare_pass(row, precise, options, clips, device))
        found[row] = distance(numbers(prepare_pass(row, model, options, clips, device)), exact)
        if row.way is plain_step:
            ours = row._replace(way=our_step)
            ours_in_float64 = distance(
                numbers(prepare_pass(ours, precise, options, clips, device)), exact
            )
    return found, ours_in_float64


def numbers(run):
    """Return the tensors of a pass as one vector in float64."""
    return torch.cat([tensor.detach().double().flatten().cpu() for tensor in run()])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def compare(options, rows, device):
    """Print all tables."""
    model = new_model()
    settle_averages(model, draw_batch(options, 8, torch.device("cpu")))
    clips = {}
    for row in rows:
        if options.batch or device.type == "cpu":
            clips[row] = options.batch or 8
        elif row.flags:
            clips[row] = clips[row._replace(name=row.name.rsplit(", ", 1)[0], flags=())]
        else:
            clips[row] = largest_batch(row, model, options, device)
    operations = count_operations(model, options, device)
    differs, exactly = differences(rows, model, options, min(clips.values()), device)
    memory = {row: measure_peak(row, options, clips[row], device)[0] for row in rows}

    times = dict.fromkeys(rows, math.inf)
    rates = dict.fromkeys((row.dtype for row in rows), 0.0)
    for _ in range(options.rounds):
        for dtype in rates:
            size = 8192 if device.type == "cuda" else 2048
            rates[dtype] = max(rates[dtype], matmul_rate(dtype, device, size))
        for row in rows:
            run = prepare_pass(row, model, options, clips[row], device)
            run()  # caches, algorithms, the optimizer's state
            times[row] = min(times[row], *(seconds(run, device) for _ in range(2)))

    shown = (f"{str(t).removeprefix('torch.')} {r / 1e12:.2f} TFLOP/s" for t, r in rates.items())
    print(f"matrix product: {', '.join(shown)}")
    print(f"gradients of our step, all in float64: {exactly:.1e} apart from the plain way's")
    for row in rows:
        speed, needed = clips[row] / times[row], operations[row.table]
        if row.name == "plain":
            first = speed
            print(f"\n{row.table}: {needed / 1e9:.1f} GFLOP per clip\n")
            print("| way | clips | seconds | clips/s | ratio | of the peak | MiB | apart |")
            print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        other_batches = any("accum" in flag for flag in row.flags)
        print(
            f"| {row.name} | {clips[row]} | {times[row]:.3f} | {speed:.1f} | {speed / first:.2f}x "
            f"| {speed * needed / rates[row.dtype]:.0%} | {memory[row]:.0f} "
            f"| {'' if other_batches else format(differs[row], '.1e')} |"
        )


def profile(options, row, device):
    """Print the operations of a pass that take the most time."""
    clips = options.batch or 8
    run = prepare_pass(row, new_model(), options, clips, device)
    run()
    with torch.profiler.profile() as profiler:
        run()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{row.table}: {row.name}, {clips} clips\n")
    print(profiler.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=50))


def measure_effective(options, row, device):
    """Print memory and time of a step of --effective clips, and of one of its micro-batches."""
    small = options.batch or 8
    if options.effective % small:
        sys.exit(f"--effective {options.effective} is not a multiple of --batch {small}")
    whole = row._replace(flags=(f"--accum_steps={options.effective // small}",))
    print(f"{row.table}: {row.name}\n\n| clips of a step | --accum_steps | MiB | seconds |")
    print("| --- | --- | --- | --- |")
    for each, clips in ((row, small), (whole, options.effective)):
        memory, took = measure_peak(each, options, clips, device)
        print(f"| {clips} | {clips // small} | {memory:.0f} | {took:.2f} |")


def print_header(device, short):
    """Print the processor and the versions."""
    units = sorted(cpu_flags() & BF16_UNITS)
    print(
        f"{processor()} ({', '.join(units) or 'no bf16'}), {torch.get_num_threads()} threads; "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.version()
        print(f"{torch.cuda.get_device_name()}; CUDA {torch.version.cuda}, cuDNN {cudnn}")
    print(f"--amp auto trains in {str(short).removeprefix('torch.')}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, help="clips (CPU: 8; GPU: the most that fit)")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--candidates", type=int, default=4, help="captions per clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="add a step with --compile")
    parser.add_argument("--profile", action="store_true", help="only profile our step")
    parser.add_argument("--effective", type=int, help="only measure one step of that many clips")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    short = training_dtype("auto", device)
    print_header(device, short)
    print(f"clips of {options.frames}x{options.size}x{options.size}, {options.candidates} captions")
    rows = list_rows(short, options.compile)
    training = next(r for r in rows if r.way is our_step and r.dtype == short)
    if options.profile:
        profile(options, training, device)
    elif options.effective:
        measure_effective(options, training, device)
    else:
        compare(options, rows, device)


if __name__ == "__main__":
    main()
