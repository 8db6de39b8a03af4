"""HTM-Align's sentences, from the official JSON."""

from typing import Any, NamedTuple

from annotations.official import parse_name, parse_text, read_json
from annotations.tables import LARGEST_NUMBER, AnyPath, data_error
from utils import DataError, plural, shorten


class Sentence(NamedTuple):
    """A sentence of a narration."""

    alignable: bool  # whether the video shows what is said
    start: float  # seconds; when it is shown or, if not alignable, spoken
    end: float
    text: str


def htm_align_sentences(path: AnyPath) -> tuple[dict[str, list[Sentence]], list[str]]:
    """Return the sentences of each video, in the file's order, and notes on them.

    path: of the official htm_align.json, {video: [[alignable 0 or 1, start, end, text], ..]}.
    Raises DataError or OSError.
    """
    content = read_json(path)
    with data_error(path):
        if not isinstance(content, dict):
            raise ValueError("is not an object of videos; give the official file")
        videos = {
            parse_name(video): parse_sentences(rows, f"video {shorten(video)}")
            for video, rows in content.items()
        }
    if not videos:
        raise DataError(path, "has no videos; give the official file")
    sentences = [sentence for video in videos.values() for sentence in video]
    empty = sum(not sentence.text.strip() for sentence in sentences)
    reversed_times = sum(sentence.end < sentence.start for sentence in sentences)
    notes = [plural(empty, "empty sentence")] * bool(empty)
    notes += [f"{plural(reversed_times, 'sentence')} with the end before the start"] * bool(
        reversed_times
    )
    return videos, notes


def parse_sentences(rows: Any, place: str) -> list[Sentence]:
    """Return the sentences of a video. Raises ValueError."""
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{place}: {shorten(rows)} is not a list of sentences; fix it")
    return [parse_sentence(row, f"{place}, sentence {n}") for n, row in enumerate(rows, 1)]


def parse_sentence(row: Any, place: str) -> Sentence:
    if not isinstance(row, list) or len(row) != 4:
        raise ValueError(f"{place}: {shorten(row)} is not [alignable, start, end, text]; fix it")
    alignable, *times, text = row
    if alignable not in (0, 1):
        raise ValueError(f"{place}: alignable is {shorten(alignable)}, not 0 or 1; fix it")
    if not all(type(time) in (int, float) and 0 <= time <= LARGEST_NUMBER for time in times):
        raise ValueError(f"{place}: {shorten(times)} are not times in seconds; fix them")
    if not isinstance(text, str):
        raise ValueError(f"{place}: {shorten(text)} is not a string; fix it")
    return Sentence(bool(alignable), *times, parse_text(text, place))
