"""Read the ids of an evaluation's videos from its annotations, to exclude them from training."""

import csv

from annotations.official import is_json, read_json, read_lines
from annotations.tables import AnyPath, data_error, read_table
from utils import DataError, shorten

ID_COLUMNS = ("video_id", "vid")


def read_video_ids(path: AnyPath) -> set[str]:
    """Return the ids of all videos in an annotation file.

    path: JSON of the form {video id: annotations} like HTM-Align's, or with such a "database" like
    YouCook2's official file; a CSV table with a column video_id or vid; CrossTask's videos.csv or
    videos_val.csv, with lines task,video id,URL; or a list with one id per line. Raises DataError
    or OSError.
    """
    ids = parse_json_ids(path) if is_json(path) else parse_line_ids(path)
    if not ids:
        raise DataError(path, "has no video ids; give annotations, or a list with one id per line")
    return ids


def parse_json_ids(path: AnyPath) -> set[str]:
    content = read_json(path)
    if official := isinstance(content, dict) and "database" in content:
        content = content["database"]
    if not isinstance(content, dict):
        raise DataError(path, "is not an object of annotations by video id; give one")
    for key, value in content.items():
        lists = isinstance(value, list) and all(isinstance(item, list) for item in value)
        if not (isinstance(value, dict) if official else lists):
            raise DataError(path, f"has {shorten(value)} as annotations of {shorten(key)}; fix it")
    return set(content)


def parse_line_ids(path: AnyPath) -> set[str]:
    lines = read_lines(path)
    header = next(csv.reader(lines[:1]), [])
    for column in ID_COLUMNS:
        if column in header:
            return set(read_table(path, [column])[column].dropna())
    ids = set()
    for number, cells in enumerate(csv.reader(lines), 1):
        cells = [cell.strip() for cell in cells]
        with data_error(path, number):
            if len(cells) > 2 and cells[2].startswith("http"):
                ids.add(cells[1])
            elif len(cells) == 1 and len(cells[0].split()) == 1 and "/" not in cells[0]:
                ids.add(cells[0])
            elif any(cells):
                raise ValueError(
                    f"{shorten(','.join(cells))} is not a video id, and the first line has no "
                    f"column {' or '.join(ID_COLUMNS)}; give a list with one id per line"
                )
    return ids
