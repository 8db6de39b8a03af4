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
import json
import os
import signal
import sys
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, positive
from caption_store import (
    CaptionError,
    CaptionStore,
    caption_names,
    is_store,
    open_captions,
    read_captions,
    usable_captions,
    write_store,
)
from utils import (
    InputError,
    check_absent,
    check_folder,
    die_with_parent,
    files_below,
    one_line,
    run_script,
    write_whole,
)
from video_decoder import EXTENSIONS

CHUNK = 1 << 20  # characters of a JSON file read at a time
LARGEST_VIDEO = 1 << 26  # characters of a video's captions in it; they have some ten thousand
DECODE = json.JSONDecoder().raw_decode
SKIP = json.decoder.WHITESPACE.match
FILES = 64  # caption files that a process reads at a time


# ---- the JSON file -------------------------------------------------------------------------------


def read_json(path):
    """Yields (video id, its captions or a CaptionError), one video in memory at a time.

    Raises InputError where this is not a whole JSON file of captions.
    """

    def wrong(reason):
        return InputError(
            f"--caption_root: {path} is not a JSON file of captions: {reason}: give an intact "
            'file of {video id: {"start": [...], "end": [...], "text": [...]}}'
        )

    seen = set()
    try:
        with (
            open(path, encoding="utf-8-sig", newline="") as file,
            tqdm(total=os.path.getsize(path), unit="B", unit_scale=True) as progress,
        ):
            for name, value in json_members(file):
                if name in seen:
                    raise ValueError(f"video {name!r} is in it twice")
                seen.add(name)
                starts, ends, texts = captions_of(name, value)
                try:
                    yield name, usable_captions(starts, ends, texts, f"{path}, video {name!r}")
                except CaptionError as error:
                    yield name, error
                progress.update(file.buffer.tell() - progress.n)
    except UnicodeDecodeError:
        raise wrong("it is not UTF-8 text") from None
    except ValueError as error:
        raise wrong(one_line(error)) from None
    except OSError as error:
        raise InputError(f"--caption_root: {path} cannot be read: {error.strerror}") from None


def json_members(file):
    """Yields (key, value) of the object in a JSON file, one in memory at a time.

    The members are parsed by Python's json, which takes the NaN that it writes itself for a missing
    text; streaming parsers (ijson) refuse that. Raises ValueError where it is no whole object.
    """
    text, at, before = "", 0, 0  # `text` is from the file's character `before`, `at` what is next
    separator = "{"
    while separator:
        try:
            member, separator, at = next_member(text, at, separator)
        except (ValueError, RecursionError) as error:
            rest = len(text) - at
            more = file.read(max(CHUNK, rest)) if rest < LARGEST_VIDEO else ""
            if not more:
                where, reason = getattr(error, "pos", at), getattr(error, "msg", one_line(error))
                if where >= len(text) or reason.startswith("Unterminated"):
                    reason = "it is cut short"
                raise ValueError(f"{reason}, at character {before + where:,}") from None
            before += at
            text, at = text[at:] + more, 0
            continue
        if member:
            yield member
    if (text[at:] + file.read(CHUNK)).strip():
        raise ValueError(f"more follows the object's end, character {before + at:,}")


def next_member(text, at, separator):
    """What follows at text[at], where the separator, "{" or ",", is due.

    Returns (member, next separator, where it is due): the member is (key, value), or None at the
    end of an empty object; the next separator is "" at the object's end. Raises ValueError, also
    where the text ends before that is known.
    """

    def pass_over(character, at):
        at = SKIP(text, at).end()
        if text[at : at + 1] != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
        return SKIP(text, at + 1).end()

    at = pass_over(separator, at)
    if separator == "{" and text[at : at + 1] == "}":
        return None, "", at + 1
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting a name in quotes", text, at)
    key, at = DECODE(text, at)
    value, at = DECODE(text, pass_over(":", at))
    end = SKIP(text, at).end()
    if text[end : end + 1] == "}":
        return (key, value), "", end + 1
    if text[end : end + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' or '}'", text, end)
    return (key, value), ",", end


def captions_of(name, value):
    """start and end (float arrays) and a list of texts of a video in the JSON file.

    null and NaN are a missing time, or an empty text. Raises ValueError where these are not three
    lists of one length.
    """
    name.encode()
    columns = [value.get(key) for key in ("start", "end", "text")] if type(value) is dict else [0]
    if any(type(column) is not list for column in columns):
        raise ValueError(f"video {name!r} has not the lists start, end and text")
    if len(set(map(len, columns))) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"the lists start, end and text of video {name!r} are {lengths} long")
    try:
        starts, ends = (np.array(column, float) for column in columns[:2])
        if starts.ndim != 1 or ends.ndim != 1:
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a time of video {name!r} is not a number") from None
    texts = ["" if text is None or text != text else text for text in columns[2]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of video {name!r} is not one")
    # Half of a surrogate pair is no character, and no part of a word.
    return starts, ends, [text.encode(errors="replace").decode() for text in texts]


# ---- the folder ----------------------------------------------------------------------------------


def caption_files(folder):
    """The caption files in a folder, which are the captions' names: paths without `.csv`."""
    files = files_below(folder, "caption_root", {".csv"})
    names = [file.removesuffix(".csv") for file in files if file.endswith(".csv")]
    if not names:
        raise InputError(f"--caption_root: there is no caption file (.csv) in {folder}")
    return names


def read_folder(folder, files, num_workers):
    """Yields (name, its captions or a CaptionError) in the order of the files: (name, path without
    `.csv`)."""
    chunks = [files[i : i + FILES] for i in range(0, len(files), FILES)]
    context = get_context("fork")
    readers = []
    try:
        for number in range(num_workers):
            # A pipe each, of which only the process has the other end: it tells when that is gone.
            results, end = context.Pipe(duplex=False)
            share = chunks[number::num_workers]
            process = context.Process(target=read_files, args=(folder, share, end), daemon=True)
            process.start()
            end.close()
            readers.append((process, results))
        with tqdm(total=len(files), unit="file") as progress:
            for number in range(len(chunks)):
                try:
                    captions = readers[number % num_workers][1].recv()
                except (EOFError, OSError):  # between two results, in the middle of one
                    raise InputError(
                        "--num_workers: a process that reads was killed, for lack of memory "
                        "perhaps: give a smaller number"
                    ) from None
                yield from captions
                progress.update(len(captions))
    finally:
        for process, results in readers:
            process.kill()
            process.join()
            results.close()


def read_files(folder, chunks, results):
    """What a reading process does. It waits where its results are not taken."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for chunk in chunks:
        results.send([(name, read_file(f"{folder}/{path}.csv")) for name, path in chunk])


def read_file(path):
    try:
        path.encode()
        return read_captions(path)
    except UnicodeEncodeError:
        return CaptionError(f"{shown(path)}: the file's name is not UTF-8")
    except CaptionError as error:
        return error
    except Exception as error:  # one strange file of a million does not end it, as in training
        return CaptionError(f"{shown(path)}: unexpected {type(error).__name__}: {error}")


# ---- pack ----------------------------------------------------------------------------------------


def pack(options):
    source = options.caption_root
    check_absent(options.out, "out")  # before the work
    if os.path.isfile(source):
        by_id, videos = True, read_json(source)
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
                f"--by_id: {shown(other)}.csv and {shown(path)}.csv have one name: "
                "remove one, or pack without --by_id"
            )
    return list(files.items())


# ---- list ----------------------------------------------------------------------------------------


def make_list(options):
    check_absent(options.out, "out")
    videos = files_below(options.video_path, "video_path", EXTENSIONS)
    if not videos:
        raise InputError(f"--video_path: there is no video in {options.video_path}")
    names, by_id, unusable = captions_there_are(options.caption_root)
    pairs, without, unlistable = pair(videos, names, by_id)

    alone = 0 if by_id else sum(PurePosixPath(video).stem in names for video in without)
    hint = f" ({alone:,} have by their names alone: pack the captions with --by_id)" * bool(alone)
    if not pairs:
        [video] = (without or unlistable)[:1]
        looked_for = " or ".join(caption_names(video, by_id))
        raise InputError(
            f"--caption_root: none of {len(videos):,} videos has captions in {options.caption_root}"
            f": {shown(looked_for)} is not among them, {shown(min(names))} is{hint}"
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
            print(f"not in it: {len(found):,} {what}, such as {shown(min(found))}{more}")


def captions_there_are(root):
    """The names of the captions in a folder, a store or the JSON file; whether they go by_id; and
    the names of videos whose captions, where they were looked at, are not usable."""
    if os.path.isfile(root):
        names, unusable = set(), set()
        for name, captions in read_json(root):
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
        name = next((name for name in caption_names(video, by_id) if name in names), None)
        if not is_listable(video):
            unlistable.append(video)
        elif name is None:
            without.append(video)
        elif pairs.setdefault(name, video) != video:
            twice += 1
            print(f"twice: {shown(pairs[name])} and {shown(video)}", file=sys.stderr)
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


def shown(name):
    """A file's name, whatever bytes it has, in a message."""
    return one_line(name.encode(errors="backslashreplace").decode())


def write_list(path, videos):
    try:
        with write_whole(path) as file:
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as at Ctrl-C
    try:
        run_script(main)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)
