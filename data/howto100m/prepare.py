"""Prepare HowTo100M: pack its captions into a store, and list the videos to train on.

    python data/howto100m/prepare.py pack --caption_root SOURCE --out STORE
    python data/howto100m/prepare.py list --video_path VIDEOS --caption_root CAPTIONS

`pack` makes a caption store from a folder of caption files, which has the same subfolders as that
of the videos, or from one file for all videos. The folder has one file per video, in any of these
formats:

    <video>.csv                     start, end, text, as in HowTo100M
    <video>.json                    Whisper's or WhisperX's
    <video>.en.vtt, <video>.en.srt  subtitles as yt-dlp writes them, also without the language

If a video has several, the first usable one in this order is taken. Files that state another
language than --language are skipped. YouTube's automatic subtitles repeat lines as they roll; the
store has each line once. The one file is JSON (caption.json or raw_caption.json of HowTo100M, or
the sentencified one: {video id: {"start": [...], "end": [...], "text": [...]}}) or HTM-AA's CSV
file (vid, timestamp, text). Captions are looked up by the video's path without extension. In the
store of one file, or of a folder with --by_id, they are also looked up by its file name alone,
whatever its folder. Videos without usable captions are reported and skipped.

`list` writes the video list for training: the files below VIDEOS that have captions in CAPTIONS, a
store or any source of `pack`. It compares file names. It opens files in a folder only to tell JSON
captions from metadata, to count captions (--min_captions), and to read the duration of videos
(--min_duration, --max_duration). --exclude skips the videos of evaluations. It takes HTM-Align's
JSON, CrossTask's videos.csv or videos_val.csv, YouCook2's table or official JSON, or a list with
one id per line.
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
from utils import (
    DataError,
    InputError,
    atomic_write,
    input_error,
    plural,
    printable,
    run_stoppable_script,
)

# ---- pack ----------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """How many videos and captions are in a store, and the errors of the skipped videos."""

    videos: int
    captions: int
    skipped: dict[str, CaptionError]


def pack(options: argparse.Namespace) -> None:
    source = options.caption_root
    check_absent(options.out, "out")  # before the work
    if is_store(source):
        raise InputError(f"--caption_root: {source} is already a store; use it as it is")
    by_id = options.by_id or is_one_file(source)
    packed = pack_source(
        source, options.out, by_id=by_id, language=options.language, workers=options.num_workers
    )
    unusable, others = report_skipped(packed.skipped)
    counts = f"{plural(packed.captions, 'caption')} of {plural(packed.videos, 'video')}"
    print(f"{options.out}: {counts}", end="")
    print(f"; {plural(unusable, 'video')} without usable captions" if unusable else "")
    if others:
        print(f"skipped: {others}")


def report_skipped(skipped: dict[str, CaptionError]) -> tuple[int, str]:
    """Print why videos have no usable captions.

    Returns the number of these videos, and a description of those in other languages.
    """
    others = Counter(e.language for e in skipped.values() if isinstance(e, OtherLanguage))
    unusable = [e for e in skipped.values() if not isinstance(e, OtherLanguage)]
    for error in unusable:
        print(f"skipped: {error}", file=sys.stderr)
    counts = ", ".join(f"{printable(tag)} {n:,}" for tag, n in others.most_common())
    described = f"{plural(others.total(), 'video')} in other languages ({counts})"
    return len(unusable), described * bool(others)


def pack_source(
    source: str,
    out: str | os.PathLike[str],
    *,
    by_id: bool,
    language: str,
    workers: int,
    flag: str = "--caption_root",
) -> Packed:
    """Pack a source into a store. flag: the one that named the source. Raises InputError."""
    with input_error(flag):
        outcomes = iter_captions(source, workers, by_id=by_id, language=language)
    skipped, formats = {}, Counter()

    def usable():
        with input_error(flag):
            for name, captions, kind in outcomes:
                if isinstance(captions, CaptionError):
                    skipped[name] = captions
                else:
                    formats[kind] += 1
                    yield name, *captions
            if not formats:
                unusable, others = report_skipped(skipped)
                unusable = f"{plural(unusable, 'video')} with invalid captions" * bool(unusable)
                reasons = "; ".join(filter(None, (unusable, others)))
                advice = "give another source" + " or --language" * bool(others)
                raise DataError(source, f"has no captions that can be used: {reasons}; {advice}")

    origin = {"source": str(source), "formats": formats, "language": language}
    with closing(outcomes), input_error("--out"):
        counts = write_store(out, usable(), by_id=by_id, origin=origin)
    return Packed(*counts, skipped)


# ---- list ----------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The captions of a source: how many each video has, and which cannot be used."""

    counts: dict[str, int]  # by the videos' names; 1 if captions are not counted
    by_id: bool
    unusable: set[str]
    others: set[str]  # in another language


class Skipped(NamedTuple):
    """Videos that are not in the list."""

    names: Collection[str]
    reason: str  # continues "2 videos"
    note: str = ""


def make_list(options: argparse.Namespace) -> None:
    from video_decoder import EXTENSIONS  # imports torch, which would slow down --help

    check_new_output(options.out, "out")
    if options.min_duration > options.max_duration:
        raise InputError("--min_duration is above --max_duration; lower it")
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
    hint = f" ({alone:,} would match by file name alone; pack the captions with --by_id)"
    hint *= bool(alone)
    if not pairs:
        [video] = (without or unlistable)[:1]
        looked_for = printable(" or ".join(lookup_keys(video, by_id)))
        raise InputError(
            f"--caption_root: none of {len(videos):,} videos has captions in "
            f"{options.caption_root}, which has those of {printable(min(names))} but not of "
            f"{looked_for}{hint}"
        )
    skipped = [
        Skipped(without, "without captions", hint),
        Skipped(unlistable, "whose name is not UTF-8 or contains a line break"),
        Skipped(names - pairs.keys(), "with captions but without a file"),
        Skipped(found.unusable, "whose captions are unusable"),
        Skipped(found.others, "whose captions are in another language"),
    ]
    excluded = {path: find_excluded(pairs.values(), ids) for path, ids in exclude.items()}
    of_evaluations = {video for some in excluded.values() for video in some}
    pairs = {name: video for name, video in pairs.items() if video not in of_evaluations}
    skipped += [Skipped(some, f"of {printable(path)}") for path, some in excluded.items()]
    few = [name for name in pairs if found.counts[name] < options.min_captions]
    reason = f"with fewer than {options.min_captions} captions"
    skipped.append(Skipped([pairs.pop(name) for name in few], reason))
    if (options.min_duration, options.max_duration) != (0, math.inf):
        skipped += remove_by_duration(pairs, options)
    skipped = [some for some in skipped if some.names]
    if not pairs:
        counts = "; ".join(f"{plural(len(some.names), 'video')} {some.reason}" for some in skipped)
        raise InputError(f"--video_path: no video is left for the list: {counts}")
    with input_error("--out"):
        write_list(options.out, pairs.values())
    print(f"{options.out}: {plural(len(pairs), 'video')} with captions")
    for some, reason, note in skipped:
        example = printable(min(some))
        print(f"skipped: {plural(len(some), 'video')} {reason}, such as {example}{note}")
    for path in exclude:
        if not excluded[path]:
            print(
                f"--exclude: no video has an id in {printable(path)}; an id is a file's name, or "
                "the part in brackets at its end",
                file=sys.stderr,
            )


def find_captions(root: str, language: str, count: bool, num_workers: int) -> Found:
    """Find the captions in a folder, a store or a file for all videos.

    count: read the files in a folder to count their captions. Otherwise only JSON files are read,
    because they may be metadata. Raises DataError or OSError.
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
    """Return the videos with these ids.

    A video's id is its file's name, or the part in brackets at its end, as yt-dlp names files.
    """

    def is_excluded(video):
        stem = PurePosixPath(video).stem
        bracketed = re.search(r"\[([^\[\]]+)\]$", stem)
        return stem in ids or (bracketed is not None and bracketed[1] in ids)

    return [video for video in videos if is_excluded(video)]


def remove_by_duration(pairs: dict[str, str], options: argparse.Namespace) -> list[Skipped]:
    """Remove the videos that are too short, too long or of unknown duration from the pairs."""
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
    note = "".join(f" ({reason})" for reason in reasons[:1])
    return [
        Skipped(short, f"shorter than {options.min_duration:g} s"),
        Skipped(long, f"longer than {options.max_duration:g} s"),
        Skipped(unknown, "whose duration cannot be read", note),
    ]


def read_duration(path: str) -> float | str:
    """Return a video's duration in seconds, or the reason why it cannot be read."""
    from video_decoder import DecodeError, probe_duration

    try:
        return probe_duration(path)
    except DecodeError as error:
        return str(error)


def pair(
    videos: list[str], names: Collection[str], by_id: bool
) -> tuple[dict[str, str], list[str], list[str]]:
    """Pair videos with the names of their captions.

    Returns {name: video}, the videos without captions, and those whose names a list cannot contain.
    Raises ValueError if two videos have the same captions.
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
            f"{plural(duplicates, 'video')} with the captions of another one (see above); keep one "
            "file of each video"
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
        add("--language", default="en", help="of the captions, if stated (default: %(default)s)")
        add(
            "--num_workers",
            type=positive(int),
            default=len(os.sched_getaffinity(0)),
            help="processes that read files (default: one per core)",
        )

    add = commands.add_parser("pack", help="make one caption store").add_argument
    add("--caption_root", required=True, help="folder of caption files, or one file for all videos")
    add("--out", required=True, help="new folder for the store")
    add("--by_id", action="store_true", help="look captions up by file name alone, too")
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
        help="seconds; skip shorter videos",
    )
    add(
        "--max_duration",
        type=positive(float),
        default=math.inf,
        help="seconds; skip longer videos",
    )
    add("--min_captions", type=positive(int), default=1, help="skip videos with fewer captions")
    add(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="skip the videos of these annotations of evaluations, or lists of ids",
    )
    add_common(add)
    commands.choices["list"].set_defaults(run=make_list)
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    options.run(options)


if __name__ == "__main__":
    run_stoppable_script(main)
