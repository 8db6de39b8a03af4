"""Measure how fast the main process collects clips from its data workers, lent and copied.

    python benchmarks/bench_feed.py                       # about two minutes
    python benchmarks/bench_feed.py --size 112 --rounds 5
    python benchmarks/bench_feed.py --quick               # seconds, with rough results

The workers of workers.sample_batches only copy a clip into the shared memory. The main process
takes the batches:

    collecting    clips of a few bytes: the cost of a clip of any size
    lent          as in training: a batch stays where the workers wrote it, and its memory is reused
                  when the batch is dropped
    copied        as before that: each batch is copied out of the shared memory

The ways take turns. "CPU us per clip" is the CPU time of the main process, all its threads, in the
best of the rounds; "clips/s on one core" is the rate that it allows if the workers have their own
cores. "clips/s" is the rate reached here, where they share the machine's cores: with big clips, the
rate at which the workers fill memory. With --pin the batches are page-locked; that needs a GPU.
"""

import argparse
import os
import sys
import time
from collections import deque
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from bench_decode import processor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import positive
from distributed.workers import sample_batches


class ReadyClips:
    """A data set whose items are ready: a worker only copies them into the shared memory."""

    def __init__(self, frames, size):
        self.item_spec = {
            "video": ((3, frames, size, size), torch.uint8),
            "text": ((4, 20), torch.int64),
        }
        self.item = {
            name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in self.item_spec.items()
        }

    def __getitem__(self, key):
        return self.item


class Way(NamedTuple):
    name: str
    frames: int
    size: int
    copied: bool


class Collected(NamedTuple):
    """The cost of a clip: wall seconds, and CPU seconds of the main process."""

    seconds: float
    cpu: float


def collect(way, workers, clips, options):
    """Collect this many clips, or a few more, in batches.

    The first batches, which touch the memory, are not counted, nor is the end, which frees it.
    """
    number, unmeasured = -(-clips // options.batch), 6
    keys = ([(epoch, index) for index in range(options.batch)] for epoch in count())
    batches = sample_batches(
        ReadyClips(way.frames, way.size),
        keys,
        workers=workers,
        timeout=60,
        prefetch=3 * options.batch,
        pin_memory=options.pin,
    )
    with closing(batches):
        deque(islice(batches, unmeasured), maxlen=0)  # drops them at once
        began, spent = time.perf_counter(), time.process_time()
        for batch in islice(batches, number):
            if way.copied:
                for name in ("video", "text"):
                    batch[name] = copy(batch[name], options.pin)
        return Collected(
            (time.perf_counter() - began) / (number * options.batch),
            (time.process_time() - spent) / (number * options.batch),
        )


def copy(tensor, pin):
    return torch.empty_like(tensor, pin_memory=pin).copy_(tensor)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=positive(int), nargs="+", default=[4, 8, 16, 40])
    add("--batch", type=positive(int), default=64)
    add("--frames", type=positive(int), default=16)
    add("--size", type=positive(int), default=224)
    add("--clips", type=positive(int), default=1500, help="per round; 20 times as many tiny ones")
    add("--rounds", type=positive(int), default=3)
    add("--pin", action="store_true", help="page-lock the batches: needs a GPU")
    add("--quick", action="store_true", help="few workers, clips and rounds")
    options = parser.parse_args()
    if options.quick:
        options.workers, options.batch, options.size = [2], 8, 32
        options.clips, options.rounds = 40, 1
    clip = f"{options.frames}x{options.size}x{options.size}"
    ways = (
        Way("collecting", 1, 1, False),
        Way(f"{clip}, lent", options.frames, options.size, False),
        Way(f"{clip}, copied", options.frames, options.size, True),
    )
    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| way | workers | CPU us per clip | clips/s on one core | clips/s |")
    print("| --- | --- | --- | --- | --- |")
    for workers in options.workers:
        rounds = [
            [
                collect(way, workers, options.clips * (20 if way.size == 1 else 1), options)
                for way in ways
            ]
            for _ in range(options.rounds)
        ]
        for way, found in zip(ways, zip(*rounds, strict=True), strict=True):
            seconds, cpu = (min(values) for values in zip(*found, strict=True))
            print(f"| {way.name} | {workers} | {cpu * 1e6:.1f} | {1 / cpu:,.0f} ", end="")
            print(f"| {1 / seconds:,.0f} |", flush=True)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
