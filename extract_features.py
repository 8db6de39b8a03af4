"""Extract features of windows at a constant stride from videos.

    python extract_features.py --pretrain_cnn_path FILE --video_path DIR --feature_root OUT

For each video, OUT gets a .npy, float32 [W, 1024] or [W, 512], one row per window, and a sidecar
.json that describes the rows. Videos that have both are skipped, so the same command resumes a run
that was stopped. Processes started by torchrun, by srun, as a SLURM job array or with --shard
divide the videos among themselves. evaluation/features.py defines the windows of a video.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "extract_features")

import argparse
import contextlib
import csv
import io
import json
import os
import posixpath
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from annotations.tables import cell_error, read_table, require_non_empty, require_unique
from args import (
    check_decoder,
    check_video_folder,
    clip_spec,
    file_checksum,
    files_below,
    inference_model,
    make_folder,
)
from distributed.device import pick_device
from distributed.launch import Shard, detect_shard, workers_per_rank
from evaluation.feature_file import difference, feature_settings
from evaluation.features import StridedWindows, VideoFeatures, strided_features, track_progress
from utils import (
    InputError,
    append,
    atomic_write,
    input_error,
    log,
    one_line,
    run_script,
    setup_logging,
)
from video_decoder import EXTENSIONS

COLUMNS = ["video_path", "feature_path"]


class Item(NamedTuple):
    """A video and its feature file, relative to --video_path and --feature_root."""

    video: str
    features: str


def list_items(args: argparse.Namespace) -> list[Item]:
    """List the videos of --feature_csv, or all in --video_path. No two share a feature file."""
    check_video_folder(args.video_path, "video_path")
    if args.feature_csv:
        with input_error("--feature_csv"):
            table = read_feature_csv(args.feature_csv)
        items = list(map(Item, table["video_path"], table["feature_path"]))
    else:
        videos = files_below(args.video_path, "video_path", EXTENSIONS)
        stems = [os.path.splitext(video)[0] for video in videos]
        taken = Counter(stems + videos)
        # The features of a.mp4 and a.mkv keep the extensions: a.mp4.npy, a.mkv.npy.
        items = [
            Item(video, f"{video if taken[stem] > 1 else stem}.npy")
            for video, stem in zip(videos, stems, strict=True)
        ]
    if not items:
        raise InputError(
            f"no videos in {args.feature_csv or args.video_path}; give another list or folder"
        )
    return items


def read_feature_csv(path: str | os.PathLike) -> pd.DataFrame:
    """Read a table of videos and feature files, and normalize the paths of the latter."""
    table = read_table(path, COLUMNS, names=COLUMNS)
    require_non_empty(table, COLUMNS, path)
    for row, name in enumerate(table["feature_path"]):
        if not name.endswith(".npy"):
            fault = "is not the name of a .npy file; end it with .npy"
            raise cell_error(path, row, "feature_path", name, fault)
    table["feature_path"] = table["feature_path"].map(posixpath.normpath)
    return require_unique(table, ["feature_path"], path)


def is_done(path: Path, video: str, settings: dict) -> bool:
    """Check whether the features of this video at `path` are complete, with their sidecar file.

    Raises InputError if they are features of something else, which are never overwritten.
    """
    sidecar = path.with_suffix(".json")
    if not path.exists() and not sidecar.exists():
        return False
    fix = "give another folder, or delete these features"
    try:
        made = json.loads(sidecar.read_bytes())
        source, differ = made["video"], difference(made["settings"], settings)
        rows, before_repeating = len(made["times"]), "frames" not in made
    except FileNotFoundError:
        raise InputError(
            f"--feature_root: the features {path} have no {sidecar.name} that describes them; {fix}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"--feature_root: {sidecar} is damaged or does not describe features; {fix}"
        ) from None
    if differ:
        raise InputError(f"--feature_root: the features {path} were made with {differ}; {fix}")
    if source != video:
        raise InputError(f"--feature_root: the features {path} are of {source}, not {video}; {fix}")
    if before_repeating and rows == 1:
        return False  # of a short video: until 2026-11 black frames filled its window
    try:
        return len(np.load(path, mmap_mode="r")) == rows
    except (FileNotFoundError, EOFError, ValueError, TypeError):
        return False  # absent or truncated: extract them again


def write_pair(path: Path, video: str, settings: dict, found: VideoFeatures) -> None:
    """Write the sidecar file and then the features, each atomically.

    In this order, a feature file always has its sidecar file beside it.
    """
    sidecar = {
        "video": video,
        "times": list(zip(found.starts, found.ends, strict=True)),
        "frames": found.frames,
        "black": found.black,
        "settings": settings,
    }
    make_folder(path.parent, "feature_root")
    try:
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(sidecar).encode())
        with atomic_write(path) as file:
            np.save(file, found.features, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"--feature_root: could not write {path} ({one_line(error)}); make room, and run the "
            "same command to resume"
        ) from None


class FailureList:
    """The CSV file that lists a shard's failed videos, each added when it fails."""

    def __init__(self, root: Path, shard: Shard):
        """Remove the lists of earlier runs, whose videos are retried.

        A shard removes its own list, and all lists of another number of shards.
        """
        for path in root.glob("failed*.csv"):
            match = re.fullmatch(r"failed(?:_(\d+)of(\d+))?\.csv", path.name)
            if match and int(match[2] or 1) != shard.count:
                with contextlib.suppress(OSError):
                    path.unlink()
        name = f"failed_{shard.index}of{shard.count}.csv" if shard.count > 1 else "failed.csv"
        self.path, self.count, self.complete = root / name, 0, True
        with contextlib.suppress(OSError):
            self.path.unlink()

    def add(self, video: str, reason: str) -> None:
        rows = [] if self.count else [("video_path", "reason")]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([*rows, (video, one_line(reason))])
        self.complete &= append(self.path, text.getvalue())
        self.count += 1


def main() -> None:
    args = get_args(__doc__, "extract_features")
    setup_logging(args.verbose)
    shard = detect_shard(args.shard)
    with input_error("--device, --gpu"):
        local_rank = shard.local_rank % max(1, torch.cuda.device_count())
        device = pick_device(args.device, args.gpu, local_rank)
    items = list_items(args)[shard.index :: shard.count]
    if not args.feature_root:
        raise InputError("--feature_root is needed; give the folder that features are written to")
    make_folder(args.feature_root, "feature_root")
    check_decoder(args)
    clip = clip_spec(args)
    windows = StridedWindows(clip, args.stride or clip.seconds)
    weights = file_checksum(args.pretrain_cnn_path, "pretrain_cnn_path")
    settings = feature_settings(weights, layer=args.layer, amp=args.amp, **windows.settings)
    model = inference_model(args, device, joint_space=args.layer == "embedding")
    root = Path(args.feature_root)
    to_do = [item for item in items if not is_done(root / item.features, item.video, settings)]
    part = f" of shard {shard.index} of {shard.count}" if shard.count > 1 else ""
    log.info("videos%s: %d, already done: %d", part, len(items), len(items) - len(to_do))

    failures = FailureList(root, shard)
    num_windows = num_black = 0
    outcomes = strided_features(
        model,
        [Path(args.video_path, item.video) for item in to_do],
        device,
        windows,
        batch_size=args.batch_size_val,
        workers=workers_per_rank(args.num_thread_reader, shard.nproc_per_node),
        sample_timeout=args.sample_timeout,
        mixed5c=args.layer == "mixed_5c",
    )
    with contextlib.closing(outcomes):
        for index, found, error in track_progress(outcomes, len(to_do)):
            item = to_do[index]
            if error:
                log.warning("no features: %s", error)
                failures.add(item.video, error)
                continue
            write_pair(root / item.features, item.video, settings, found)
            num_windows += len(found.starts)
            num_black += len(found.black)
    log.info("features written to %s (videos: %d)", root, len(to_do) - failures.count)
    if failures.count:
        where = f"listed in {failures.path}" if failures.complete else "named above"
        log.error("videos that could not be used: %d, %s", failures.count, where)
    mostly_black = 2 * num_black > num_windows
    if mostly_black:
        log.error(
            "black windows: %d of %d; check the videos, try the other --decoder, and delete these "
            "features before the next run",
            *(num_black, num_windows),
        )
    if failures.count or mostly_black:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, "stopped: the same command resumes")
