"""Re-encode a tree of videos into a training store: the same names, much cheaper to decode.

Every video becomes H.264 without sound: the short side scaled down to --short_side, --multiple
frames for each frame that training at --fps takes, and an IDR frame every --keyint seconds. The
names and folders stay as they are, so that the video list and the captions fit and --video_path
is all that changes; the container is MP4 whatever the name's extension says (FFmpeg goes by the
content). Files are written under another name and renamed when they are whole: the command can be
stopped and run again, and goes on with what is missing.
"""

import argparse
import contextlib
import json
import math
import multiprocessing.pool
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from utils import find_files

PARTIAL = ".part"
SETTINGS = "transcode.json"


def store_filters(fps, multiple, short_side, size):
    """Make the -vf of the command. size: of the source's pictures, (width, height) or turned.

    Taken at `fps` from a whole second on, the store must show the very frames that the source
    would. ffmpeg takes the last frame whose time rounds to at most n, halves up. Of an odd
    multiple's store frames that is the middle one, of an even multiple's the one before the
    middle, so the source's frames go into the store rounded to the nearest or rounded down.
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


def scale_filters(short_side, short, long):
    """Scale pictures of short x long pixels down, so that their centre square stays the centre's.

    Training crops the largest square, and FFmpeg moves a crop by a pixel to an even offset, as a
    chroma sample is shared by two. So the source loses the columns beyond the square that it would
    crop, and the store has a width at which the offset is even.
    """
    if short <= short_side:
        return []

    def oriented(long, short):
        return f"w=if(gt(iw\\,ih)\\,{long}\\,{short}):h=if(gt(ih\\,iw)\\,{long}\\,{short})"

    # Of the picture, which may change its size midway.
    longest, shortest = "max(iw\\,ih)", "min(iw\\,ih)"
    side = f"min({short_side}\\,{shortest})"
    filters = [f"scale={oriented(f'2*round({longest}*{side}/{shortest}/2)', side)}"]
    centred = short + (long - short) // 4 * 4
    if centred != long:
        centre = f"{shortest}+4*floor(({longest}-{shortest})/4)"
        filters.insert(0, f"crop={oriented(centre, shortest)}:x=0:y=0")
    if (2 * round(centred * short_side / short / 2) - short_side) % 4:
        # Half of the rest is an odd number of pixels, which only unshared chroma lets it cut off.
        even = f"{longest}-mod({longest}-{shortest}\\,4)"
        filters += ["format=yuv444p", f"crop={oriented(even, shortest)}"]
    return filters


def transcode(source, target, *, fps, multiple, short_side, keyint, crf, preset):
    """Write the store's version of one video. Raises RuntimeError with a one-line reason."""
    import video_decoder  # loads torch, for which --help should not wait

    try:
        size = video_decoder.probe_size(source)
    except video_decoder.DecodeError as error:
        raise RuntimeError(str(error)) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another run of the command may be at the same video.
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    frames = max(1, round(keyint * fps * multiple))
    # With the default multiple every other frame, which training does not take, is one that no
    # frame refers to: the decoder skips it. Clips start on whole seconds, and so do groups.
    x264 = f"keyint={frames}:min-keyint={frames}:scenecut=0:b-pyramid=none"
    x264 += f":b-adapt=0:bframes={min(multiple - 1, 3)}"
    command = [video_decoder.ffmpeg_program(), "-v", "error", "-nostdin", "-y", "-threads", "1"]
    command += ["-format_whitelist", video_decoder.CONTAINERS, "-protocol_whitelist", "file"]
    command += ["-max_pixels", str(video_decoder.MAX_PIXELS), "-i", f"file:{source}"]
    command += ["-map", "0:v:0", "-vf", store_filters(fps, multiple, short_side, size)]
    command += ["-c:v", "libx264", "-preset", preset, "-tune", "fastdecode", "-crf", str(crf)]
    command += ["-x264-params", x264, "-threads", "1", "-map_metadata", "-1"]
    command += ["-movflags", "+faststart", "-f", "mp4", f"file:{partial}"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"ffmpeg ended with {done.returncode}")
        try:
            video_decoder.decode_clip(partial, 0, fps=fps, num_frames=1, size=16)
        except video_decoder.DecodeError as error:
            raise RuntimeError(f"what was written does not decode: {error}") from None
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=MEASURED, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--video_path", required=True, help="the folder of the videos")
    parser.add_argument("--out", required=True, help="the folder of the store, made if needed")
    parser.add_argument("--fps", type=int, default=5, help="the training's --fps (default 5)")
    parser.add_argument(
        "--multiple", type=int, default=2, help="store frames per training frame (default 2)"
    )
    parser.add_argument("--short_side", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--keyint", type=float, default=1.0, help="seconds (default 1)")
    parser.add_argument("--crf", type=int, default=23, help="x264's quality, 0-51 (default 23)")
    parser.add_argument("--preset", default="medium", choices=PRESETS, help="x264's (medium)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="at a time")
    options = parser.parse_args(arguments)
    for name in ("fps", "multiple", "num_workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.short_side < 16:
        parser.error("--short_side must be at least 16")
    if not 0 < options.keyint < math.inf:
        parser.error("--keyint must be a positive number")
    if not 0 <= options.crf <= 51:
        parser.error("--crf must be from 0 to 51")
    if not options.video_path or not Path(options.video_path).is_dir():
        parser.error(f"--video_path {options.video_path}: no such folder")
    source, out = Path(options.video_path).resolve(), Path(options.out).resolve()
    if source == out or source in out.parents or out in source.parents:
        parser.error("--out and --video_path must be folders apart from each other")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    if not os.access(out, os.W_OK):
        parser.error(f"--out {options.out}: cannot be written to")
    return parser, options


PRESETS = [
    *("ultrafast", "superfast", "veryfast", "faster", "fast"),
    *("medium", "slow", "slower", "veryslow"),
]
MEASURED = """\
What it buys and costs, measured by benchmarks/bench_decode.py on two cores of an Intel Xeon with
the defaults, for a source of 340x256 at 30 frames per second (x264 medium, CRF 23, GOP 250):
decoding a training clip of 16 frames at 5 per second takes 8.9 ms of CPU instead of 38.9 (89.5 the
public release's way); disk 119 MB an hour instead of 111; PSNR of the clips against the source's
40.4 dB. A lower --crf is closer to the source and larger, a longer --keyint smaller and slower to
decode. The store is made for one --fps, from whole seconds on; at others its frames are a little
early or late."""


def check_settings(parser, out, settings):
    """A store is of one kind: its settings are kept in it, and a run with others is refused."""
    path = out / SETTINGS
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept != settings:
            made = " ".join(f"--{name} {value}" for name, value in kept.items())
            parser.error(f"--out {out} was made with {made}: give these or another --out")
    else:
        path.write_text(json.dumps(settings) + "\n")


def main(arguments=None):
    """Exit status 0: all is there; 1: some videos failed; 2: the call was wrong."""
    parser, options = parse_arguments(arguments)
    import video_decoder

    try:
        videos = sorted(map(Path, find_files(options.video_path, video_decoder.EXTENSIONS)))
    except OSError as error:
        parser.error(f"--video_path {error.filename}: {error.strerror}")
    if not videos:
        parser.error(f"--video_path {options.video_path}: no video found in it")
    settings = {
        name: getattr(options, name)
        for name in ("fps", "multiple", "short_side", "keyint", "crf", "preset")
    }
    check_settings(parser, Path(options.out), settings)
    todo = [video for video in videos if not (Path(options.out) / video).exists()]
    failures = []

    def attempt(video):
        try:
            transcode(Path(options.video_path) / video, Path(options.out) / video, **settings)
        except (RuntimeError, OSError) as error:
            return video, error

    progress = tqdm(total=len(videos), initial=len(videos) - len(todo), unit="video", disable=None)
    with progress, multiprocessing.pool.ThreadPool(options.num_workers) as pool:
        try:
            for failure in pool.imap_unordered(attempt, todo):
                if failure:
                    failures.append(failure)
                progress.update()
        except KeyboardInterrupt:
            pool.terminate()  # begin no more
            pool.join()
            parser.exit(130, "stopped; run it again to go on\n")
    done = len(videos) - len(failures)
    print(f"{done} of {len(videos)} videos are in {options.out} ({len(todo)} were missing)")
    for video, error in sorted(failures):
        print(f"failed: {video}: {error}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as at Ctrl-C
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
