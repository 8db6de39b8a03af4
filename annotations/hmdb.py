"""HMDB-51's clips and splits, from a CSV table or the official split files."""

import os
import re
from pathlib import Path

import pandas as pd

from annotations.clips import COLUMNS, read_clips
from annotations.official import parse_name, read_lines
from annotations.tables import AnyPath, data_error, make_table
from utils import DataError, shorten

SUFFIX = "_test"  # of a class, in the tables and in the names of the split files
SPLIT_FILE = re.compile(r"(?!\.)(.+)_test_split([123])\.txt")  # macOS archives add hidden files
SPLIT_LINE = re.compile(r"\s*(\S.*?)\s+([012])\s*")


def hmdb_table(path: AnyPath) -> tuple[pd.DataFrame, list[str]]:
    """Return HMDB-51's clips, and an empty list of notes, because no clip is skipped.

    The table has the columns video_id, label (`<class>_test`) and split1 to split3 (1 train,
    2 test, 0 unused). path: such a table as CSV; or the official folder of
    `<class>_test_split<k>.txt` with lines `name part`, which are sorted by class and name. Raises
    DataError or OSError.
    """
    if os.path.isdir(path):
        return make_table(read_split_files(Path(path)), COLUMNS), []
    return read_clips(path, SUFFIX), []


def read_split_files(folder: Path) -> list[tuple]:
    """Return the rows of a folder of split files."""
    classes = {}  # class -> split -> file
    for name in sorted(os.listdir(folder)):
        if match := SPLIT_FILE.fullmatch(name):
            with data_error(folder):
                label = parse_name(match[1])
            classes.setdefault(label, {})[int(match[2])] = folder / name
    if not classes:
        raise DataError(
            folder,
            "has no files such as brush_hair_test_split1.txt; give the folder of the official "
            "split files",
        )
    rows = []
    for label, files in classes.items():
        for split in (1, 2, 3):
            if split not in files:
                raise DataError(folder, f"has no {label}_test_split{split}.txt; give all files")
        parts = {split: read_split(file) for split, file in files.items()}
        check_same_clips(parts, files)
        for name in sorted(parts[1]):
            rows.append((name, label + SUFFIX, *(parts[split][name] for split in (1, 2, 3))))
    return rows


def read_split(path: Path) -> dict[str, int]:
    """Return the clips of a split file: a dict from a clip's name to UNUSED, TRAIN or TEST."""
    clips = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        with data_error(path, number):
            match = SPLIT_LINE.fullmatch(line)
            if not match:
                raise ValueError(f"{shorten(line)} is not a clip's name and 0, 1 or 2; fix it")
            name = parse_name(match[1])
            if name in clips:
                raise ValueError(f"{shorten(name)} is duplicated; remove one")
            clips[name] = int(match[2])
    if not clips:
        raise DataError(path, "has no clips; fetch it again")
    return clips


def check_same_clips(parts: dict[int, dict[str, int]], files: dict[int, Path]) -> None:
    """Raise DataError unless the three split files of a class list the same clips."""
    for split, clips in parts.items():
        for name in sorted(parts[1].keys() ^ clips.keys())[:1]:
            present, absent = (split, 1) if name in clips else (1, split)
            raise DataError(
                files[absent],
                f"lacks {shorten(name)}, which is in {files[present].name}; each file must list "
                "all clips of its class",
            )
