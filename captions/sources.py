"""All captions of a source, video by video.

A source is a folder of CSV files, a caption store, or the JSON file in which the authors of
HowTo100M publish the captions as well.
"""

import json
import os
import signal
from multiprocessing import get_context

import numpy as np
from tqdm import tqdm

from captions.readers import CaptionError, CaptionStore, is_store, read_captions, usable_captions
from utils import InputError, check_folder, die_with_parent, files_below, one_line, printable

CHUNK = 1 << 20  # characters of a JSON file read at a time
LARGEST_VIDEO = 1 << 26  # characters of a video's captions in it; they have some ten thousand
DECODE = json.JSONDecoder().raw_decode
SKIP = json.decoder.WHITESPACE.match
FILES = 64  # caption files that a process reads at a time


def iter_captions(root, num_workers):
    """Yields (name, its captions or a CaptionError) of each video in --caption_root.

    Captions are (starts, ends, texts) as read_captions gives them. Raises InputError where the
    source as a whole cannot be used.
    """
    if os.path.isfile(root):
        yield from read_caption_json(root)
        return
    check_folder(root, "caption_root")
    if is_store(root):
        yield from read_store(root)
        return
    yield from read_folder(root, [(name, name) for name in caption_files(root)], num_workers)


def read_store(root):
    """Yields (name, its captions or a CaptionError) of a caption store."""
    store = CaptionStore(root)
    for place in tqdm(range(len(store)), unit="video", disable=None):
        name = store.names[place]
        try:
            yield name, store.read_at(place)
        except CaptionError as error:
            yield name, error


# ---- the JSON file -------------------------------------------------------------------------------


def read_caption_json(path):
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
        return CaptionError(f"{printable(path)}: the file's name is not UTF-8")
    except CaptionError as error:
        return error
    except Exception as error:  # one strange file of a million does not end it, as in training
        return CaptionError(f"{printable(path)}: unexpected {type(error).__name__}: {error}")
