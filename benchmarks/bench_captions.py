"""What reading captions costs: a folder of CSV files against a caption store, in one run.

    python benchmarks/bench_captions.py                   # some minutes, 5 GB of disk
    python benchmarks/bench_captions.py --videos 500      # half a minute: that it runs

Makes 100,000 videos of 100 captions each, as CSV files and as one JSON file, packs either with
data/howto100m/prepare.py, and reads the captions of random videos, as training does:

    folder    caption_store.CaptionFolder: a CSV file a video
    store     caption_store.CaptionStore: all of them in arrays that are mapped into memory

The same videos in both, by one process. "Warm" is with the files in the page cache, in CPU time;
"cold" after they were dropped from it, in wall time (the file system's own tables stay: a folder
of a million files on a network file system is slower than that). A whole item is one of
video_loader.HowTo100M, in CPU time: captions, words and a decoded clip of 16 x 224 x 224; all
videos are links to one of 340x256, 25 frames/s, GOP 250. Memory is by how much the workers of
workers.sample_batches grow by reading random videos: what each has changed for itself
(Private_Dirty of /proc), summed. Pages of files are not counted, neither those of a mapped store
nor those of the folder's files: they are in the page cache once, which gives them up when memory is
short. The last line says whether the captions of a thousand videos are the same in the folder and
in both stores.
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
from video_loader import TEXT_WORDS, HowTo100M  # noqa: E402

WORDS = [f"word{i}" for i in range(2000)]


# --- the set ------------------------------------------------------------------------------------


def make_set(root, videos, captions):
    """Captions of about ten words and three seconds, as `csv/xx/video....csv` and as `all.json`."""
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
    """Seconds of the wall and of CPU, and the peak in MiB of the process, without its readers."""
    began, spent = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare.main(["pack", "--caption_root", str(source), "--out", str(out)])
    return time.perf_counter() - began, cpu_seconds() - spent, resident("VmHWM")


def apart(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def files_of(root):
    return [path for path in Path(root).rglob("*") if path.is_file()]


def disk(root):
    return sum(path.stat().st_blocks * 512 for path in files_of(root)) / 1e6


# --- reading ------------------------------------------------------------------------------------


def forget(root):
    """Drops the files from the page cache."""
    os.sync()
    for path in files_of(root):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(root, names):
    """Milliseconds to open the captions; to read a video's, of the wall and of CPU; files open."""
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
    """A data set whose item reads a share of the videos, and says what memory that took."""

    def __init__(self, root, shares):
        self.captions, self.shares = open_captions(root), shares
        self.item_spec = {"bytes": ((2,), torch.int64)}

    def __getitem__(self, key):
        self.captions.read(self.shares[key][0])  # imports, and what is allocated once
        before = private_memory()
        for name in self.shares[key]:
            self.captions.read(name)
        return {"bytes": torch.tensor([before, private_memory()])}


def private_memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def workers_memory(root, names, workers):
    """MB that so many workers together have to themselves of reading these videos."""
    shares = [[f"{name}.mp4" for name in names[rank::workers]] for rank in range(workers)]
    reader = Reader(root, shares)
    [batch] = sample_batches(reader, [list(range(workers))], workers=workers, timeout=600)
    assert batch["errors"] == [None] * workers
    return (batch["bytes"][:, 1] - batch["bytes"][:, 0]).sum().item() / 1e6


def whole_items(roots, names, folder):
    """Milliseconds of CPU an item of the training set takes each way, in turns."""
    torch.set_num_threads(1)
    words = Tokenizer(WORDS, TEXT_WORDS)
    videos = folder / "list.csv", folder / "videos"
    sets = {way: HowTo100M(*videos, root, words, num_candidates=4) for way, root in roots.items()}
    for data in sets.values():
        data[1, 0]  # imports, and what is allocated once
    spent = dict.fromkeys(sets, 0.0)
    for index in range(len(names)):
        for way, data in sets.items():
            began = time.process_time()
            item = data[0, index]
            spent[way] += time.process_time() - began
            assert "error" not in item
    return {way: seconds / len(names) * 1000 for way, seconds in spent.items()}


def make_videos(folder, names, seconds):
    """One video, the others links to it, and their list."""
    film = folder / "film.mp4"
    scene = f"testsrc2=size=340x256:rate=25:duration={seconds}"
    x264 = ["-c:v", "libx264", "-preset", "veryfast", "-g", "250", "-pix_fmt", "yuv420p"]
    encode(film, "-f", "lavfi", "-i", scene, *x264)
    for name in names:
        (folder / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "videos" / f"{name}.mp4").symlink_to(film)
    (folder / "list.csv").write_text("\n".join(["video_path", *(f"{n}.mp4" for n in names)]) + "\n")


def same(roots, names):
    """How many of the videos have the same captions in all roots."""
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
    parser.add_argument("--captions", type=int, default=100, help="of a video")
    parser.add_argument("--samples", type=int, default=20_000, help="videos read, warm")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--folder", help="where to make the set, and remove it (default: TMPDIR)")
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
            seconds, cpu, peak = apart(pack, root / source, root / out)
            size = disk(root / source) if source == "csv" else (root / source).stat().st_size / 1e6
            print(f"| {source} | {seconds:.1f} | {cpu:.1f} | {peak:.0f} ", end="")
            print(f"| {size:.0f} | {disk(root / out):.0f} |")
        print("\n| captions from | files | open files | to open, ms | cold, ms a video |", end="")
        print(f" warm, CPU ms a video | an item, CPU ms | {options.workers} workers, MB |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        rng = np.random.default_rng(2)
        drawn = [names[i] for i in rng.integers(len(names), size=options.samples)]
        items = sorted(set(drawn[:200]))
        make_videos(root, items, 3 * options.captions + 10)
        item = apart(whole_items, roots, items, root)
        for way, path in roots.items():
            forget(path)
            _, cold, _, _ = apart(read, path, drawn[:2000])
            apart(read, path, drawn)
            opening, _, warm, files = apart(read, path, drawn)
            memory = apart(workers_memory, path, drawn, options.workers)
            print(
                f"| {way} | {len(files_of(path)):,} | {files} | {opening:.1f} | {cold:.3f} ", end=""
            )
            print(f"| {warm:.3f} | {item[way]:.1f} | {memory:.1f} |")
        count = same([*roots.values(), root / "from_json"], names[:1000])
        print(f"\nthe same captions in all three: {count:,} of {len(names[:1000]):,} videos")


if __name__ == "__main__":
    main()
