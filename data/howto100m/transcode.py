"""Re-encode a tree of videos into a training store: the same names, much cheaper to decode.

Every video becomes H.264 without sound: the short side scaled down to --short_side, --multiple
frames for each frame that training at --fps uses, and an IDR frame every --keyint seconds. Names
and folders stay the same, so only --video_path changes; the list and the captions remain valid.
The container is MP4, whatever the extension (FFmpeg recognizes the content). Files are written
atomically: if a run is stopped, the same command resumes it.

With --shards, the store consists of tar files of about 1 GB, each written atomically. a/b.mp4
becomes 00000.tar/a/b.mp4, so the list has to be made again. Until their shard is full, videos are
in STORE/unpacked.

A lower --crf is closer to the source and larger, a longer --keyint smaller and slower to decode.
A store is made for one --fps, and for clips that start on whole seconds; otherwise its frames are
slightly early or late. benchmarks/RESULTS.md has the speed, the disk space and the PSNR of the
defaults.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing.pool
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, files_below, make_folder, positive
from utils import InputError, atomic_write, input_error, run_script

PARTIAL = ".part"
SETTINGS = "transcode.json"
UNPACKED = "unpacked"  # folder of the videos that are in no shard yet
SHARD_MEGABYTES = 1000
PRESETS = [
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow"),
]


def store_filters(fps: int, multiple: int, short_side: int, size: tuple[int, int]) -> str:
    """Make the command's -vf option. size: (width, height) of the source, or the reverse.

    Decoded at `fps` from a whole second on, the store must show the same frames as the source. As
    output frame n, ffmpeg takes the last frame whose time rounds to at most n, halves up. Among
    the store's frames for n, this is the middle one if `multiple` is odd, and the one before the
    middle if it is even. So the times of the source's frames are rounded to the nearest store
    frame, or down.
    """
    rounding = "near" if multiple % 2 else "down"
    return ",".join(
        [
            f"fps={fps * multiple}:round={rounding}:start_time=0",
            *scale_filters(short_side, *sorted(size)),
            "crop=trunc(iw/2)*2:trunc(ih/2)*2",
            "format=yuv420p",
        ]
    )


def scale_filters(short_side: int, short: int, long: int) -> list[str]:
    """Scale pictures of short x long pixels down, without moving their central square.

    Training crops the largest square, and FFmpeg moves a crop by one pixel to an even offset,
    because two pixels share a chroma sample. So up to three columns are cut off the source, which
    centres the square that FFmpeg would crop, and the store has a width with an even offset.
    """
    if short <= short_side:
        return []

    def oriented(long, short):
        return f"w=if(gt(iw\\,ih)\\,{long}\\,{short}):h=if(gt(ih\\,iw)\\,{long}\\,{short})"

    # Expressions, because a video's picture size may change midway.
    longest, shortest = "max(iw\\,ih)", "min(iw\\,ih)"
    side = f"min({short_side}\\,{shortest})"
    filters = [f"scale={oriented(f'2*round({longest}*{side}/{shortest}/2)', side)}"]
    centred = short + (long - short) // 4 * 4
    if centred != long:
        centre = f"{shortest}+4*floor(({longest}-{shortest})/4)"
        filters.insert(0, f"crop={oriented(centre, shortest)}:x=0:y=0")
    if (2 * round(centred * short_side / short / 2) - short_side) % 4:
        # One column has to be cut off each side: an odd offset, which requires unshared chroma.
        even = f"{longest}-mod({longest}-{shortest}\\,4)"
        filters += ["format=yuv444p", f"crop={oriented(even, shortest)}"]
    return filters


def transcode(
    source: Path,
    target: Path,
    *,
    fps: int,
    multiple: int,
    short_side: int,
    keyint: float,
    crf: int,
    preset: str,
) -> None:
    """Write the store's version of a video. Raises DecodeError (one line) or OSError."""
    import video_decoder  # imports torch, which would slow down --help

    size = video_decoder.probe_size(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, because another run may be writing the same video.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    frames = max(1, round(keyint * fps * multiple))
    # With the default multiple, training uses every other frame. No frame refers to those in
    # between, so the decoder skips them. Keyframes are on whole seconds, where clips start.
    x264 = f"keyint={frames}:min-keyint={frames}:scenecut=0:b-pyramid=none"
    x264 += f":b-adapt=0:bframes={min(multiple - 1, 3)}"
    command = [video_decoder.ffmpeg_program(), "-v", "error", "-nostdin", "-y", "-threads", "1"]
    opened = video_decoder.find_source(source)
    command += ["-format_whitelist", video_decoder.CONTAINERS]
    command += ["-protocol_whitelist", opened.protocols]
    command += ["-max_pixels", str(video_decoder.MAX_PIXELS), "-i", opened.url]
    command += ["-map", "0:v:0", "-vf", store_filters(fps, multiple, short_side, size)]
    command += ["-c:v", "libx264", "-preset", preset, "-tune", "fastdecode", "-crf", str(crf)]
    command += ["-x264-params", x264, "-threads", "1", "-map_metadata", "-1"]
    command += ["-movflags", "+faststart", "-f", "mp4", f"file:{partial}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            reason = lines[-1] if lines else f"status {done.returncode}"
            raise video_decoder.DecodeError(f"{source}: ffmpeg failed: {reason}")
        video_decoder.decode_clip(partial, 0, fps=fps, num_frames=1, size=16)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--video_path", required=True, help="folder of the videos")
    add("--out", required=True, help="folder of the store")
    add("--fps", type=positive(int), default=5, help="the training's --fps (default 5)")
    add("--multiple", type=positive(int), default=2, help="store frames per training frame (2)")
    add("--short_side", type=int, default=256, help="pixels, at least 16 (256)")
    add("--keyint", type=positive(float), default=1.0, help="seconds between IDR frames (1)")
    add("--crf", type=int, default=23, help="x264's quality, 0 to 51 (23)")
    add("--preset", default="medium", choices=PRESETS, help="x264's preset (medium)")
    add("--num_workers", type=positive(int), default=os.cpu_count(), help="videos at a time")
    add(
        "--shards",
        nargs="?",
        metavar="MB",
        type=positive(float),
        const=SHARD_MEGABYTES,
        help=f"write tar files of this many megabytes ({SHARD_MEGABYTES}), not single files",
    )
    options = parser.parse_args(argv)
    if options.short_side < 16:
        parser.error("--short_side must be at least 16")
    if not 0 <= options.crf <= 51:
        parser.error("--crf must be from 0 to 51")
    return options


def check_settings(out: Path, settings: dict) -> None:
    """Raise InputError if a store has other settings; record the settings of a new one."""
    path = out / SETTINGS
    if not path.is_file():
        with atomic_write(path) as file:
            file.write(json.dumps(settings).encode() + b"\n")
    elif (kept := json.loads(path.read_text())) != settings:
        made = " ".join(f"--{name} {value}" for name, value in kept.items())
        raise InputError(f"--out: {out} was made with {made}; give these, or another folder")


# --- shards ---------------------------------------------------------------------------------------


def unpacked(out: Path, video: Path) -> Path:
    """Return the path of a video until its shard is full. Lists ignore it, due to its suffix."""
    return out / UNPACKED / f"{video}{PARTIAL}"


def list_packed(out: Path) -> set[str]:
    """List the videos in the shards of a store."""
    from video_decoder import EXTENSIONS, walk_files

    return {name for shard in out.glob("*.tar") for name in walk_files(shard, EXTENSIONS)}


def pack(out: Path, videos: Iterable[Path], megabytes: float) -> None:
    """Move the videos into new shards, as soon as one is full. Raises OSError."""
    numbers = [int(shard.stem) for shard in out.glob("*.tar") if shard.stem.isdecimal()]
    new = (out / f"{number:05}.tar" for number in itertools.count(max(numbers, default=-1) + 1))
    waiting, size = [], 0
    for video in videos:
        waiting.append(video)
        size += unpacked(out, video).stat().st_size
        if size >= megabytes * 10**6:
            write_shard(next(new), out, waiting)
            waiting, size = [], 0
    if waiting:
        write_shard(next(new), out, waiting)


def write_shard(shard: Path, out: Path, videos: list[Path]) -> None:
    """Move the videos into a shard, whose bytes depend on theirs and on their names only."""
    from video_decoder import walk_files

    with atomic_write(shard) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for video in videos:
            member = tarfile.TarInfo(str(video))
            with open(unpacked(out, video), "rb") as content:
                member.size = os.fstat(content.fileno()).st_size
                tar.addfile(member, content)
    list(walk_files(shard, ()))  # writes its index
    for video in videos:
        unpacked(out, video).unlink()


@contextlib.contextmanager
def lock_store(out: Path) -> Iterator[None]:
    """Allow one run at a time to write the shards of a store."""
    try:
        with FileLock(out / "transcode.lock", blocking=False):
            yield
    except Timeout:
        raise InputError(
            f"--out: another run is writing the shards of {out}; wait for it, or give another "
            "folder and a part of the videos"
        ) from None


# --- command line ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Exit with status 1 if some videos failed."""
    options = parse_arguments(argv)
    import video_decoder

    root, out = Path(options.video_path), Path(options.out)
    videos = [Path(name) for name in files_below(root, "video_path", video_decoder.EXTENSIONS)]
    if not videos:
        raise InputError(f"--video_path: no video found in {root}; give their folder")
    source, target = root.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise InputError("--out and --video_path must be separate folders, neither in the other")
    make_folder(out, "out")
    settings = {
        name: getattr(options, name)
        for name in ("fps", "multiple", "short_side", "keyint", "crf", "preset")
    }
    kept = {"shards": options.shards} if options.shards else {}
    check_settings(out, settings | kept)
    with lock_store(out) if options.shards else contextlib.nullcontext():
        failures = make_store(root, out, videos, options, settings)
    for video, error in sorted(failures):
        print(f"failed: {video}: {error}", file=sys.stderr)
    if failures:
        sys.exit(1)


def make_store(
    root: Path, out: Path, videos: list[Path], options: argparse.Namespace, settings: dict
) -> list[tuple[Path, Exception]]:
    """Transcode the videos that the store lacks. Returns those that failed, and their errors."""
    import video_decoder

    if options.shards:
        packed = list_packed(out)
        todo = [video for video in videos if str(video) not in packed]
    else:
        todo = [video for video in videos if not (out / video).exists()]
    failures = []

    def attempt(video):
        target = unpacked(out, video) if options.shards else out / video
        try:
            if not target.exists():
                transcode(root / video, target, **settings)
        except (video_decoder.DecodeError, OSError) as error:
            return video, error
        return video, None

    done = len(videos) - len(todo)
    progress = tqdm(total=len(videos), initial=done, unit="video", disable=None)
    with progress, multiprocessing.pool.ThreadPool(options.num_workers) as pool:

        def transcoded():
            for video, error in pool.imap(attempt, todo):  # in order, for the shards
                if error:
                    failures.append((video, error))
                else:
                    yield video
                progress.update()

        try:
            if options.shards:
                with input_error("--out"):
                    pack(out, transcoded(), options.shards)
                shutil.rmtree(out / UNPACKED, ignore_errors=True)
            else:
                for _ in transcoded():
                    pass
        except KeyboardInterrupt:
            pool.terminate()  # start no more
            pool.join()
            raise
    made = len(videos) - len(failures)
    print(f"{made} of {len(videos)} videos are in {out} ({len(todo)} were missing)")
    return failures


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as at Ctrl-C
    with contextlib.suppress(BrokenPipeError):
        run_script(main, "stopped: the same command resumes")
