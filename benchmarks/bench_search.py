"""Measure a query: video_search.index.best_moments against a plain product and sort.

    python benchmarks/bench_search.py          # a million windows of 512 numbers: 2 GB of disk

Makes an index of random embeddings in a temporary folder (TMPDIR): windows of 3.2 seconds every
1.6 seconds, 500 per video. Each way runs in a new process, which first loads the index or the
array:

    plain     numpy.load, all scores, numpy.argsort of them, the first 24 windows: they may overlap
    ours      read_index, which maps the file, and best_moments: 24 moments that do not overlap

The first query is cold for the process only: most of the file, which has just been written, is
still in the page cache. The later queries are warm. Memory is the peak of the resident set (VmHWM)
less the resident set before loading. The last column is the part of the resident set that consists
of pages of files, libraries included (RssFile), which the system may evict. At the end the moments
are compared with those of the sorted scores.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bench_decode import processor
from bench_loss import resident

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from video_search.index import (
    IndexMetadata,
    Video,
    best_moments,
    read_index,
    write_index,
)

COUNT = 24  # moments, as on the page
WINDOWS_PER_VIDEO = 500
STRIDE = 1.6  # seconds
METADATA = IndexMetadata("/", {"num_frames": 16, "fps": 5}, "", "")


def make(folder, windows, dim):
    """Write folder/index and folder/array.npy of the same embeddings."""
    array = np.lib.format.open_memmap(folder / "array.npy", "w+", np.float32, (windows, dim))
    generator = np.random.default_rng(1)
    videos = []
    for begin in range(0, windows, WINDOWS_PER_VIDEO):
        part = array[begin : begin + WINDOWS_PER_VIDEO]
        part[:] = generator.standard_normal(part.shape, np.float32)
        starts = torch.arange(len(part)).double() * STRIDE
        videos.append(Video(f"{begin:09d}.mp4", 0, 0, "", starts, torch.from_numpy(part)))
    write_index(folder / "index", METADATA, videos)


def draw_queries(dim, count):
    return np.random.default_rng(2).standard_normal((count, dim), np.float32)


# --- ways: folder -> a function from a query to rows, best first ---------------------------------


def plain(folder):
    array = np.load(folder / "array.npy")
    return lambda query: np.argsort(-(array @ query))[:COUNT].tolist()


def ours(folder):
    index = read_index(folder / "index")
    return lambda query: [
        found.row for found in best_moments(index, torch.from_numpy(query), COUNT)
    ]


def measure(way, folder, queries):
    """Return the seconds to load and per query, MiB of memory and of files, and rows per query."""
    before, began = resident("VmRSS"), time.perf_counter()
    search = way(folder)
    load, seconds, rows = time.perf_counter() - began, [], []
    for query in queries:
        began = time.perf_counter()
        rows.append(search(query))
        seconds.append(time.perf_counter() - began)
    return load, seconds, resident("VmHWM") - before, resident("RssFile"), rows


def expected(folder, query):
    """Return the rows that best_moments must find, from all scores in order."""
    length = METADATA.window_seconds
    scores = np.load(folder / "array.npy", mmap_mode="r") @ query
    found = []
    for row in np.argsort(-scores, kind="stable")[: 100 * COUNT].tolist():
        near = (
            abs(row - other) * STRIDE < length - 1e-6
            for other in found
            if row // WINDOWS_PER_VIDEO == other // WINDOWS_PER_VIDEO
        )
        if not any(near):
            found.append(row)
    return found[:COUNT]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512, help="of the embeddings")
    parser.add_argument("--queries", type=int, default=20)
    options = parser.parse_args()
    print(
        f"{processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}; torch "
        f"{torch.__version__}\n{options.windows:,} windows x {options.dim} float32\n"
    )
    queries = draw_queries(options.dim, options.queries)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder, options.windows, options.dim)
        print("| way | load s | first query s | median s | slowest s | MiB | of files |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for way in (plain, ours):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                load, (cold, *warm), memory, files, rows = pool.submit(
                    measure, way, folder, queries
                ).result()
            print(
                f"| {way.__name__} | {load:.3f} | {cold:.3f} | {statistics.median(warm):.3f} | "
                f"{max(warm):.3f} | {memory:.0f} | {files:.0f} |"
            )
        wrong = sum(rows[k] != expected(folder, query) for k, query in enumerate(queries))
        print(f"\nours: {wrong} of {len(queries)} queries have other moments than sorted scores")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
