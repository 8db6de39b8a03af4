"""Read all captions of a source, video by video.

A source is a folder of caption files in the formats of captions/formats.py, a caption store, or one
file with the captions of all videos: HowTo100M's JSON, the sentencified JSON, or HTM-AA's CSV.
"""

import json
import os
import re
import signal
from collections.abc import Collection, Iterator
from itertools import groupby, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import PurePosixPath
from typing import NamedTuple, TextIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from annotations.tables import read_table, require_non_empty
from captions.formats import parse_columns, parse_transcript
from captions.readers import (
    CaptionError,
    Captions,
    CaptionStore,
    check_root,
    is_store,
    usable_captions,
)
from utils import (
    STOP_SIGNALS,
    DataError,
    die_with_parent,
    hold_stop_signals,
    one_line,
    printable,
    shorten,
)

JSON_CHUNK = 1 << 20  # characters of a JSON file read at a time
LARGEST_VIDEO = 1 << 26  # characters; the captions of a video have some ten thousand
DECODE = json.JSONDecoder().raw_decode
WHITESPACE = json.decoder.WHITESPACE.match
FILES_PER_TASK = 64  # caption files that a process reads at a time

SUFFIXES = (".csv", ".json", ".vtt", ".srt")  # of caption files, in order of preference
NOT_CAPTIONS = (".info.json", ".live_chat.json")  # other files that yt-dlp writes beside videos
# As in `<video>.en-US.vtt`; yt-dlp also writes `en_US`, and `en-eEY6_EpapPo` for a creator's own.
LANGUAGE_TAG = re.compile(r"[a-z]{2,3}([-_][\w-]*)?")
# How some programs write the language in JSON.
LANGUAGE_NAMES = {
    "arabic": "ar",
    "chinese": "zh",
    "english": "en",
    "french": "fr",
    "german": "de",
    "hindi": "hi",
    "italian": "it",
    "japanese": "ja",
    "korean": "ko",
    "portuguese": "pt",
    "russian": "ru",
    "spanish": "es",
}
HTM_AA = ["vid", "timestamp", "text"]  # the columns of its CSV file


class OtherLanguage(CaptionError):
    """Raised if a video's captions are not in the requested language."""

    def __init__(self, message: str, language: str = ""):
        super().__init__(message)
        self.language = language


class Outcome(NamedTuple):
    """A video's name, its captions or their error, and their format."""

    name: str
    captions: Captions | CaptionError
    format: str = ""


def iter_captions(
    root: str, num_workers: int, *, by_id: bool = False, language: str = "en"
) -> Iterator[Outcome]:
    """Yield the Outcome of each video of a source.

    root: the source. num_workers: processes that read a folder. by_id: name the videos of a folder
    by the names of their caption files alone. language: of the captions to read; a file that states
    another language, in its content or name, gives an OtherLanguage. Raises DataError or OSError if
    the source as a whole cannot be used.
    """
    if is_one_file(root):
        return read_caption_table(root) if is_caption_table(root) else read_caption_json(root)
    if is_store(root):
        return read_store(CaptionStore(root))
    files = find_caption_files(root, language)
    return read_folder(root, name_by_id(root, files) if by_id else files, num_workers, language)


def is_one_file(root: str | os.PathLike[str]) -> bool:
    """Return whether a source is a file with the captions of all videos, not a folder or shard."""
    from video_decoder import is_shard  # imports torch, which would slow down --help

    return os.path.isfile(root) and not is_shard(root)


def read_store(store: CaptionStore) -> Iterator[Outcome]:
    """Yield the Outcome of each video of a caption store."""
    for place in tqdm(range(len(store)), unit="video", disable=None):
        name = store.names[place]
        try:
            yield Outcome(name, store.read_at(place), "store")
        except CaptionError as error:
            yield Outcome(name, error)


# ---- the JSON file -------------------------------------------------------------------------------


def read_caption_json(path: str) -> Iterator[Outcome]:
    """Yield the Outcome of each video id, with one video in memory at a time.

    Raises DataError if this is not a whole JSON file of captions.
    """
    seen = set()
    try:
        with (
            open(path, encoding="utf-8-sig", newline="") as file,
            tqdm(total=os.path.getsize(path), unit="B", unit_scale=True) as progress,
        ):
            for name, value in json_members(file):
                if name in seen:
                    raise ValueError(f"video {name!r} is duplicated")
                seen.add(name)
                name.encode()  # a lone surrogate raises a ValueError
                captions = parse_columns(f"video {name!r}", value)
                try:
                    captions = usable_captions(*captions, f"{path}, video {name!r}")
                    yield Outcome(name, captions, "JSON by video")
                except CaptionError as error:
                    yield Outcome(name, error)
                progress.update(file.buffer.tell() - progress.n)
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(
            path,
            f"is not a JSON file of captions ({reason}); give an intact file of "
            '{video id: {"start": [...], "end": [...], "text": [...]}}, or HTM-AA\'s CSV file',
        ) from None


def json_members(file: TextIO) -> Iterator[tuple[str, object]]:
    """Yield (key, value) of the object in a JSON file, with one member in memory at a time.

    Python's json parses the members, because it accepts the NaN that it writes for a missing text;
    streaming parsers (ijson) reject it. Raises ValueError if the file is not one complete object.
    """
    text, at, before = "", 0, 0  # the next member is at text[at]; text starts at character `before`
    separator = "{"
    while separator:
        try:
            member, separator, at = next_member(text, at, separator)
        except (ValueError, RecursionError) as error:
            rest = len(text) - at
            more = file.read(max(JSON_CHUNK, rest)) if rest < LARGEST_VIDEO else ""
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
    if (text[at:] + file.read(JSON_CHUNK)).strip():
        raise ValueError(f"text follows the end of the object, at character {before + at:,}")


def next_member(text: str, at: int, separator: str) -> tuple[tuple | None, str, int]:
    """Parse the member at text[at], which starts with the separator, "{" or ",".

    Returns (member, next separator, its position). The member is (key, value), or None for an empty
    object; the next separator is "" at the end of the object. Raises ValueError, also if the text
    ends too early.
    """

    def skip(character, at):
        at = WHITESPACE(text, at).end()
        if text[at : at + 1] != character:
            raise json.JSONDecodeError(f"Expecting {character!r}", text, at)
        return WHITESPACE(text, at + 1).end()

    at = skip(separator, at)
    if separator == "{" and text[at : at + 1] == "}":
        return None, "", at + 1
    if text[at : at + 1] != '"':
        raise json.JSONDecodeError("Expecting a name in quotes", text, at)
    key, at = DECODE(text, at)
    value, at = DECODE(text, skip(":", at))
    end = WHITESPACE(text, at).end()
    if text[end : end + 1] == "}":
        return (key, value), "", end + 1
    if text[end : end + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' or '}'", text, end)
    return (key, value), ",", end


# ---- HTM-AA's CSV file ---------------------------------------------------------------------------


def is_caption_table(path: str) -> bool:
    """Return whether this is a CSV file of HTM-AA, which has its columns in the first line."""
    with open(path, "rb") as file:
        line = file.readline(1000).decode("utf-8-sig", "replace")
    return {*HTM_AA} <= {cell.strip().strip('"') for cell in line.split(",")}


def read_caption_table(path: str) -> Iterator[Outcome]:
    """Yield the Outcome of each video id in HTM-AA's CSV file, in the order of the file.

    A sentence has one timestamp, which becomes both its start and its end; training widens it to
    --min_time like any short caption. Raises DataError if this is not such a table.
    """
    table = require_non_empty(read_table(path, HTM_AA), ["vid"], path)
    times = pd.to_numeric(table["timestamp"], errors="coerce").to_numpy(float)
    wrong = np.isnan(times) & table["timestamp"].notna().to_numpy()
    videos, names = pd.factorize(table["vid"])
    order = np.lexsort((times, videos))  # stable; missing times come last
    texts = table["text"].fillna("").to_numpy()
    bounds = [0, *np.flatnonzero(np.diff(videos[order])) + 1, len(order)]
    for first, last in tqdm(pairwise(bounds), total=len(names), unit="video", disable=None):
        rows = order[first:last]
        name = names[videos[rows[0]]]
        source = f"{path}, video {name!r}"
        try:
            for row in rows[wrong[rows]][:1]:
                time = shorten(table["timestamp"][row])
                raise CaptionError(f"{source}: the timestamp {time} is not a number")
            captions = usable_captions(times[rows], times[rows], texts[rows].tolist(), source)
            yield Outcome(name, captions, "HTM-AA CSV")
        except CaptionError as error:
            yield Outcome(name, error)


# ---- the folder ----------------------------------------------------------------------------------


class CaptionFiles(NamedTuple):
    """A video's name in a folder, and the paths of its caption files in order of preference."""

    name: str
    paths: tuple[str, ...]


def find_name(path: str, videos: Collection[str]) -> str:
    """Return the name of the video whose captions are in a file.

    Only subtitles may have a language after the video's name: `talk.en.vtt`, `talk.vtt`. videos:
    the names of known videos; `fix.it.vtt` belongs to `fix.it` if there is such a video.
    """
    name, suffix = os.path.splitext(path)
    if suffix.lower() in (".vtt", ".srt") and name not in videos:
        video, _, tag = name.rpartition(".")
        if PurePosixPath(video).name and LANGUAGE_TAG.fullmatch(tag):
            return video
    return name


def find_tag(name: str, path: str) -> str:
    """Return the language tag in the name of a video's caption file, or "" if it has none."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return stem.removeprefix(os.path.basename(name))[1:]


def is_language(tag: str, language: str) -> bool:
    """Return whether a tag names the language or a variety of it: en-GB and en-orig are en."""
    tag = LANGUAGE_NAMES.get(tag.lower(), tag.lower()).replace("_", "-")
    return f"{tag}-".startswith(f"{language.lower()}-")


def check_language(path: str, stated: str, language: str) -> None:
    """Raise OtherLanguage if a file states another language."""
    if stated and not is_language(stated, language):
        raise OtherLanguage(f"{path}: its language is {shorten(stated)}, not {language}", stated)


def rank(name: str, path: str, language: str) -> tuple:
    """Return the sort key of a video's caption file: the preferred file comes first."""
    tag, suffix = find_tag(name, path), os.path.splitext(path)[1].lower()
    variety = tag != language, tag != ""  # order: the language itself, none, a variety
    return tag != "" and not is_language(tag, language), SUFFIXES.index(suffix), variety, path


def find_caption_files(folder: str, language: str = "en") -> list[CaptionFiles]:
    """Return the caption files in a folder and its shards, sorted by the names of their videos.

    folder: may also be a shard.
    """
    from video_decoder import EXTENSIONS, is_shard, walk_files

    if not is_shard(folder):
        check_root(folder)
    found = walk_files(folder, {*SUFFIXES, *EXTENSIONS})
    paths, videos = [], set()
    for path in tqdm(found, "caption files", unit="file", disable=None):
        if not path.lower().endswith(SUFFIXES):
            videos.add(os.path.splitext(path)[0])
        elif not path.lower().endswith(NOT_CAPTIONS):
            paths.append(path)
    if not paths:
        raise DataError(
            folder,
            f"has no caption file ({', '.join(SUFFIXES)}); give the folder of the captions",
        )
    named = sorted((find_name(path, videos), path) for path in paths)
    groups = groupby(named, key=lambda pair: pair[0])
    return [
        CaptionFiles(
            name, tuple(sorted((p for _, p in some), key=lambda p: rank(name, p, language)))
        )
        for name, some in groups
    ]


def name_by_id(folder: str, files: list[CaptionFiles]) -> list[CaptionFiles]:
    """Name the videos by their file names alone. Raises DataError if two have the same name."""
    by_id = {}
    for video in files:
        other = by_id.setdefault(PurePosixPath(video.name).name, video)
        if other is not video:
            raise DataError(
                folder,
                f"{printable(other.paths[0])} and {printable(video.paths[0])} are captions of the "
                "same video id; remove one, or look captions up by path",
            )
    return [CaptionFiles(name, video.paths) for name, video in by_id.items()]


def read_folder(
    folder: str, files: list[CaptionFiles], num_workers: int, language: str
) -> Iterator[Outcome]:
    """Yield the Outcome of each video, in the order of the files."""
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    context = get_context("fork")
    readers = []
    try:
        for number in range(num_workers):
            # Each process holds the only other end of its own pipe, so the pipe breaks if it dies.
            results, end = context.Pipe(duplex=False)
            own = tasks[number::num_workers]
            process = context.Process(
                target=read_files, args=(folder, own, language, end), daemon=True
            )
            with hold_stop_signals():
                process.start()
                readers.append((process, results))
            end.close()
        with tqdm(total=len(files), unit="file", disable=None) as progress:
            for number in range(len(tasks)):
                try:
                    outcomes = readers[number % num_workers][1].recv()
                except (EOFError, OSError):  # killed between two results, or while sending one
                    raise DataError(
                        folder,
                        "a process reading it was killed, perhaps for lack of memory; use fewer "
                        "processes",
                    ) from None
                yield from outcomes
                progress.update(len(outcomes))
    finally:
        for process, results in readers:
            process.kill()
            process.join()
            results.close()


def read_files(
    folder: str, tasks: list[list[CaptionFiles]], language: str, results: Connection
) -> None:
    """Run a reader process, which blocks until its results are received."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for files in tasks:
        results.send([read_video(folder, video, language) for video in files])


def read_video(folder: str, video: CaptionFiles, language: str) -> Outcome:
    """Return the Outcome of a video's first usable caption file.

    If none is usable, return the Outcome of the first that fails for another reason than its
    language.
    """
    outcomes = []
    for path in video.paths:
        outcomes.append(read_file(video.name, f"{folder}/{path}", language))
        if not isinstance(outcomes[-1].captions, CaptionError):
            return outcomes[-1]
    return min(outcomes, key=lambda outcome: isinstance(outcome.captions, OtherLanguage))


def read_file(name: str, path: str, language: str) -> Outcome:
    """Return the Outcome of one caption file, with any error as a CaptionError."""
    from video_decoder import locate

    try:
        path.encode()
        check_language(path, find_tag(name, path), language)
        source = locate(path)
        if source.size > LARGEST_VIDEO:
            raise CaptionError(
                f"{path}: has {source.size:,} bytes, too many for the captions of a video"
            )
        captions, kind, stated = parse_transcript(path, source.read())
        check_language(path, stated, language)
        return Outcome(name, captions, kind)
    except UnicodeEncodeError:
        error = CaptionError(f"{printable(path)}: the file's name is not UTF-8")
    except OSError as fault:
        error = CaptionError(f"{path}: {fault.strerror}")
    except CaptionError as fault:
        error = fault
    except Exception as fault:  # one odd file in a million must not end a run
        error = CaptionError(f"{printable(path)}: unexpected {type(fault).__name__}: {fault}")
    return Outcome(name, error)
