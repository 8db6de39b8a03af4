"""MSR-VTT's test videos and sentences, from a CSV table or an official JSON."""

import csv
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from annotations.official import is_json, parse_name, parse_text, read_json, read_lines, require_key
from annotations.tables import (
    AnyPath,
    count_empty,
    data_error,
    make_table,
    read_annotations,
    read_table,
    require_non_empty,
    require_unique,
)
from utils import DataError, plural, shorten

COLUMNS = ["key", "vid_key", "video_id", "sentence"]
JSFUSION_VIDEOS = 1000  # of the list "1k-A"

Ids = Mapping[str, str | None]  # video -> its sentence, if the list has one


def msrvtt_table(path: AnyPath, ids: Ids | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Return MSR-VTT's test videos with a sentence each, and notes on the skipped ones.

    The table has the columns key, vid_key, video_id and sentence. path: such a table as CSV, for
    example MSRVTT_JSFUSION_test.csv, or an official videodatainfo JSON. ids: the videos to take
    from a JSON; see read_ids. By default they are those of the JSON's test split, which is not the
    list 1k-A that papers report on. A video's sentence is that of the list or, if it has none, the
    first in the JSON that is not empty. Raises DataError or OSError.
    """
    if not is_json(path):
        if ids:
            raise DataError(path, "is a table with its own videos; give a list with a JSON only")
        return require_unique(read_annotations(path, COLUMNS, ["video_id"]), ["video_id"], path), []
    content = read_json(path)
    with data_error(path):
        videos = parse_videos(content, need_split=not ids)
        sentences, counts = parse_sentences(content)
        chosen = choose_listed(videos, ids) if ids else choose_test_split(videos)
        texts = {name: text or sentences.get(name) for name, text in chosen.items()}
        lacking = [name for name, text in texts.items() if text is None]
        if lacking:
            raise ValueError(
                f"has no sentence for {len(lacking)} of its videos (the first is "
                f"{shorten(lacking[0])}); give the file with them"
            )
    rows = [
        (f"ret{number}", f"msr{name.removeprefix('video')}", name, text)
        for number, (name, text) in enumerate(texts.items())
    ]
    table = make_table(rows, COLUMNS)
    notes = describe_choice(videos, chosen, counts, from_list=bool(ids))
    return table, notes + count_empty(table["sentence"])


def parse_videos(content: Any, need_split: bool) -> dict[str, str | None]:
    """Return the videos of a JSON: a dict from id to split, or to None if no split is needed."""
    videos = {}
    for number, video in enumerate(require_key(content, "videos", list), 1):
        place = f"entry {number} of videos"
        name = parse_name(require_key(video, "video_id", str, place), place)
        if name in videos:
            raise ValueError(f"{place}: {shorten(name)} is duplicated; give an intact file")
        videos[name] = require_key(video, "split", str, place) if need_split else None
    return videos


def parse_sentences(content: Any) -> tuple[dict[str, str], Counter]:
    """Return each video's first sentence that is not empty, and the number of those after it."""
    sentences, others = {}, Counter()
    for number, sentence in enumerate(require_key(content, "sentences", list), 1):
        place = f"entry {number} of sentences"
        name = require_key(sentence, "video_id", str, place)
        text = parse_text(require_key(sentence, "caption", str, place), place)
        if sentences.get(name):
            others[name] += 1
        else:
            sentences[name] = text
    return sentences, others


def choose_listed(videos: Mapping, ids: Ids) -> Ids:
    """Return the list. Raises ValueError if some of its videos are not in the JSON."""
    unknown = [name for name in ids if name not in videos]
    if unknown:
        raise ValueError(
            f"lacks {len(unknown)} of the {len(ids)} videos of the list (the first is "
            f"{shorten(unknown[0])}); give a JSON with all of them"
        )
    return ids


def choose_test_split(videos: Mapping[str, str | None]) -> Ids:
    """Return the videos of the test split, without sentences. Raises ValueError if it is empty."""
    chosen = dict.fromkeys(name for name, split in videos.items() if split == "test")
    if not chosen:
        raise ValueError("has no video of the test split; give the test set's JSON")
    return chosen


def describe_choice(videos: Mapping, chosen: Ids, others: Counter, from_list: bool) -> list[str]:
    """Return notes on how a table differs from its JSON, and from the list that papers use."""
    notes = []
    if skipped := len(videos) - len(chosen):
        reason = "in the list" if from_list else "in the test split"
        notes.append(f"skipped: {plural(skipped, 'video')} not {reason}")
    if not from_list and len(chosen) != JSFUSION_VIDEOS:
        notes.append(
            f"these are {plural(len(chosen), 'video')}, not the 1,000 of most papers (list 1k-A); "
            "data/msrvtt/prepare.py accepts a list"
        )
    if listed := sum(bool(text) for text in chosen.values()):
        notes.append(f"{plural(listed, 'sentence')} from the list")
    if unused := sum(others[name] for name, text in chosen.items() if not text):
        notes.append(
            f"skipped: {plural(unused, 'sentence')}, all but the first of each video; papers use "
            "those of MSRVTT_JSFUSION_test.csv"
        )
    return notes


def read_ids(path: AnyPath) -> Ids:
    """Return the videos of a list, in its order: a dict from id to its sentence there, or None.

    path: a text file with one id per line, or a CSV file with a column video_id and, optionally, a
    column sentence. Raises DataError or OSError.
    """
    lines = read_lines(path)
    if lines and "video_id" in next(csv.reader(lines[:1])):
        table = read_table(path, ["video_id"], names=["video_id"])
        require_unique(require_non_empty(table, ["video_id"], path), ["video_id"], path)
        sentences = table["sentence"] if "sentence" in table else [None] * len(table)
        texts = [text if isinstance(text, str) else None for text in sentences]
        return dict(zip(table["video_id"], texts, strict=True))
    ids = {}
    for number, name in enumerate(map(str.strip, lines), 1):
        with data_error(path, number):
            if name in ids:
                raise ValueError(f"{shorten(name)} is duplicated; remove one")
            if name:
                ids[parse_name(name)] = None
    if not ids:
        raise DataError(path, "lists no videos; give a file with one id per line")
    return ids
