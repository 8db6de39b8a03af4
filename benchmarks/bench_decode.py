"""Measure decoding: CPU milliseconds per clip, for our backends and other decoders, in one run.

    python benchmarks/bench_decode.py            # about ten minutes on two cores
    python benchmarks/bench_decode.py --quick    # a minute or two, with rough results

Makes its own files: several minutes at 256p and 30 frames per second, x264 medium, GOP 250. Their
source is the clips in ../shared/videos if they exist (real motion), otherwise synthetic scenes with
camera noise. All contenders decode the same random clips in turn. CPU time is user and system time
of this process and its children. Contenders:

    release   the public release's way: an ffmpeg process per window, FFmpeg's default threads
    ffmpeg    our backend of that name: the same command, one decoder thread
    torchcodec, decord    if installed, one thread; they are not requirements of the project. Their
              frames are similar, not bit-exact, because they round times differently.
    pyav      our backend of that name, the default
"""

import argparse
import math
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "howto100m")]
import transcode  # noqa: E402

import video_decoder  # noqa: E402

SHARED = ROOT.parent / "shared" / "videos"
X264 = ["-c:v", "libx264", "-preset", "medium", "-g", "250", "-pix_fmt", "yuv420p", "-an"]
TRAIN = {"fps": 5, "num_frames": 16, "size": 224, "crop_only": True, "crop": (0.3, 0.6)}
WINDOWS = {"fps": 5, "num_frames": 16, "size": 224}


def cpu_seconds():
    """Return the CPU time of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- files ------------------------------------------------------------------------------------


def encode(target, *options):
    command = [video_decoder.ffmpeg_program(), "-v", "error", "-nostdin", "-y", *options]
    subprocess.run([*command, str(target)], check=True)


def make_files(folder, minutes):
    """Make a long video, a 15 s one cut from it, an HMDB-like clip, and the long video's store."""
    long, short = folder / "source" / "long.mp4", folder / "short.mp4"
    long.parent.mkdir()
    clips = [SHARED / "v_GGSY1Qvo990.mp4", SHARED / "flipping_a_pancake.mkv"]
    if all(clip.exists() for clip in clips):
        inputs, seconds = [], minutes * 30
        for clip in clips:
            inputs += ["-stream_loop", "-1", "-t", str(seconds), "-i", str(clip)]
        scale = "fps=30,scale=340:256,setsar=1"
        graph = f"[0]{scale}[a];[1]{scale}[b];[a][b]concat=n=2[o]"
        encode(long, *inputs, "-filter_complex", graph, "-map", "[o]", *X264)
    else:
        scene = f"mandelbrot=size=340x256:rate=30,noise=alls=8:allf=t,trim=duration={minutes * 60}"
        encode(long, "-f", "lavfi", "-i", scene, *X264)
    encode(short, "-ss", "10", "-t", "15", "-i", str(long), *X264)
    hmdb = folder / "hmdb.avi"
    encode(hmdb, "-ss", "5", "-t", "3", "-i", str(long), "-vf", "scale=320:240", "-an")
    store = folder / "store" / "long.mp4"
    settings = vars(transcode.parse_arguments(["--video_path", str(long.parent), "--out", "x"]))
    for name in ("video_path", "out", "num_workers", "shards"):
        del settings[name]
    transcode.transcode(long, store, **settings)
    return long, short, hmdb, store


# --- contenders: (path, starts, settings) -> clips; starts None: the whole file ------------------


def pyav(path, starts, settings):
    return ours(path, starts, settings, "pyav")


def ffmpeg(path, starts, settings):
    return ours(path, starts, settings, "ffmpeg")


def ours(path, starts, settings, backend):
    if starts is None:
        return video_decoder.decode_frames(path, size=settings["size"], backend=backend)
    return video_decoder.decode_clips(path, starts, **settings, backend=backend)


def release(path, starts, settings):
    size = settings["size"]
    if settings.get("crop_only"):
        left, top = settings["crop"]
        crop = f"crop={size}:{size}:(iw-{size})*{left}:(ih-{size})*{top}"
    else:
        side = "min(iw\\,ih)"
        crop = f"crop={side}:{side}:(iw-{side})*0.5:(ih-{side})*0.5,scale={size}:{size}"
    clips = []
    for start in [None] if starts is None else starts:
        command = [video_decoder.ffmpeg_program(), "-v", "error", "-nostdin"]
        rate = ""
        if start is not None:
            seconds = settings["num_frames"] / settings["fps"] + 0.1
            command += ["-ss", str(start), "-t", str(seconds)]
            rate = f"fps={settings['fps']},"
        command += ["-i", str(path), "-filter_complex", f"[0]{rate}{crop}[o]", "-map", "[o]"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
        pixels = bytearray(subprocess.run(command, capture_output=True, check=True).stdout)
        frames = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, size, size, 3)
        clips.append(frames.permute(3, 0, 1, 2)[:, : settings.get("num_frames")].contiguous())
    return torch.stack(clips)


def fit_frames(frames, settings):
    """Crop frames [n, 3, h, w], or scale their largest square: [3, n, size, size]."""
    size = settings["size"]
    height, width = frames.shape[-2:]
    side = size if settings.get("crop_only") else min(height, width)
    left, top = settings.get("crop", (0.5, 0.5))
    x, y = int((width - side) * left), int((height - side) * top)
    frames = frames[..., y : y + side, x : x + side]
    if side != size:
        resize = torch.nn.functional.interpolate
        frames = resize(frames, (size, size), mode="bilinear", antialias=True)
    return frames.transpose(0, 1).contiguous()


def frame_times(starts, settings, duration):
    """List the times of the frames of every window, at most 0.05 s before the end."""
    steps = [number / settings["fps"] for number in range(settings["num_frames"])]
    return [min(start + step, duration - 0.05) for start in starts for step in steps]


def torchcodec(path, starts, settings):
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, seek_mode="approximate")
    if starts is None:
        return fit_frames(decoder[:], settings)
    times = frame_times(starts, settings, decoder.metadata.duration_seconds)
    return fit_frames(decoder.get_frames_played_at(times).data, settings)


def decord(path, starts, settings):
    import decord as library

    reader = library.VideoReader(str(path), num_threads=1)
    if starts is None:
        indices = range(len(reader))
    else:
        rate = reader.get_avg_fps()
        times = frame_times(starts, settings, len(reader) / rate)
        indices = [min(round(when * rate), len(reader) - 1) for when in times]
    frames = torch.from_numpy(reader.get_batch(list(indices)).asnumpy())
    return fit_frames(frames.permute(0, 3, 1, 2), settings)


def list_contenders():
    """List the contenders that are installed."""
    found = [release, ffmpeg]
    for contender in (torchcodec, decord):
        try:
            if contender is torchcodec:
                from torchcodec.decoders import VideoDecoder  # noqa: F401
            else:
                import decord as library  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"without {contender.__name__}: {reason}")
        else:
            found.append(contender)
    return [*found, pyav]


# --- the tables ---------------------------------------------------------------------------------


def measure(jobs, runners):
    """Return the CPU milliseconds per job of each runner. jobs: (path, starts, settings) each."""
    totals = dict.fromkeys(runners, 0.0)
    for job in jobs[:1]:
        for run in runners:
            run(*job)  # imports, caches
    for job in jobs:
        for run in runners:
            began = cpu_seconds()
            run(*job)
            totals[run] += cpu_seconds() - began
    return {run.__name__: total / len(jobs) * 1000 for run, total in totals.items()}


def print_table(title, times):
    print(f"\n{title}\n\n| contender | CPU ms | pyav is faster by |\n| --- | --- | --- |")
    for name, value in times.items():
        print(f"| {name} | {value:.1f} | {value / times['pyav']:.1f}x |")


def psnr(source, store, starts):
    """Compute the PSNR in dB of the store's clips, as training decodes them, against the source."""
    squares = []
    for start in starts:
        pair = [video_decoder.decode_clip(path, start, **WINDOWS) for path in (source, store)]
        squares.append((pair[0].float() - pair[1].float()).square().mean().item())
    return 10 * math.log10(255**2 / (sum(squares) / len(squares)))


def processor():
    """Return the CPU's model and number of cores."""
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter files, fewer clips")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    minutes, count = (1, 8) if options.quick else (4, 60)
    torch.set_num_threads(1)
    runners = list_contenders()
    version = subprocess.run(
        [video_decoder.ffmpeg_program(), "-version"], capture_output=True, text=True
    ).stdout.split()[2]
    print(f"{processor()}; ffmpeg {version}; {count} clips")
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        long, short, hmdb, store = make_files(Path(folder), minutes)
        duration = video_decoder.probe_duration(long)
        starts = [rng.randint(0, int(duration - 3.2)) for _ in range(count)]
        jobs = [(long, [start], TRAIN) for start in starts]
        source = measure(jobs, runners)
        print_table("Training clip: 16 frames at 5 per second, 224x224 crop", source)

        windows = [[number * (15 - 3.2 - 0.4) / 9 for number in range(10)]]
        times = measure([(short, windows[0], WINDOWS)] * (count // 4), runners)
        print_table("Ten windows of a 15 s video, 16 frames each", times)

        times = measure([(hmdb, None, {"size": 224})] * (count // 4), runners)
        print_table("A whole HMDB-like clip: 3 s of MPEG-4 in AVI, every frame", times)

        stored = measure([(store, [start], TRAIN) for start in starts], runners)
        print_table("Training clip from the training store", stored)
        ratio = source["release"] / stored["pyav"]
        print(f"\nstore with pyav against the release's way on the source: {ratio:.1f}x")
        sizes = [path.stat().st_size / duration * 3600 / 1e6 for path in (long, store)]
        print(f"disk: source {sizes[0]:.0f} MB per hour, store {sizes[1]:.0f} MB per hour")
        print(f"PSNR of the store's clips: {psnr(long, store, starts[:12]):.1f} dB")


if __name__ == "__main__":
    main()
