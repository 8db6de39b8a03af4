"""Parse the captions of one video, in any supported format.

A format is recognized by its content: HowTo100M's CSV files, WebVTT and SubRip subtitles, and the
JSON of Whisper and WhisperX. Parsers take bytes, from any source, and a name for messages.
"""

import html
import io
import json
import re
from collections.abc import Sequence
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np
import webvtt

from captions.readers import CaptionError, Captions, parse_csv, usable_captions
from utils import one_line, shorten

KEYS = ("start", "end", "text")  # of a caption, in JSON
# The form of a line with an arrow, in WebVTT and SubRip.
TIME = r"(\d+:)?[0-5]?\d:[0-5]?\d[.,]\d+"
TIMES = re.compile(rf"\s*{TIME}\s*-->\s*{TIME}(\s|$)")
TIME_LINE = re.compile(r"^.*-->.*$", re.MULTILINE)
FRACTION = re.compile(r"(?<=\d)([.,])(\d+)")  # of a second
SUBRIP = re.compile(r"\d+\s*\n.*-->|[\d:.,]+\s*-->")  # the start; the number may be missing
SUBRIP_STYLE = re.compile(r"\{\\[^{}]*\}")  # as in `{\an8}above`
WORD_TIME = re.compile(r"<(\d+:)?\d+:\d+\.\d+>")
PAUSE = 0.1  # seconds; after a longer pause, a cue does not carry over lines of the one before
HOLD = 0.05  # seconds; a shorter cue only holds a line, for 10 ms in YouTube's captions


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
    try:
        return Transcript(parse_csv(source, data), "CSV")
    except CaptionError:
        if re.search(r"[.,]\d{1,3} --> \d", text):
            reason = "has subtitle times, but does not start like WebVTT or SubRip"
            raise CaptionError(f"{source}: {reason}") from None
        raise


# ---- JSON ----------------------------------------------------------------------------------------


def parse_whisper(source: object, text: str) -> Transcript:
    """Parse the JSON of Whisper or WhisperX. Raises ValueError or CaptionError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({one_line(error)})") from None
    if type(content) is not dict or type(content.get("segments")) is not list:
        raise ValueError("is JSON without Whisper's list 'segments'")
    language = content.get("language") or ""
    if type(language) is not str:
        raise ValueError(f"'language' is {shorten(language)}, not a string")
    starts, ends, texts = parse_columns("'segments'", content["segments"])
    captions = sort_captions(starts, ends, [text.strip() for text in texts])
    return Transcript(usable_captions(*captions, source), "Whisper JSON", language)


def sort_captions(starts: np.ndarray, ends: np.ndarray, texts: list[str]) -> Captions:
    """Sort captions by their starts, because training takes the neighbours of a caption."""
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order], [texts[place] for place in order]


def parse_columns(place: str, value: object) -> Captions:
    """Return starts and ends (float arrays) and texts of captions in JSON.

    value: three lists, {"start": [...], "end": [...], "text": [...]}, or a list of captions,
    [{"start": .., "end": .., "text": ..}, ...]. null and NaN mean a missing time or an empty text;
    a caption of a list may also lack a time. place: what `value` belongs to, for messages. Raises
    ValueError for other values, or if the three lists differ in length.
    """
    if type(value) is list and all(type(c) is dict and "text" in c for c in value):
        value = {key: [caption.get(key) for caption in value] for key in KEYS}
    columns = [value.get(key) for key in KEYS] if type(value) is dict else [0]
    if any(type(column) is not list for column in columns):
        raise ValueError(f"{place} lacks the lists start, end and text")
    if len(set(map(len, columns))) > 1:
        lengths = ", ".join(str(len(column)) for column in columns)
        raise ValueError(f"the lists start, end and text of {place} have lengths {lengths}")
    try:
        starts, ends = (np.array(column, float) for column in columns[:2])
        if starts.ndim != 1 or ends.ndim != 1:
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a time of {place} is not a number") from None
    texts = ["" if text is None or text != text else text for text in columns[2]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a text of {place} is not a string")
    # A lone surrogate cannot be encoded, and is not part of a word.
    return starts, ends, [text.encode(errors="replace").decode() for text in texts]


# ---- subtitles -----------------------------------------------------------------------------------


class Cue(NamedTuple):
    """Lines of text, without markup, that are shown from `start` to `end` (seconds).

    written: for each line, whether its words have times; if so, it is spoken in this cue.
    """

    start: float
    end: float
    lines: list[str]
    written: list[bool]


def parse_subtitles(source: object, text: str, suffix: str) -> Transcript:
    """Parse WebVTT ("vtt") or SubRip ("srt"). Raises ValueError or CaptionError.

    Cues with invalid times are skipped. A line that rolls from cue to cue is returned once; see
    unroll.
    """
    # The library reads the 5 in SubRip's 00:00:01,5 as milliseconds.
    text = TIME_LINE.sub(lambda line: FRACTION.sub(to_milliseconds, line[0]), text)
    if suffix == "srt":
        text = SUBRIP_STYLE.sub("", text)
    try:
        subtitles = webvtt.from_buffer(io.StringIO(text, newline=None), format=suffix)
        cues = [to_cue(caption) for caption in subtitles]
    except (webvtt.errors.MalformedFileError, webvtt.errors.MalformedCaptionError) as error:
        raise ValueError(f"is damaged ({one_line(error)})") from None
    cues = [cue for cue in cues if cue.lines]
    if not cues:
        for number, line in enumerate(text.splitlines(), 1):
            if "-->" in line and not TIMES.match(line):
                raise ValueError(f"line {number}: {shorten(line.strip())} are not valid cue times")
    cues = unroll(cues, rolls=WORD_TIME.search(text) is not None)
    captions = sort_captions(
        np.array([cue.start for cue in cues]),
        np.array([cue.end for cue in cues]),
        [" ".join(cue.lines) for cue in cues],
    )
    header = dict(line.split(":", 1) for line in subtitles.metadata if ":" in line)
    name = {"vtt": "WebVTT", "srt": "SubRip"}[suffix]
    return Transcript(usable_captions(*captions, source), name, header.get("Language", "").strip())


def to_milliseconds(fraction: re.Match) -> str:
    return f"{fraction[1]}{fraction[2]:0<3.3}"


def to_cue(caption: webvtt.Caption) -> Cue:
    times = (time.in_milliseconds() / 1000 for time in (caption.start_time, caption.end_time))
    lines = [" ".join(html.unescape(line).split()) for line in caption.text.split("\n")]
    written = [WORD_TIME.search(line) is not None for line in caption.raw_text.split("\n")]
    return Cue(*times, list(filter(None, lines)), list(compress(written, lines)))


def unroll(cues: Sequence[Cue], rolls: bool = False) -> list[Cue]:
    """Return the cues without the lines that they carry over from the cue before.

    YouTube's automatic captions roll: a line is written word by word at the bottom, held for 10 ms,
    and moves up while the next one is written. It appears in three cues and is spoken in the first.
    rolls: whether the cues are known to roll, because their words have times. Others, such as
    WebVTT that was converted to SubRip, are taken to roll if at least half of the cues start with
    the last lines of the cue before, and at least one only holds them. Subtitles that do not roll
    are not changed: a text that they repeat is repeated in the video.
    """
    carried = [0] * bool(cues) + [count_carried(*pair) for pair in pairwise(cues)]
    rolls = rolls or (
        2 * sum(map(bool, carried)) >= len(cues) - 1
        and any(
            count == len(cue.lines) and cue.end - cue.start < HOLD
            for count, cue in zip(carried, cues, strict=True)
        )
    )
    if not rolls:
        return list(cues)
    new = [cue._replace(lines=cue.lines[n:]) for n, cue in zip(carried, cues, strict=True)]
    return [cue for cue in new if cue.lines]


def count_carried(before: Cue, cue: Cue) -> int:
    """Return how many lines at the start of a cue are carried over from the cue before.

    Two kinds of repeated lines are spoken again instead: those written in this cue, and those of a
    cue that follows a pause and has no other lines.
    """
    unwritten = [*cue.written, True].index(True)
    longest = min(len(before.lines), unwritten)
    count = next((n for n in range(longest, 0, -1) if before.lines[-n:] == cue.lines[:n]), 0)
    return 0 if count == len(cue.lines) and cue.start - before.end > PAUSE else count
