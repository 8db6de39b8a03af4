"""Features all along videos.

    python extract_features.py --pretrain_cnn_path FILE --video_path DIR --feature_root OUT

For each video OUT gets a .npy, float32 [W, 1024] or [W, 512], a row a window, and beside it a .json
that says what the rows are. Videos that have both are passed over, so the same command goes on
where it was stopped. Started several times, by torchrun, srun, as a SLURM job array or with
--shard, the processes share the videos. Which windows a video has is said in video_windows.py.
"""

import contextlib
import csv
import io
import json
import posixpath
import re
import sys
from pathlib import Path

import numpy as np
import torch

from annotations.tables import cell_error, read_table, require_non_empty, require_unique
from args import check_decoder, get_args
from distributed.device import pick_device
from distributed.launch import detect_shard, workers_per_rank
from evaluation.feature_file import difference, feature_settings
from evaluation.features import inference_model, strided_features, with_progress
from utils import (
    InputError,
    append,
    atomic_write,
    check_folder,
    files_below,
    input_error,
    log,
    make_folder,
    one_line,
    run_script,
    setup_logging,
)
from video_decoder import EXTENSIONS

COLUMNS = ["video_path", "feature_path"]


def video_list(args):
    """(video, file of its features) pairs, of --feature_csv or of all videos in --video_path.

    Paths are relative to --video_path and to --feature_root. No two videos share a file.
    """
    check_folder(args.video_path, "video_path")
    if args.feature_csv:
        with input_error("--feature_csv"):
            table = read_feature_csv(args.feature_csv)
        videos = list(zip(table["video_path"], table["feature_path"], strict=True))
    else:
        found = {}
        for path in map(Path, files_below(args.video_path, "video_path", EXTENSIONS)):
            other = found.setdefault(path.with_suffix(".npy"), path)
            if other != path:
                raise InputError(
                    f"--video_path: {other} and {path} would have one file of features: rename one "
                    "of them, or name the files in a --feature_csv"
                )
        videos = [(str(path), str(feature)) for feature, path in found.items()]
    if not videos:
        raise InputError(f"no videos in {args.feature_csv or args.video_path}: name others")
    return videos


def read_feature_csv(path):
    """Return a table of videos and files of features, whose paths are normalized."""
    table = read_table(path, COLUMNS, names=COLUMNS)
    require_non_empty(table, COLUMNS, path)
    for row, name in enumerate(table["feature_path"]):
        if not name.endswith(".npy"):
            fault = "is not the name of a .npy file; end it with .npy"
            raise cell_error(path, row, "feature_path", name, fault)
    table["feature_path"] = table["feature_path"].map(posixpath.normpath)
    return require_unique(table, ["feature_path"], path)


def is_done(path, video, settings):
    """Whether there are features of this video at `path`, whole, and their side file.

    Raises InputError where they are of something else: nobody's work is written over.
    """
    side = path.with_suffix(".json")
    if not path.exists() and not side.exists():
        return False
    mend = "name another folder, or delete them"
    try:
        made = json.loads(side.read_bytes())
        of, differ = made["video"], difference(made["settings"], settings)
        rows = len(made["times"])
    except FileNotFoundError:
        raise InputError(
            f"--feature_root: the features {path} have no {side.name} that says what they are: "
            f"{mend}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"--feature_root: {side} is damaged, or of something else: {mend}"
        ) from None
    if differ:
        raise InputError(f"--feature_root: the features {path} were made with {differ}: {mend}")
    if of != video:
        raise InputError(f"--feature_root: the features {path} are of {of}, not {video}: {mend}")
    try:
        return len(np.load(path, mmap_mode="r")) == rows
    except (FileNotFoundError, EOFError, ValueError, TypeError):
        return False  # none, or a file that lost its end: made again


def write_pair(path, video, settings, found):
    """Writes the side file and then the features, each whole or not at all.

    In this order, whoever finds features finds what they are beside them.
    """
    length = settings["num_frames"] / settings["fps"]
    side = {
        "video": video,
        "times": [[start, round(start + length, 6)] for start in found.starts],
        "black": found.black,
        "settings": settings,
    }
    make_folder(path.parent, "feature_root")
    try:
        with atomic_write(path.with_suffix(".json")) as file:
            file.write(json.dumps(side).encode())
        with atomic_write(path) as file:
            np.save(file, found.features, allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"--feature_root: could not write {path} ({one_line(error)}): make room, and start "
            "again to go on from here"
        ) from None


def new_failures(root, share):
    """The path of this share's list of videos without features, of which there is none yet.

    Lists of runs before go: their videos are tried again. So do those of another number of shares;
    of this number, the others' are for the others to remove.
    """
    for path in root.glob("failed*.csv"):
        match = re.fullmatch(r"failed(?:_(\d+)of(\d+))?\.csv", path.name)
        if match and int(match[2] or 1) != share.count:
            with contextlib.suppress(OSError):
                path.unlink()
    name = f"failed_{share.index}of{share.count}.csv" if share.count > 1 else "failed.csv"
    with contextlib.suppress(OSError):
        (root / name).unlink()
    return root / name


def main():
    args = get_args(__doc__, "extract_features")
    setup_logging(args.verbose)
    share = detect_shard(args.shard)
    with input_error("--device, --gpu"):
        local_rank = share.local_rank % max(1, torch.cuda.device_count())
        device = pick_device(args.device, args.gpu, local_rank)
    videos = video_list(args)[share.index :: share.count]
    if not args.feature_root:
        raise InputError("--feature_root is needed: give the folder that features are written to")
    make_folder(args.feature_root, "feature_root")
    args.stride = args.stride or args.num_frames / args.fps
    check_decoder(args)
    settings = feature_settings(args, ("layer", "fps", "stride"))
    model = inference_model(args, device)
    root = Path(args.feature_root)
    to_do = [(v, root / f) for v, f in videos if not is_done(root / f, v, settings)]
    part = f", share {share.index} of {share.count}" if share.count > 1 else ""
    log.info("%d videos%s, %d of them done before", len(videos), part, len(videos) - len(to_do))

    failures, unlisted = new_failures(root, share), 0
    failed = windows = black = 0
    outcomes = strided_features(
        model,
        [Path(args.video_path, video) for video, _ in to_do],
        device,
        num_frames=args.num_frames,
        size=args.video_size,
        fps=args.fps,
        stride=args.stride,
        batch_size=args.batch_size_val,
        workers=workers_per_rank(args.num_thread_reader, share.nproc_per_node),
        sample_timeout=args.sample_timeout,
        decoder=args.decoder,
        mixed5c=args.layer == "mixed_5c",
    )
    with contextlib.closing(outcomes):
        for index, found in with_progress(outcomes, len(to_do)):
            video, path = to_do[index]
            if isinstance(found, str):
                failed += 1
                log.warning("no features: %s", found)
                rows = [("video_path", "reason")] * (failed == 1) + [(video, one_line(found))]
                text = io.StringIO(newline="")
                csv.writer(text, lineterminator="\n").writerows(rows)
                unlisted += not append(failures, text.getvalue())
                continue
            write_pair(path, video, settings, found)
            windows += len(found.starts)
            black += len(found.black)
    log.info("features of %d videos written to %s", len(to_do) - failed, root)
    if failed:
        where = "named above" if unlisted else f"listed in {failures}"
        log.error("%d videos could not be used: they are %s", failed, where)
    mostly_black = 2 * black > windows
    if mostly_black:
        log.error(
            "%d of %d windows are black: look at the videos, try the other --decoder, and delete "
            "these features before the next run",
            *(black, windows),
        )
    if failed or mostly_black:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
