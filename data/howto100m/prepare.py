"""Prepare HowTo100M: from what its authors publish to what the training reads.

    python data/howto100m/prepare.py pack --caption_root SOURCE --out STORE
    python data/howto100m/prepare.py list --video_path VIDEOS --caption_root CAPTIONS

`pack` makes a caption store of a folder of caption files (1.2 million small CSV files, in the same
folders as the videos) or of the JSON file in which the captions are also published (caption.json or
raw_caption.json: {video id: {"start": [...], "end": [...], "text": [...]}}). A video finds its
captions by its path without extension, as in the folder. In the store of a JSON file, and with
--by_id in that of a folder, it also finds them by its file name alone, whatever folder it is in.
Videos without a usable caption are reported and skipped.

`list` writes the training's video list: the files below VIDEOS that have captions in CAPTIONS,
which is a folder, a store or the JSON file. It compares names and opens no CSV file.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, check_absent, check_new_output, files_below, positive
from captions.packing import write_store
from captions.readers import CaptionError, CaptionStore, is_store, lookup_keys, open_captions
from captions.sources import find_caption_files, iter_captions, read_caption_json
from utils import DataError, InputError, atomic_write, input_error, printable, run_stoppable_script

# ---- pack ----------------------------------------------------------------------------------------


def pack(options: argparse.Namespace) -> None:
    source = options.caption_root
    check_absent(options.out, "out")  # before the work
    if is_store(source):
        raise InputError(f"--caption_root: {source} is already a store; use it as it is")
    by_id = options.by_id or os.path.isfile(source)
    with input_error("--caption_root"):
        videos = iter_captions(source, options.num_workers, by_id=options.by_id)
    unusable = []

    def usable():
        found = False
        with input_error("--caption_root"):
            for name, captions in videos:
                if isinstance(captions, CaptionError):
                    unusable.append(captions)
                else:
                    found = True
                    yield name, *captions
            if not found:
                raise DataError(source, "has no captions with usable times; give another source")

    with closing(videos), input_error("--out"):
        num_videos, num_captions = write_store(options.out, usable(), by_id=by_id)
    for error in unusable:
        print(f"skipped: {error}", file=sys.stderr)
    print(f"{options.out}: {num_captions:,} captions of {num_videos:,} videos", end="")
    print(f"; {len(unusable):,} videos have no usable caption" if unusable else "")


# ---- list ----------------------------------------------------------------------------------------


def make_list(options: argparse.Namespace) -> None:
    from video_decoder import EXTENSIONS  # loads torch, for which --help should not wait

    check_new_output(options.out, "out")
    videos = files_below(options.video_path, "video_path", EXTENSIONS)
    if not videos:
        raise InputError(f"--video_path: there is no video in {options.video_path}")
    with input_error("--caption_root"):
        names, by_id, unusable = find_captions(options.caption_root)
    with input_error("--video_path"):
        pairs, without, unlistable = pair(videos, names, by_id)

    alone = 0 if by_id else sum(PurePosixPath(video).stem in names for video in without)
    hint = f" ({alone:,} have by their names alone: pack the captions with --by_id)" * bool(alone)
    if not pairs:
        [video] = (without or unlistable)[:1]
        looked_for = printable(" or ".join(lookup_keys(video, by_id)))
        raise InputError(
            f"--caption_root: none of {len(videos):,} videos has captions in {options.caption_root}"
            f": {looked_for} is not among them, {printable(min(names))} is{hint}"
        )
    with input_error("--out"):
        write_list(options.out, pairs.values())
    print(f"{options.out}: {len(pairs):,} videos with captions")
    for found, what, more in (
        (without, "videos without captions", hint),
        (unlistable, "videos whose name is not UTF-8 or has a line end in it", ""),
        (names - pairs.keys(), "captions without a video", ""),
        (unusable, "videos whose captions are unusable", ""),
    ):
        if found:
            print(f"not in it: {len(found):,} {what}, such as {printable(min(found))}{more}")


def find_captions(root: str) -> tuple[set[str], bool, set[str]]:
    """Find the captions in a folder, a store or the JSON file.

    Returns their names, whether they go by_id, and the names of videos with unusable captions, as
    far as they are read: only those of the JSON file are. Raises DataError or OSError.
    """
    if os.path.isfile(root):
        names, unusable = set(), set()
        for name, captions in read_caption_json(root):
            (unusable if isinstance(captions, CaptionError) else names).add(name)
        if not names:
            raise DataError(root, "has no captions with usable times; give another file")
        return names, True, unusable
    captions = open_captions(root)
    if isinstance(captions, CaptionStore):
        return set(captions.names), captions.by_id, set()
    return set(find_caption_files(root)), False, set()


def pair(
    videos: list[str], names: set[str], by_id: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Pair videos with the names of their captions.

    Returns {name: video}, the videos without captions, and those that a list cannot hold. Raises
    ValueError if two videos have the same captions.
    """
    pairs, without, unlistable = {}, [], []
    duplicates = 0
    for video in videos:
        name = next((name for name in lookup_keys(video, by_id) if name in names), None)
        if not is_listable(video):
            unlistable.append(video)
        elif name is None:
            without.append(video)
        elif pairs.setdefault(name, video) != video:
            duplicates += 1
            print(f"duplicate: {printable(pairs[name])} and {printable(video)}", file=sys.stderr)
    if duplicates:
        raise ValueError(
            f"{duplicates:,} videos have the captions of another one (see above), so they are the "
            "same video; keep one"
        )
    return pairs, without, unlistable


def is_listable(video: str) -> bool:
    try:
        return video.encode().splitlines() == [video.encode()]
    except UnicodeEncodeError:
        return False


def write_list(path: str, videos: Iterable[str]) -> None:
    """Write a video list that video_loader.read_video_list reads. Raises OSError."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("video_path",))
        writer.writerows((video,) for video in videos)
        text.flush()
        text.detach()


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="pack|list")

    add = commands.add_parser("pack", help="make one caption store").add_argument
    add("--caption_root", required=True, help="folder of caption files, or the JSON file")
    add("--out", required=True, help="the store's folder, a new one")
    add("--by_id", action="store_true", help="videos also find captions by file name alone")
    cores = len(os.sched_getaffinity(0))
    add(
        "--num_workers",
        type=positive(int),
        default=cores,
        help="processes that read the folder (default: one per core)",
    )
    commands.choices["pack"].set_defaults(run=pack)

    add = commands.add_parser("list", help="write the video list").add_argument
    add("--video_path", required=True, help="folder of the videos")
    add("--caption_root", required=True, help="folder of caption files, store or JSON file")
    add("--out", default="data/howto100m_videos.csv", help="the list (default: %(default)s)")
    commands.choices["list"].set_defaults(run=make_list)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    options.run(options)


if __name__ == "__main__":
    run_stoppable_script(main)
