"""Prepare HowTo100M: from what its authors publish to what the training reads.

    python data/howto100m/prepare.py pack --caption_root SOURCE --out STORE
    python data/howto100m/prepare.py list --video_path VIDEOS --caption_root CAPTIONS

`pack` makes a caption store of a folder of caption files, in the same folders as the videos, or of
one file for all videos. The folder has a file per video, of any of these formats:

    <video>.csv                     start, end, text; of HowTo100M
    <video>.json                    Whisper's or WhisperX's
    <video>.en.vtt, <video>.en.srt  subtitles as yt-dlp leaves them, also without the language

If a video has several, the first that can be used counts, in that order. Those that state another
language than --language are not used. YouTube's automatic subtitles repeat lines while they roll;
the store has each once. The one file is JSON (caption.json or raw_caption.json of HowTo100M, or the
sentencified one: {video id: {"start": [...], "end": [...], "text": [...]}}) or HTM-AA's CSV file
(vid, timestamp, text). A video finds its captions by its path without extension, as in the folder.
In the store of one file, and with --by_id in that of a folder, it also finds them by its file name
alone, whatever folder it is in. Videos without a usable caption are reported and skipped.

`list` writes the training's video list: the files below VIDEOS that have captions in CAPTIONS,
which is any source of pack or a store. It compares names and opens no file of a folder, except for
--min_captions, which counts captions, and for --min_duration and --max_duration, which open each
video. --exclude skips the videos of evaluations. It takes HTM-Align's JSON, CrossTask's
videos.csv or videos_val.csv, YouCook2's table or official JSON, or a list with an id per line.
"""

import argparse
import csv
import io
import math
import multiprocessing.pool
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from annotations.video_ids import read_video_ids
from args import Parser, check_absent, check_new_output, files_below, not_negative, positive
from captions.packing import write_store
from captions.readers import CaptionError, CaptionStore, is_store, lookup_keys
from captions.sources import (
    OtherLanguage,
    find_caption_files,
    find_tag,
    is_language,
    is_one_file,
    iter_captions,
    read_folder,
)
from utils import DataError, InputError, atomic_write, input_error, printable, run_stoppable_script

# ---- pack ----------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """What a store has, and by video why others are skipped."""

    videos: int
    captions: int
    left_out: dict[str, CaptionError]


def pack(options: argparse.Namespace) -> None:
    source = options.caption_root
    check_absent(options.out, "out")  # before the work
    if is_store(source):
        raise InputError(f"--caption_root: {source} is already a store; use it as it is")
    by_id = options.by_id or is_one_file(source)
    packed = pack_source(
        source, options.out, by_id=by_id, language=options.language, workers=options.num_workers
    )
    unusable, others = report_left_out(packed.left_out)
    print(f"{options.out}: {packed.captions:,} captions of {packed.videos:,} videos", end="")
    print(f"; {unusable:,} videos have no usable caption" if unusable else "")
    if others:
        print(f"skipped: {others}")


def report_left_out(left_out: dict[str, CaptionError]) -> tuple[int, str]:
    """Print why videos have no usable caption. Returns how many, and those in other languages."""
    others = Counter(e.language for e in left_out.values() if isinstance(e, OtherLanguage))
    unusable = [e for e in left_out.values() if not isinstance(e, OtherLanguage)]
    for error in unusable:
        print(f"skipped: {error}", file=sys.stderr)
    counts = ", ".join(f"{printable(tag)} {n:,}" for tag, n in others.most_common())
    return len(unusable), f"{others.total():,} videos in other languages ({counts})" * bool(others)


def pack_source(
    source: str,
    out: str | os.PathLike[str],
    *,
    by_id: bool,
    language: str,
    workers: int,
    flag: str = "--caption_root",
) -> Packed:
    """Write the store of a source. flag: the one that named the source. Raises InputError."""
    with input_error(flag):
        outcomes = iter_captions(source, workers, by_id=by_id, language=language)
    left_out, formats = {}, Counter()

    def usable():
        with input_error(flag):
            for name, captions, kind in outcomes:
                if isinstance(captions, CaptionError):
                    left_out[name] = captions
                else:
                    formats[kind] += 1
                    yield name, *captions
            if not formats:
                unusable, others = report_left_out(left_out)
                unusable = f"{unusable:,} videos have none that are intact" * bool(unusable)
                reasons = "; ".join(filter(None, (unusable, others)))
                advice = "give another source" + " or --language" * bool(others)
                raise DataError(source, f"has no captions that can be used: {reasons}; {advice}")

    origin = {"source": str(source), "formats": formats, "language": language}
    with closing(outcomes), input_error("--out"):
        counts = write_store(out, usable(), by_id=by_id, origin=origin)
    return Packed(*counts, left_out)


# ---- list ----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The captions of a source: how many each video has, and what cannot be used."""

    counts: dict[str, int]  # by the videos' names; 1 where they are not counted
    by_id: bool
    unusable: set[str]
    others: set[str]  # in another language


def make_list(options: argparse.Namespace) -> None:
    from video_decoder import EXTENSIONS  # loads torch, for which --help should not wait

    check_new_output(options.out, "out")
    if options.min_duration > options.max_duration:
        raise InputError("--min_duration is above --max_duration; no video is between them")
    videos = files_below(options.video_path, "video_path", EXTENSIONS)
    if not videos:
        raise InputError(f"--video_path: there is no video in {options.video_path}")
    with input_error("--exclude"):
        exclude = {path: read_video_ids(path) for path in options.exclude}
    with input_error("--caption_root"):
        found = find_captions(
            options.caption_root, options.language, options.min_captions > 1, options.num_workers
        )
    names, by_id = found.counts.keys(), found.by_id
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
    unpaired = names - pairs.keys()
    left_out = [  # (which, what they are, more about them)
        (without, "videos without captions", hint),
        (unlistable, "videos whose name is not UTF-8 or has a line end in it", ""),
        (unpaired, "captions without a video", ""),
        (found.unusable, "videos whose captions are unusable", ""),
        (found.others, "videos whose captions are in another language", ""),
    ]
    excluded = {path: find_excluded(pairs.values(), ids) for path, ids in exclude.items()}
    of_evaluations = {video for some in excluded.values() for video in some}
    pairs = {name: video for name, video in pairs.items() if video not in of_evaluations}
    left_out += [(some, f"videos of {printable(path)}", "") for path, some in excluded.items()]
    few = [name for name in pairs if found.counts[name] < options.min_captions]
    what = f"videos with fewer than {options.min_captions} captions"
    left_out.append(([pairs.pop(name) for name in few], what, ""))
    if (options.min_duration, options.max_duration) != (0, math.inf):
        left_out += take_by_duration(pairs, options)
    if not pairs:
        counts = "; ".join(f"{len(some):,} {what}" for some, what, _ in left_out if some)
        raise InputError(f"--video_path: no video is left for the list: {counts}")
    with input_error("--out"):
        write_list(options.out, pairs.values())
    print(f"{options.out}: {len(pairs):,} videos with captions")
    for some, what, more in left_out:
        if some:
            print(f"skipped: {len(some):,} {what}, such as {printable(min(some))}{more}")
    for path in exclude:
        if not excluded[path]:
            print(
                f"--exclude: no video has an id of {printable(path)}; an id is a file's name, or "
                "the end of it in brackets",
                file=sys.stderr,
            )


def find_captions(root: str, language: str, count: bool, num_workers: int) -> Found:
    """Find the captions in a folder, a store or a file for all videos.

    count: read the files of a folder, to count their captions; otherwise names are compared, and
    only JSON is read, as it may be a video's metadata. Raises DataError or OSError.
    """
    if is_store(root):
        store = CaptionStore(root)
        return Found(dict(zip(store.names, store.counts, strict=True)), store.by_id, set(), set())
    counts, unusable, others = {}, set(), set()
    if by_id := is_one_file(root):
        outcomes = iter_captions(root, num_workers, language=language)
    else:
        unread = []
        for video in find_caption_files(root, language):
            tags = {path: find_tag(video.name, path) for path in video.paths}
            paths = [path for path, tag in tags.items() if not tag or is_language(tag, language)]
            if not paths:
                others.add(video.name)
            elif count or all(path.lower().endswith(".json") for path in paths):
                unread.append(video)
            else:
                counts[video.name] = 1
        outcomes = read_folder(root, unread, num_workers, language) if unread else ()
    for name, captions, _ in outcomes:
        if isinstance(captions, OtherLanguage):
            others.add(name)
        elif isinstance(captions, CaptionError):
            unusable.add(name)
        else:
            counts[name] = len(captions[2])
    if not counts:
        raise DataError(root, "has no captions that can be used; give another source")
    return Found(counts, by_id, unusable, others)


def find_excluded(videos: Iterable[str], ids: set[str]) -> list[str]:
    """Return the videos of these ids.

    A video's id is its file's name, or the end of it in brackets, as yt-dlp names files.
    """

    def is_excluded(video):
        stem = PurePosixPath(video).stem
        bracketed = re.search(r"\[([^\[\]]+)\]$", stem)
        return stem in ids or (bracketed is not None and bracketed[1] in ids)

    return [video for video in videos if is_excluded(video)]


def take_by_duration(
    pairs: dict[str, str], options: argparse.Namespace
) -> list[tuple[list[str], str, str]]:
    """Take out of the pairs the videos that are too short, too long, or not known to be neither.

    Returns each kind, what it is, and more about it.
    """
    short, long, unknown, reasons = [], [], [], []
    with multiprocessing.pool.ThreadPool(options.num_workers) as pool:
        paths = [os.path.join(options.video_path, video) for video in pairs.values()]
        durations = pool.imap(read_duration, paths, chunksize=16)
        durations = list(tqdm(durations, "durations", len(paths), unit="video", disable=None))
    for (name, video), duration in zip(list(pairs.items()), durations, strict=True):
        if isinstance(duration, str):
            unknown.append(video)
            reasons.append(duration)
        elif duration < options.min_duration:
            short.append(video)
        elif duration > options.max_duration:
            long.append(video)
        else:
            continue
        del pairs[name]
    return [
        (short, f"videos shorter than {options.min_duration:g} s", ""),
        (long, f"videos longer than {options.max_duration:g} s", ""),
        (unknown, "videos whose duration cannot be read", "".join(f" ({r})" for r in reasons[:1])),
    ]


def read_duration(path: str) -> float | str:
    """Return a video's duration in seconds, or why it is not known."""
    from video_decoder import DecodeError, probe_duration

    try:
        return probe_duration(path)
    except DecodeError as error:
        return str(error)


def pair(
    videos: list[str], names: Collection[str], by_id: bool
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

    def add_common(add):
        add("--language", default="en", help="of the captions, where stated (default: %(default)s)")
        add(
            "--num_workers",
            type=positive(int),
            default=len(os.sched_getaffinity(0)),
            help="processes that read files (default: one per core)",
        )

    add = commands.add_parser("pack", help="make one caption store").add_argument
    add("--caption_root", required=True, help="folder of caption files, or one file for all videos")
    add("--out", required=True, help="the store's folder, a new one")
    add("--by_id", action="store_true", help="videos also find captions by file name alone")
    add_common(add)
    commands.choices["pack"].set_defaults(run=pack)

    add = commands.add_parser("list", help="write the video list").add_argument
    add("--video_path", required=True, help="folder of the videos")
    add("--caption_root", required=True, help="folder of caption files, store or file")
    add("--out", default="data/howto100m_videos.csv", help="the list (default: %(default)s)")
    add(
        "--min_duration",
        type=not_negative(float),
        default=0.0,
        help="seconds; shorter videos are skipped",
    )
    add("--max_duration", type=positive(float), default=math.inf, help="seconds, likewise")
    add("--min_captions", type=positive(int), default=1, help="fewest captions of a video")
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="annotations of evaluations, or lists of ids: their videos are skipped",
    )
    add_common(add)
    commands.choices["list"].set_defaults(run=make_list)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    options.run(options)


if __name__ == "__main__":
    run_stoppable_script(main)
