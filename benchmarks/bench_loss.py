"""Measure the loss on one rank: peak memory and time, the dense way and ours, in one run.

    python benchmarks/bench_loss.py            # a minute and a half, 13 GiB

Forward and backward in float32 on the CPU, as one of 64 ranks sees a batch of 8192 videos:

    dense     the public release's way: every rank computes the whole B x B*K with autograd. The
              positives are read from its diagonal; the release multiplies all of it by an identity.
    ours      loss.MILNCELoss: own videos against all texts, all videos against own texts

One process acts as one rank, without a process group. The union of the ranks' embeddings is drawn
beforehand, and in both ways the gather is replaced by a function that returns a new copy of it. In
ours, the gather of the backward pass is also replaced: it returns the dense way's denominators as
those of the other ranks. The gradient of the rank's own embeddings must then equal the dense way's.
The last line prints their difference.

Each way runs in a new process. Its memory is the peak of its resident set (VmHWM of /proc, which
unlike ru_maxrss does not include the parent's) less the resident set before the loss. This counts
the gathered copies, all scores and temporaries, and all gradients. It does not count Python, torch
(warmed up with a tiny loss), the rank's own embeddings and the prepared union. In both processes
glibc releases freed blocks of 1 MiB and more immediately. By default it keeps those below 32 MiB,
which are most of ours and none of the dense way's, so the peak would depend on how they fit. Time
is the wall time of the fastest step.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from bench_decode import processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import loss


def draw_union(batch, candidates, dim):
    """Draw videos [B, D] and texts [B*K, D], scores of variance 1, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    sizes = (batch, dim), (batch * candidates, dim)
    return [torch.randn(size, generator=generator).mul_(dim**-0.25) for size in sizes]


def take_share(union, ranks):
    """Copy the first rank's own embeddings."""
    return [tensor[: len(tensor) // ranks].clone().requires_grad_() for tensor in union]


# --- ways: (union, own embeddings [b, D] and [b*K, D], denominators) -> denominators [B] ---------
# Both write the gradient of the loss of the union batch to own.grad.


def dense_loss(videos, texts):
    """Compute the loss of [B, D] and [B*K, D] from the whole B x B*K, and its denominators [B]."""
    batch = len(videos)
    scores = (videos @ texts.t()).view(batch, batch, -1)
    positives = scores.diagonal().t().logsumexp(1)
    everything = torch.cat((scores, scores.transpose(0, 1)), dim=1).view(batch, -1)
    denominators = everything.logsumexp(1)
    return (denominators - positives).mean(), denominators


def dense(union, own, _):
    gathered = [tensor.clone().requires_grad_() for tensor in union]
    value, denominators = dense_loss(*gathered)
    value.backward()
    for tensor, whole in zip(own, gathered, strict=True):
        tensor.grad = whole.grad[: len(tensor)].clone()
    return denominators.detach()


def ours(union, own, denominators):
    ranks = len(union[0]) // len(own[0])
    arriving = torch.full_like(denominators, 1 / len(own[0]))
    gathered = iter([*union, torch.stack((arriving, denominators), 1)])  # in the order of the calls
    loss.all_gather_batch = lambda local: next(gathered).clone()
    loss.MILNCELoss()(*own).backward()
    for tensor in own:
        tensor.grad /= ranks  # as DistributedDataParallel does
    return denominators


# --- measuring ----------------------------------------------------------------------------------


def resident(field):
    """Return a field of /proc in MiB: VmRSS, the resident set, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(way, sizes, ranks, steps, denominators):
    """Return MiB, seconds and, as arrays for the comparison, own gradients and denominators."""
    tiny = draw_union(4, 2, 8)
    way(tiny, take_share(tiny, 2), torch.ones(4))
    union = draw_union(*sizes)
    own = take_share(union, ranks)
    denominators = None if denominators is None else torch.from_numpy(denominators)
    before, seconds = resident("VmRSS"), []
    for _ in range(steps):
        began = time.perf_counter()
        result = way(union, own, denominators)
        seconds.append(time.perf_counter() - began)
        gradients = torch.cat([tensor.grad for tensor in own])
        for tensor in own:
            tensor.grad = None
    return resident("VmHWM") - before, min(seconds), gradients.numpy(), result.numpy()


def run_isolated(function, *arguments):
    """Return the result of a function in a new process, which releases freed memory immediately."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # glibc reads it when a process starts
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8192, help="videos of all ranks (B)")
    parser.add_argument("--candidates", type=int, default=5, help="texts per video (K)")
    parser.add_argument("--dim", type=int, default=512, help="of the embeddings (D)")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    sizes = options.batch, options.candidates, options.dim
    if options.batch % options.ranks:
        parser.error("the ranks must divide the batch")

    print(f"{processor()}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    print(f"B={sizes[0]}, K={sizes[1]}, D={sizes[2]}, one of {options.ranks} ranks, float32\n")
    arguments = sizes, options.ranks, options.steps
    theirs, their_time, their_gradient, denominators = run_isolated(
        measure, dense, *arguments, None
    )
    memory, seconds, gradient, _ = run_isolated(measure, ours, *arguments, denominators)
    difference = abs(gradient - their_gradient).max() / abs(their_gradient).max()
    print("| loss | peak MiB | seconds |\n| --- | --- | --- |")
    print(f"| dense | {theirs:.1f} | {their_time:.3f} |")
    print(f"| ours | {memory:.1f} | {seconds:.3f} |")
    print(f"\nratio: memory {theirs / memory:.1f}x, time {their_time / seconds:.1f}x")
    print(f"gradients: at most {difference:.1e} of the largest apart")


if __name__ == "__main__":
    main()
