"""YouCook2's validation segments, from a CSV table or the official JSON."""

from collections import Counter

import pandas as pd

from annotations.official import (
    is_json,
    parse_name,
    parse_segment,
    parse_text,
    read_json,
    require_key,
)
from annotations.tables import (
    AnyPath,
    count_empty,
    data_error,
    make_table,
    read_annotations,
)
from utils import plural, shorten

COLUMNS = ["end", "start", "task", "text", "video_id"]


def youcook_table(path: AnyPath) -> tuple[pd.DataFrame, list[str]]:
    """Return YouCook2's validation segments, and notes on skipped videos and empty sentences.

    The table has the columns end and start (seconds), task, text and video_id. path: such a table
    as CSV, or the official youcookii_annotations_trainval.json, whose order is kept. Raises
    DataError or OSError.
    """
    if not is_json(path):
        return read_annotations(path, COLUMNS, ["task", "video_id"], numbers=["start", "end"]), []
    content = read_json(path)
    with data_error(path):
        rows, skipped = parse_database(require_key(content, "database", dict))
        if not rows:
            raise ValueError("has no annotations of validation videos; give the file with them")
    table = make_table(rows, COLUMNS)
    notes = [
        f"skipped: {plural(count, 'video')} of the subset {shorten(name)}"
        for name, count in skipped.items()
    ]
    return table, notes + count_empty(table["text"])


def parse_database(database: dict) -> tuple[list[tuple], Counter]:
    """Return the rows of the validation subset, and the number of videos in each other subset."""
    rows, skipped = [], Counter()
    for video, entry in database.items():
        place = f"video {shorten(video)}"
        subset = require_key(entry, "subset", str, place)
        if subset != "validation":
            skipped[subset] += 1
            continue
        task = parse_name(require_key(entry, "recipe_type", (str, int), place), place)
        name = parse_name(video, place)
        for number, annotation in enumerate(require_key(entry, "annotations", list, place), 1):
            inner = f"{place}, annotation {number}"
            start, end = parse_segment(require_key(annotation, "segment", list, inner), inner)
            text = parse_text(require_key(annotation, "sentence", str, inner), inner)
            rows.append((end, start, task, text, name))
    return rows, skipped
