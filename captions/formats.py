"""Parse the captions of one video, in any format that they are found in.

A format is recognised by its content: HowTo100M's CSV files, WebVTT and SubRip subtitles, and the
JSON of Whisper and WhisperX. Parsers take a name, for messages, and bytes, wherever these are from.
"""

import html
import io
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import webvtt

from captions.readers import CaptionError, Captions, parse_csv, usable_captions
from utils import one_line, shorten

KEYS = ("start", "end", "text")  # of a caption, in JSON
# What a line with an arrow has to be, in WebVTT and in SubRip.
TIME = r"(\d+:)?[0-5]?\d:[0-5]?\d[.,]\d+"
TIMES = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}(\s|$)")
SUBRIP = re.compile(r"\d+\s*\n.*-->|[\d:.,]+\s*-->")  # its beginning; the number may be missing
WORD_TIME = re.compile(r"<(\d+:)?\d+:\d+\.\d+>")
PAUSE = 0.1  # seconds between two cues, above which the first is not held by the second
HOLD = 0.05  # seconds; YouTube holds a line for a cue of 10 ms


class Transcript(NamedTuple):
    """The captions of a video, their format, and their language if the file states it."""

    captions: Captions
    format: str
    language: str = ""


def parse_transcript(source: object, data: bytes) -> Transcript:
    """Parse a caption file. source: its name, for messages. Raises CaptionError."""
    try:
        text = data.decode("utf-8-sig").strip()
        if not text:
            raise ValueError("is empty")
        if text.startswith("<"):
            raise ValueError("is HTML or XML, not captions; download it again")
        if text.startswith(("{", "[")):
            return parse_whisper(source, text)
        if text.startswith("WEBVTT"):
            return parse_subtitles(source, text, "vtt")
        if SUBRIP.match(text):
            return parse_subtitles(source, text, "srt")
    except UnicodeDecodeError as error:
        raise CaptionError(f"{source}: is not UTF-8 text ({error})") from None
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"{source}: {error}") from None
    return Transcript(parse_csv(source, data), "CSV")


# ---- JSON ----------------------------------------------------------------------------------------


def parse_whisper(source: object, text: str) -> Transcript:
    """Parse the JSON of Whisper or WhisperX. Raises ValueError or CaptionError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({one_line(error)})") from None
    if type(content) is not dict or type(content.get("segments")) is not list:
        raise ValueError("is JSON without the list 'segments' of Whisper's")
    language = content.get("language") or ""
    if type(language) is not str:
        raise ValueError(f"'language' is {shorten(language)}, not a text")
    starts, ends, texts = parse_columns("'segments'", content["segments"])
    captions = starts, ends, [text.strip() for text in texts]
    return Transcript(usable_captions(*captions, source), "Whisper JSON", language)


def parse_columns(place: str, value: object) -> Captions:
    """Return starts and ends (float arrays) and texts of captions in JSON.

    value: three lists, {"start": [...], "end": [...], "text": [...]}, or a list of captions,
    [{"start": .., "end": .., "text": ..}, ...]. null and NaN are a missing time, or an empty text.
    place: what it is the value of, for messages. Raises ValueError for other values, and unless the
    three lists are of the same length.
    """
    if type(value) is list and all(type(c) is dict and {*KEYS} <= c.keys() for c in value):
        value = {key: [caption[key] for caption in value] for key in KEYS}
    columns = [value.get(key) for key in KEYS] if type(value) is dict else [0]
    if any(type(column) is not list for column in columns):
        raise ValueError(f"{place} lacks the lists start, end and text")
    if len(set(map(len, columns))) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"the lists start, end and text of {place} are {lengths} long")
    try:
        starts, ends = (np.array(column, float) for column in columns[:2])
        if starts.ndim != 1 or ends.ndim != 1:
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a time of {place} is not a number") from None
    texts = ["" if text is None or text != text else text for text in columns[2]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of {place} is not a string")
    # Half of a surrogate pair is no part of a word.
    return starts, ends, [text.encode(errors="replace").decode() for text in texts]


# ---- subtitles -----------------------------------------------------------------------------------


class Cue(NamedTuple):
    """Lines of text, without markup, that are shown from `start` to `end` (seconds)."""

    start: float
    end: float
    lines: list[str]


def parse_subtitles(source: object, text: str, kind: str) -> Transcript:
    """Parse WebVTT ("vtt") or SubRip ("srt"). Raises ValueError or CaptionError.

    Each line that rolls on from cue to cue is in the result once, see unroll.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if "-->" in line and not TIMES.match(line):  # the library would skip the cue
            raise ValueError(f"line {number}: {shorten(line.strip())} is not a cue's times")
    try:
        subtitles = webvtt.from_buffer(io.StringIO(text, newline=None), format=kind)
        cues = [to_cue(caption) for caption in subtitles]
    except (webvtt.errors.MalformedFileError, webvtt.errors.MalformedCaptionError) as error:
        raise ValueError(f"is damaged ({one_line(error)})") from None
    cues = [cue for cue in cues if cue.lines]
    cues = unroll(cues, rolls=WORD_TIME.search(text) is not None)
    captions = usable_captions(
        np.array([cue.start for cue in cues]),
        np.array([cue.end for cue in cues]),
        [" ".join(cue.lines) for cue in cues],
        source,
    )
    header = dict(line.split(":", 1) for line in subtitles.metadata if ":" in line)
    kind = {"vtt": "WebVTT", "srt": "SubRip"}[kind]
    return Transcript(captions, kind, header.get("Language", "").strip())


def to_cue(caption: webvtt.Caption) -> Cue:
    times = (time.in_milliseconds() / 1000 for time in (caption.start_time, caption.end_time))
    lines = (" ".join(html.unescape(line).split()) for line in caption.text.splitlines())
    return Cue(*times, [line for line in lines if line])


def unroll(cues: Sequence[Cue], rolls: bool = False) -> list[Cue]:
    """Return the cues without the lines that were in the cue before.

    YouTube's automatic captions roll. A line is written word by word at the bottom, held for 10 ms,
    and moves up while the next one is written. It is in three cues. It is spoken in the first.
    rolls: whether the cues are known to roll, as their words have times. Others, such as WebVTT
    that was converted to SubRip, roll if at least half of them start with the end of the one
    before, and one of them adds a line or only holds. Subtitles that do not roll stay as they are:
    what they repeat is repeated in the video.
    """
    carried = [0] * bool(cues) + [count_carried(*pair) for pair in pairwise(cues)]
    rolls = rolls or (
        2 * sum(map(bool, carried)) >= len(cues) - 1
        and any(
            count and (count < len(cue.lines) or cue.end - cue.start < HOLD)
            for count, cue in zip(carried, cues, strict=True)
        )
    )
    if not rolls:
        return list(cues)
    new = [cue._replace(lines=cue.lines[n:]) for n, cue in zip(carried, cues, strict=True)]
    return [cue for cue in new if cue.lines]


def count_carried(before: Cue, cue: Cue) -> int:
    """Return how many of the first lines of a cue are the last ones of the cue before.

    After a pause, a cue that has no other lines repeats what was spoken.
    """
    longest = min(len(before.lines), len(cue.lines))
    count = next((n for n in range(longest, 0, -1) if before.lines[-n:] == cue.lines[:n]), 0)
    return 0 if count == len(cue.lines) and cue.start - before.end > PAUSE else count
