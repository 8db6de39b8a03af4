"""Measure videos in tar shards: the cost of a clip next to single files, and of a large index.

    python benchmarks/bench_shards.py            # some minutes
    python benchmarks/bench_shards.py --quick    # a minute, with rough results

Makes its own files: copies of one video of the training store, as single files and in shards.
A clip is a training clip, 16 frames at 5 per second. CPU time is that of this process and of its
children that have ended. System calls are counted by strace (skipped if it is not installed),
without those of starting Python. Bytes read are rchar of /proc/self/io, which counts read calls
from any cache. Bytes from the disk are read_bytes, with the file dropped from the page cache before
every clip; they include the kernel's readahead, which in a shard may go past the end of the video.

The index is measured with shards that have no videos: sparse files of the right size and their
indexes. Memory is private memory that the process has changed (Private_Dirty).
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from bench_decode import TRAIN, cpu_seconds, make_files, processor  # noqa: E402

import video_decoder  # noqa: E402
from utils import atomic_write  # noqa: E402
from video_decoder import shards  # noqa: E402

WAYS = ("files", "shards")


# --- a clip ---------------------------------------------------------------------------------------


def make_stores(folder: Path, copies: int) -> None:
    """Make the same videos under folder/files/NAME and folder/shards/0.tar/NAME."""
    source = folder / "made"
    source.mkdir()
    *_, store = make_files(source, 1)
    for way in WAYS:
        (folder / way).mkdir()
    with tarfile.open(folder / "shards" / "0.tar", "w") as tar:
        for number in range(copies):
            name = f"{number:03}.mp4"
            shutil.copyfile(store, folder / "files" / name)
            tar.add(store, name)


def list_videos(folder: Path, way: str) -> list[Path]:
    names = sorted(video_decoder.walk_files(folder / way, video_decoder.EXTENSIONS))
    return [folder / way / name for name in names]


def decode(videos: list[Path], count: int, backend: str, before=lambda path: None) -> None:
    """Decode `count` random clips, the same for both ways."""
    rng = random.Random(0)
    for _ in range(count):
        path, start = rng.choice(videos), rng.randrange(50)
        before(path)
        video_decoder.decode_clip(path, start, **TRAIN, backend=backend)


def drop_from_cache(path: Path) -> None:
    file = os.open(video_decoder.locate(path).file, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def io_counter(name: str) -> int:
    text = Path("/proc/self/io").read_text()
    return int(re.search(rf"^{name}: (\d+)$", text, re.MULTILINE)[1])


def count_calls(folder: Path, way: str, count: int) -> dict[str, int]:
    """Count the system calls of a process that decodes `count` clips."""
    command = [sys.executable, __file__, "--decode", str(folder), way, str(count)]
    trace = folder / "trace"
    subprocess.run(["strace", "-f", "-c", "-o", trace, *command], check=True)
    rows = (line.split() for line in trace.read_text().splitlines())
    return {row[-1]: int(row[3]) for row in rows if len(row) > 4 and row[3].isdecimal()}


def measure_clips(folder: Path, count: int, rounds: int) -> None:
    videos = {way: list_videos(folder, way) for way in WAYS}
    print(f"\n| a clip, of {count} | single files | shards |\n| --- | --- | --- |")

    def print_row(name, values):
        print(f"| {name} | {' | '.join(format(values[way], ',.1f') for way in WAYS)} |")

    size = video_decoder.locate(videos["files"][0]).size / 1000
    print_row("KB of the video", dict.fromkeys(WAYS, size))
    for backend in video_decoder.BACKENDS:
        best = dict.fromkeys(WAYS, float("inf"))
        clips = count if backend == "pyav" else max(4, count // 8)
        for way in WAYS * rounds:
            began = cpu_seconds()
            decode(videos[way], clips, backend)
            best[way] = min(best[way], (cpu_seconds() - began) / clips * 1000)
        print_row(f"CPU ms, {backend}, least of {rounds} rounds", best)
    for name, counter, before in (
        ("KB read", "rchar", lambda path: None),
        ("KB from the disk, cold", "read_bytes", drop_from_cache),
    ):
        values = {}
        for way in WAYS:
            began = io_counter(counter)
            decode(videos[way], count, "pyav", before)
            values[way] = (io_counter(counter) - began) / count / 1000
        print_row(name, values)
    if not shutil.which("strace"):
        print("\nstrace is not installed: system calls are not counted")
        return
    calls = {way: [count_calls(folder, way, clips) for clips in (1, 1 + count)] for way in WAYS}
    names = ("read", "lseek", "openat", "close", "fstat", "newfstatat", "mmap", "munmap")
    for name in (*names, "total"):
        values = {
            w: (more.get(name, 0) - one.get(name, 0)) / count for w, (one, more) in calls.items()
        }
        print_row("all system calls" if name == "total" else name, values)


# --- the index ------------------------------------------------------------------------------------


def private_kilobytes() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Private_Dirty: +(\d+)", text, re.MULTILINE)[1])


def measure_index(folder: Path, num_shards: int, members: int, lookups: int) -> None:
    """Look up random videos of shards that consist of a size and an index only."""
    size = members * 1024

    def member_name(shard, number):
        return f"{shard * members + number:011}.mp4"

    for shard in range(num_shards):
        path = folder / f"{shard:05}.tar"
        with open(path, "wb") as file:
            file.truncate(size)
        names = [member_name(shard, number).encode() for number in range(members)]
        places = {name: (1024 * number + 512, 512) for number, name in enumerate(names)}
        shards.read_headers = lambda *_, places=places: (places, -1)
        content = shards.make_index(str(path), size, path.stat().st_mtime_ns)
        with atomic_write(f"{path}.index") as file:  # syncs: unwritten pages would count as changed
            file.write(content)
    del places
    total = sum(path.stat().st_size for path in folder.glob("*.index"))
    print(f"\n{num_shards:,} shards of {members:,}: indexes of {total / 1e6:.0f} MB")
    rng = random.Random(0)
    before, files = private_kilobytes(), len(os.listdir("/proc/self/fd"))
    for part in ("first", "second"):
        began = time.perf_counter()
        for _ in range(lookups):
            shard, number = rng.randrange(num_shards), rng.randrange(members)
            source = video_decoder.locate(folder / f"{shard:05}.tar" / member_name(shard, number))
            assert source.start == 1024 * number + 512
        micros = (time.perf_counter() - began) / lookups * 1e6
        more = private_kilobytes() - before
        opened = len(os.listdir("/proc/self/fd")) - files
        print(
            f"the {part} {lookups:,} lookups: {micros:.0f} us each; {more / 1000:.1f} MB more "
            f"memory and {opened} more open files than before"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer clips and shards")
    parser.add_argument("--decode", nargs=3, help=argparse.SUPPRESS)  # under strace
    options = parser.parse_args()
    if options.decode:
        folder, way, count = options.decode
        decode(list_videos(Path(folder), way), int(count), "pyav")
        return
    print(f"{processor()}; load {os.getloadavg()[0]:.1f}")
    count, rounds, num_shards = (20, 1, 20) if options.quick else (200, 3, 1200)
    with tempfile.TemporaryDirectory() as folder:
        make_stores(Path(folder), 20)
        measure_clips(Path(folder), count, rounds)
    with tempfile.TemporaryDirectory() as folder:
        measure_index(Path(folder), num_shards, 1000, 20_000)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
