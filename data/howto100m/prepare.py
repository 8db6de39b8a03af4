"""From what the authors of HowTo100M hand out to what the training reads.

    python data/howto100m/prepare.py pack --caption_root SOURCE --out STORE
    python data/howto100m/prepare.py list --video_path VIDEOS --caption_root CAPTIONS

`pack` makes one caption store of a folder of caption files (1.2 million small CSV files, in the
folders that the videos are in) or of the single JSON file in which the captions are published as
well (caption.json or raw_caption.json: {video id: {"start": [...], "end": [...], "text": [...]}}).
A video finds its captions under its path without extension, as in the folder. In the store of a
JSON file, and with --by_id in that of a folder, it finds them under its file name alone, too,
whatever folder the video is in. Videos without a usable caption are told and left out.

`list` writes the training's video list: of the files under VIDEOS those that have captions in
CAPTIONS, which is a folder, a store or the JSON file. It goes by names and opens no CSV file.
"""

import argparse
import csv
import io
import os
import sys
from contextlib import closing
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, positive
from captions.packing import write_store
from captions.readers import CaptionError, CaptionStore, is_store, lookup_keys, open_captions
from captions.sources import caption_files, read_caption_json, read_folder
from utils import (
    InputError,
    atomic_write,
    check_absent,
    check_folder,
    check_new_output,
    files_below,
    printable,
    run_stoppable_script,
)
from video_decoder import EXTENSIONS

# ---- pack ----------------------------------------------------------------------------------------


def pack(options):
    source = options.caption_root
    check_absent(options.out, "out")  # before the work
    if os.path.isfile(source):
        by_id, videos = True, read_caption_json(source)
    else:
        check_folder(source, "caption_root")
        if is_store(source):
            raise InputError(f"--caption_root: {source} is a store already: use it as it is")
        by_id, paths = options.by_id, caption_files(source)
        files = files_by_id(paths) if by_id else [(path, path) for path in paths]
        videos = read_folder(source, files, options.num_workers)
    left_out = []

    def usable():
        for name, captions in videos:
            if isinstance(captions, CaptionError):
                left_out.append(captions)
            else:
                yield name, *captions

    with closing(videos):
        count, captions = write_store(options.out, usable(), by_id=by_id)
    for error in left_out:
        print(f"left out: {error}", file=sys.stderr)
    print(f"{options.out}: {captions:,} captions of {count:,} videos", end="")
    print(f"; {len(left_out):,} videos have no usable caption" if left_out else "")


def files_by_id(paths):
    """(file name, path) of caption files. Refuses two of one name in different folders."""
    files = {}
    for path in paths:
        other = files.setdefault(PurePosixPath(path).name, path)
        if other != path:
            raise InputError(
                f"--by_id: {printable(other)}.csv and {printable(path)}.csv have one name: "
                "remove one, or pack without --by_id"
            )
    return list(files.items())


# ---- list ----------------------------------------------------------------------------------------


def make_list(options):
    check_new_output(options.out, "out")
    videos = files_below(options.video_path, "video_path", EXTENSIONS)
    if not videos:
        raise InputError(f"--video_path: there is no video in {options.video_path}")
    names, by_id, unusable = captions_there_are(options.caption_root)
    pairs, without, unlistable = pair(videos, names, by_id)

    alone = 0 if by_id else sum(PurePosixPath(video).stem in names for video in without)
    hint = f" ({alone:,} have by their names alone: pack the captions with --by_id)" * bool(alone)
    if not pairs:
        [video] = (without or unlistable)[:1]
        looked_for = " or ".join(lookup_keys(video, by_id))
        raise InputError(
            f"--caption_root: none of {len(videos):,} videos has captions in {options.caption_root}"
            f": {printable(looked_for)} is not among them, {printable(min(names))} is{hint}"
        )
    write_list(options.out, pairs.values())
    print(f"{options.out}: {len(pairs):,} videos with captions")
    left = names - pairs.keys()
    for found, what, more in (
        (without, "videos without captions", hint),
        (unlistable, "videos whose name is not UTF-8 or has a line end in it", ""),
        (left, "captions without a video", ""),
        (unusable, "videos whose captions are unusable", ""),
    ):
        if found:
            print(f"not in it: {len(found):,} {what}, such as {printable(min(found))}{more}")


def captions_there_are(root):
    """The names of the captions in a folder, a store or the JSON file; whether they go by_id; and
    the names of videos whose captions, where they were looked at, are not usable."""
    if os.path.isfile(root):
        names, unusable = set(), set()
        for name, captions in read_caption_json(root):
            (unusable if isinstance(captions, CaptionError) else names).add(name)
        if not names:
            raise InputError(f"--caption_root: there are no captions in {root}")
        return names, True, unusable
    captions = open_captions(root)
    if isinstance(captions, CaptionStore):
        return {captions.names[i] for i in range(len(captions))}, captions.by_id, set()
    return set(caption_files(root)), False, set()


def pair(videos, names, by_id):
    """{name of captions: video}, the videos without captions, and those that no list can have.

    Raises InputError where two videos have the same captions.
    """
    pairs, without, unlistable = {}, [], []
    twice = 0
    for video in videos:
        name = next((name for name in lookup_keys(video, by_id) if name in names), None)
        if not is_listable(video):
            unlistable.append(video)
        elif name is None:
            without.append(video)
        elif pairs.setdefault(name, video) != video:
            twice += 1
            print(f"twice: {printable(pairs[name])} and {printable(video)}", file=sys.stderr)
    if twice:
        raise InputError(
            f"--video_path: {twice:,} videos have the captions of another one (see above): they "
            "are the same video: keep one"
        )
    return pairs, without, unlistable


def is_listable(video):
    try:
        return video.encode().splitlines() == [video.encode()]
    except UnicodeEncodeError:
        return False


def write_list(path, videos):
    try:
        with atomic_write(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(("video_path",))
            writer.writerows((video,) for video in videos)
            text.flush()
            text.detach()
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror}") from None


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="pack|list")

    add = commands.add_parser("pack", help="make one caption store").add_argument
    add("--caption_root", required=True, help="folder of caption files, or the JSON file")
    add("--out", required=True, help="the store's folder, which is not there yet")
    add("--by_id", action="store_true", help="videos find captions by their file names alone, too")
    cores = len(os.sched_getaffinity(0))
    add("--num_workers", type=positive(int), default=cores, help="processes that read the folder")
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
