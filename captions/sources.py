"""Read all captions of a source, video by video.

A source is a folder of CSV files, a caption store, or the JSON file in which the authors of
HowTo100M also publish the captions.
"""

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import PurePosixPath
from typing import TextIO

import numpy as np
from tqdm import tqdm

from captions.readers import (
    CaptionError,
    Captions,
    CaptionStore,
    check_root,
    is_store,
    read_captions,
    usable_captions,
)
from utils import DataError, die_with_parent, find_files, one_line, printable

JSON_CHUNK = 1 << 20  # characters of a JSON file read at a time
LARGEST_VIDEO = 1 << 26  # characters of a video's captions in it, which have some ten thousand
DECODE = json.JSONDecoder().raw_decode
WHITESPACE = json.decoder.WHITESPACE.match
FILES_PER_TASK = 64  # caption files that a process reads at a time

Outcome = tuple[str, Captions | CaptionError]  # a video's name and captions


def iter_captions(root: str, num_workers: int, *, by_id: bool = False) -> Iterator[Outcome]:
    """Yield (name, captions or a CaptionError) of each video of a source.

    root: the source. num_workers: the processes that read a folder. by_id: name the videos of a
    folder by the names of their caption files alone. Raises DataError or OSError if the source as a
    whole cannot be used.
    """
    if os.path.isfile(root):
        return read_caption_json(root)
    if is_store(root):
        return read_store(CaptionStore(root))
    paths = find_caption_files(root)
    files = name_by_id(root, paths) if by_id else [(path, path) for path in paths]
    return read_folder(root, files, num_workers)


def read_store(store: CaptionStore) -> Iterator[Outcome]:
    """Yield (name, captions or a CaptionError) of each video of a caption store."""
    for place in tqdm(range(len(store)), unit="video", disable=None):
        name = store.names[place]
        try:
            yield name, store.read_at(place)
        except CaptionError as error:
            yield name, error


# ---- the JSON file -------------------------------------------------------------------------------


def read_caption_json(path: str) -> Iterator[Outcome]:
    """Yield (video id, captions or a CaptionError), with one video in memory at a time.

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
                starts, ends, texts = parse_captions(name, value)
                try:
                    yield name, usable_captions(starts, ends, texts, f"{path}, video {name!r}")
                except CaptionError as error:
                    yield name, error
                progress.update(file.buffer.tell() - progress.n)
    except ValueError as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise DataError(
            path,
            f"is not a JSON file of captions ({reason}); give an intact file of "
            '{video id: {"start": [...], "end": [...], "text": [...]}}',
        ) from None


def json_members(file: TextIO) -> Iterator[tuple[str, object]]:
    """Yield (key, value) of the object in a JSON file, with one member in memory at a time.

    Python's json parses the members, as it accepts the NaN that it writes for a missing text;
    streaming parsers (ijson) reject it. Raises ValueError if the file is not one whole object.
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
        raise ValueError(f"more follows the object's end, character {before + at:,}")


def next_member(text: str, at: int, separator: str) -> tuple[tuple | None, str, int]:
    """Parse the member at text[at], which starts with the separator, "{" or ",".

    Returns (member, next separator, its place). The member is (key, value), or None at the end of
    an empty object; the next separator is "" at the object's end. Raises ValueError, also if the
    text ends too early.
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


def parse_captions(name: str, value: object) -> Captions:
    """Return starts and ends (float arrays) and texts of a video of the JSON file.

    null and NaN are a missing time, or an empty text. Raises ValueError unless they are three lists
    of the same length.
    """
    name.encode()  # half of a surrogate pair is a ValueError
    columns = [value.get(key) for key in ("start", "end", "text")] if type(value) is dict else [0]
    if any(type(column) is not list for column in columns):
        raise ValueError(f"video {name!r} lacks the lists start, end and text")
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
        raise ValueError(f"a text of video {name!r} is not a string")
    # Half of a surrogate pair is no part of a word.
    return starts, ends, [text.encode(errors="replace").decode() for text in texts]


# ---- the folder ----------------------------------------------------------------------------------


def find_caption_files(folder: str) -> list[str]:
    """Return the caption files below a folder, sorted: their paths in it without `.csv`."""
    check_root(folder)
    files = tqdm(find_files(folder, {".csv"}), "caption files", unit="file", disable=None)
    paths = [file.removesuffix(".csv") for file in sorted(files) if file.endswith(".csv")]
    if not paths:
        raise DataError(folder, "has no caption file (.csv); give the folder of the captions")
    return paths


def name_by_id(folder: str, paths: list[str]) -> list[tuple[str, str]]:
    """Return (file name, path) of caption files. Raises DataError if two have the same name."""
    files = {}
    for path in paths:
        other = files.setdefault(PurePosixPath(path).name, path)
        if other != path:
            raise DataError(
                folder,
                f"{printable(other)}.csv and {printable(path)}.csv are captions of the same id; "
                "remove one, or look captions up by path",
            )
    return list(files.items())


def read_folder(folder: str, files: list[tuple[str, str]], num_workers: int) -> Iterator[Outcome]:
    """Yield (name, captions or a CaptionError) in the order of the files.

    files: (name, path in the folder without `.csv`) of each.
    """
    tasks = [files[i : i + FILES_PER_TASK] for i in range(0, len(files), FILES_PER_TASK)]
    context = get_context("fork")
    readers = []
    try:
        for number in range(num_workers):
            # Each has its own pipe. Only it has the other end, so the pipe breaks when it dies.
            results, end = context.Pipe(duplex=False)
            own = tasks[number::num_workers]
            process = context.Process(target=read_files, args=(folder, own, end), daemon=True)
            process.start()
            end.close()
            readers.append((process, results))
        with tqdm(total=len(files), unit="file", disable=None) as progress:
            for number in range(len(tasks)):
                try:
                    outcomes = readers[number % num_workers][1].recv()
                except (EOFError, OSError):  # between two results, in the middle of one
                    raise DataError(
                        folder,
                        "a process that read it was killed, perhaps for lack of memory; read it "
                        "with fewer processes",
                    ) from None
                yield from outcomes
                progress.update(len(outcomes))
    finally:
        for process, results in readers:
            process.kill()
            process.join()
            results.close()


def read_files(folder: str, tasks: list[list[tuple[str, str]]], results: Connection) -> None:
    """Run a reading process. It waits for its results to be received."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for files in tasks:
        results.send([(name, read_file(f"{folder}/{path}.csv")) for name, path in files])


def read_file(path: str) -> Captions | CaptionError:
    """Return the captions of a file, or the error as a CaptionError."""
    try:
        path.encode()
        return read_captions(path)
    except UnicodeEncodeError:
        return CaptionError(f"{printable(path)}: the file's name is not UTF-8")
    except CaptionError as error:
        return error
    except Exception as error:  # one strange file of a million must not end a run
        return CaptionError(f"{printable(path)}: unexpected {type(error).__name__}: {error}")
