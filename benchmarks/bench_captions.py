"""Measure reading captions, from a folder of CSV files and from a caption store.

    python benchmarks/bench_captions.py                   # some minutes, 5 GB of disk
    python benchmarks/bench_captions.py --videos 500      # half a minute, with rough results

Makes captions of 100,000 videos, 100 each, as CSV files and as one JSON file, packs both with
data/howto100m/prepare.py, and reads the captions of random videos, as training does:

    folder    captions.readers.CaptionFolder: one CSV file per video
    store     captions.readers.CaptionStore: all captions in memory-mapped arrays

One process reads the same videos from both. "Warm" is CPU time with the files in the page cache.
"Cold" is wall time after they were dropped from it. The file system's own tables stay cached, so a
folder of a million files on a network file system is slower. "CPU ms per item" is the cost of an
item of video_loader.HowTo100M: captions, words and a decoded clip of 16 x 224 x 224. All videos are
links to one of 340x256, 25 frames/s, GOP 250. Memory is the growth of Private_Dirty of /proc,
summed over the workers of workers.sample_batches, as they read random videos. It excludes the pages
of the store's and the folder's files, which the page cache has once and releases when memory is
short. The last line reports for how many of a thousand videos the captions are the same in the
folder and in both stores.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from bench_decode import cpu_seconds, encode, processor
from bench_loss import resident

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "howto100m")]
import prepare  # noqa: E402

from captions.readers import open_captions  # noqa: E402
from distributed.workers import sample_batches  # noqa: E402
from s3dg import Tokenizer  # noqa: E402
from video_loader import TRAINING_WORDS, HowTo100M, read_video_list  # noqa: E402

WORDS = [f"word{i}" for i in range(2000)]


# --- the set ------------------------------------------------------------------------------------


def make_set(root, videos, captions):
    """Write captions of ten words and four seconds, as `csv/xx/video....csv` and `all.json`."""
    rng = np.random.default_rng(1)
    sentences = [" ".join(WORDS[i] for i in rng.integers(len(WORDS), size=10)) for _ in range(9999)]
    names = [f"{i % 100:02d}/video{i:07d}" for i in range(videos)]
    for folder in {name.partition("/")[0] for name in names}:
        (root / "csv" / folder).mkdir(parents=True)
    with open(root / "all.json", "w") as file:
        for place, name in enumerate(names):
            starts = np.round(3 * np.arange(captions) + rng.random(captions), 2).tolist()
            ends = [round(start + 4, 2) for start in starts]
            texts = [sentences[i] for i in rng.integers(len(sentences), size=captions)]
            rows = (f"{s},{e},{t}\n" for s, e, t in zip(starts, ends, texts, strict=True))
            (root / "csv" / f"{name}.csv").write_text("start,end,text\n" + "".join(rows))
            file.write(f"{', ' if place else '{'}{json.dumps(name.partition('/')[2])}: ")
            json.dump({"start": starts, "end": ends, "text": texts}, file)
        file.write("}\n")
    return names


def pack(source, out):
    """Pack, and return wall and CPU seconds and the peak MiB of this process, without readers."""
    began, spent = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.main(["pack", "--caption_root", str(source), "--out", str(out)])
    return time.perf_counter() - began, cpu_seconds() - spent, resident("VmHWM")


def run_in_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def list_files(root):
    return [path for path in (root, *root.rglob("*")) if path.is_file()]


def disk_usage(root):
    return sum(path.stat().st_blocks * 512 for path in list_files(root)) / 1e6


# --- reading ------------------------------------------------------------------------------------


def drop_cache(root):
    """Drop the files from the page cache."""
    os.sync()
    for path in list_files(root):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(root, names):
    """Read these videos: milliseconds to open, wall and CPU milliseconds per video, open files."""
    files = len(os.listdir("/proc/self/fd"))
    began = time.perf_counter()
    captions = open_captions(root)
    opened = time.perf_counter(), time.process_time()
    for name in names:
        captions.read(f"{name}.mp4")
    read = time.perf_counter(), time.process_time()
    files = len(os.listdir("/proc/self/fd")) - files
    each = [(end - start) / len(names) * 1000 for start, end in zip(opened, read, strict=True)]
    return (opened[0] - began) * 1000, *each, files


class Reader:
    """A data set whose items read a part of the videos and contain the memory before and after."""

    def __init__(self, root, parts):
        self.captions, self.parts = open_captions(root), parts
        self.item_spec = {"bytes": ((2,), torch.int64)}

    def __getitem__(self, key):
        self.captions.read(self.parts[key][0])  # imports, and allocations that are made once
        before = private_memory()
        for name in self.parts[key]:
            self.captions.read(name)
        return {"bytes": torch.tensor([before, private_memory()])}


def private_memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def workers_memory(root, names, workers):
    """Return the memory growth in MB, summed over the workers, as they read these videos."""
    parts = [[f"{name}.mp4" for name in names[rank::workers]] for rank in range(workers)]
    reader = Reader(root, parts)
    [batch] = sample_batches(reader, [list(range(workers))], workers=workers, timeout=600)
    assert batch["errors"] == [None] * workers
    return (batch["bytes"][:, 1] - batch["bytes"][:, 0]).sum().item() / 1e6


def whole_items(roots, names, folder):
    """Return the CPU milliseconds per item of the training set for each source, in turns."""
    torch.set_num_threads(1)
    words = Tokenizer(WORDS, TRAINING_WORDS)
    videos = read_video_list(folder / "list.csv"), folder / "videos"
    sets = {
        way: HowTo100M(*videos, open_captions(root), words, num_candidates=4)
        for way, root in roots.items()
    }
    for data in sets.values():
        data[1, 0]  # imports, and allocations that are made once
    spent = dict.fromkeys(sets, 0.0)
    for index in range(len(names)):
        for way, data in sets.items():
            began = time.process_time()
            item = data[0, index]
            spent[way] += time.process_time() - began
            assert "error" not in item
    return {way: seconds / len(names) * 1000 for way, seconds in spent.items()}


def make_videos(folder, names, seconds):
    """Make one video, links to it as the others, and their list."""
    film = folder / "film.mp4"
    scene = f"testsrc2=size=340x256:rate=25:duration={seconds}"
    x264 = ["-c:v", "libx264", "-preset", "veryfast", "-g", "250", "-pix_fmt", "yuv420p"]
    encode(film, "-f", "lavfi", "-i", scene, *x264)
    for name in names:
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / f"{name}.mp4").symlink_to(film)
    (folder / "list.csv").write_text("\n".join(["video_path", *(f"{n}.mp4" for n in names)]) + "\n")


def count_equal(roots, names):
    """Return how many of the videos have the same captions in all roots."""
    sources = [open_captions(root) for root in roots]
    count = 0
    for name in names:
        first, *others = ([*map(list, source.read(f"{name}.mp4"))] for source in sources)
        count += all(other == first for other in others)
    return count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=100, help="per video")
    parser.add_argument("--samples", type=int, default=20_000, help="videos read, warm")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", help="where to make the set and remove it (default: TMPDIR)")
    options = parser.parse_args()
    print(processor())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        root = Path(folder)
        names = make_set(root, options.videos, options.captions)
        roots = {"folder": root / "csv", "store": root / "store"}
        print(f"{options.videos:,} videos, {options.videos * options.captions:,} captions\n")
        print("| pack from | seconds | CPU seconds | peak MiB | source MB | store MB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for source, out in (("csv", "store"), ("all.json", "from_json")):
            seconds, cpu, peak = run_in_process(pack, root / source, root / out)
            print(f"| {source} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} ", end="")
            print(f"| {disk_usage(root / source):.0f} | {disk_usage(root / out):.0f} |")
        print("\n| captions from | files | open files | to open, ms | cold, ms per video |", end="")
        print(f" warm, CPU ms per video | CPU ms per item | {options.workers} workers, MB |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        rng = np.random.default_rng(2)
        drawn = [names[i] for i in rng.integers(len(names), size=options.samples)]
        items = sorted(set(drawn[:200]))
        make_videos(root, items, 3 * options.captions + 10)
        item = run_in_process(whole_items, roots, items, root)
        for way, path in roots.items():
            drop_cache(path)
            _, cold, _, _ = run_in_process(read, path, drawn[:2000])
            run_in_process(read, path, drawn)
            opening, _, warm, files = run_in_process(read, path, drawn)
            memory = run_in_process(workers_memory, path, drawn, options.workers)
            print(f"| {way} | {len(list_files(path)):,} | {files} | {opening:.1f} ", end="")
            print(f"| {cold:.3f} | {warm:.3f} | {item[way]:.1f} | {memory:.1f} |")
        count = count_equal([*roots.values(), root / "from_json"], names[:1000])
        print(f"\nthe same captions in all three: {count:,} of {len(names[:1000]):,} videos")


if __name__ == "__main__":
    main()
