"""Measure feature extraction: videos per minute and core, ours and an ffmpeg process per window.

    python benchmarks/bench_extract.py            # about ten minutes on two cores
    python benchmarks/bench_extract.py --quick    # less than a minute, with rough results

Makes its own files (see bench_decode.py): videos of 40 s, 340x256, 30 frames per second, x264
medium, GOP 250. Both ways decode the same windows, 16 frames of 224x224 at 5 per second, in one
process, and pass the same batches to the same model: `ours` is strided_features, as
extract_features.py calls it; `ffmpeg` starts the program once per window. The row "decoding" is
without the model, as with a fast GPU. Time is user and system CPU time of this process and its
children, which depends less on the load of the machine than wall time. The ways take turns, twice,
and the better run counts.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import bench_decode  # noqa: E402

import video_decoder  # noqa: E402
from evaluation import features  # noqa: E402
from s3dg import S3D, fuse_for_inference  # noqa: E402

CLIP = video_decoder.ClipSpec(num_frames=16, size=224, fps=5)
SECONDS = 40
CPU = torch.device("cpu")


class NoModel(torch.nn.Module):
    """A model that takes no time, to measure decoding and batching alone."""

    def forward(self, video, text, mode, mixed5c):
        return video.new_zeros(len(video), 1024)


def decode_by_processes(path, starts, clip):
    """Decode as the release does, with an ffmpeg process per window: see decode_windows."""
    clips = bench_decode.release(path, starts, clip.options)
    return clips, [clip.num_frames] * len(clips)


def videos_per_minute(paths, model, decode, stride):
    """Extract once, with a worker that decodes with `decode`: videos per minute of CPU time."""
    ours = features.decode_windows
    features.decode_windows = decode or ours
    began = bench_decode.cpu_seconds()
    try:
        outcomes = features.strided_features(
            model,
            paths,
            CPU,
            features.StridedWindows(CLIP, stride),
            batch_size=32,
            workers=1,
            sample_timeout=600,
            mixed5c=True,
        )
        for outcome in outcomes:
            assert not outcome.error, outcome.error
    finally:
        features.decode_windows = ours
    return len(paths) / (bench_decode.cpu_seconds() - began) * 60


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one video, one turn")
    quick = parser.parse_args().quick
    count, turns = (1, 1) if quick else (6, 2)
    model = fuse_for_inference(S3D(space_to_depth=True).to(memory_format=torch.channels_last_3d))
    version = subprocess.run(
        [video_decoder.ffmpeg_program(), "-version"], capture_output=True, text=True
    ).stdout.split()[2]
    print(f"{bench_decode.processor()}; torch {torch.__version__}; ffmpeg {version}")
    with tempfile.TemporaryDirectory() as folder:
        long, *_ = bench_decode.make_files(Path(folder), 1 if quick else 4)
        paths = [Path(folder, f"{number}.mp4") for number in range(count)]
        for number, path in enumerate(paths):
            cut = ["-ss", str(number * SECONDS), "-t", str(SECONDS), "-i", str(long)]
            bench_decode.encode(path, *cut, *bench_decode.X264)
        print(f"{count} videos of {SECONDS} s\n")
        print("| stride | what | ffmpeg | ours | faster by |\n| --- | --- | --- | --- | --- |")
        for stride in (3.2, 1.0):
            for name, network in (("decoding", NoModel()), ("all", model)):
                if network is model and stride == 1.0:
                    continue  # with three times the windows, the model on a CPU hides the decoding
                rates = [
                    [
                        videos_per_minute(paths, network, way, stride)
                        for way in (decode_by_processes, None)
                    ]
                    for _ in range(turns)
                ]
                old, new = map(max, zip(*rates, strict=True))
                print(f"| {stride} s | {name} | {old:.1f} | {new:.1f} | {new / old:.1f}x |")


if __name__ == "__main__":
    main()
