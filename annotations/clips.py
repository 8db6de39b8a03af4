"""Clips with a class and their part in three splits: the table of HMDB-51 and UCF-101."""

import pandas as pd

from annotations.tables import (
    AnyPath,
    check_names,
    read_annotations,
    require_non_empty,
    require_unique,
)
from utils import DataError

SPLITS = ["split1", "split2", "split3"]
COLUMNS = ["video_id", "label", *SPLITS]
UNUSED, TRAIN, TEST = 0, 1, 2  # the part of a split that a clip belongs to


def read_clips(path: AnyPath, suffix: str = "") -> pd.DataFrame:
    """Read a CSV table with the columns video_id, label and split1 to split3.

    A label is a class followed by `suffix`. Raises DataError or OSError.
    """
    table = read_annotations(path, COLUMNS, ["video_id", "label"], numbers=SPLITS)
    # A class is the name of a folder: neither ".._test" nor "_test" may become a path.
    classes = table.assign(label=table["label"].str.removesuffix(suffix).replace("", None))
    check_names(classes, ["label"], path)
    require_non_empty(classes, ["label"], path)
    if not table[SPLITS].isin((UNUSED, TRAIN, TEST)).all(axis=None):
        raise DataError(path, "splits are 0 (unused), 1 (train) or 2 (test); fix the others")
    return require_unique(table, ["label", "video_id"], path)


def describe_clips(table: pd.DataFrame) -> list[str]:
    """Count the clips of a table, and of the parts of its splits, one line each."""
    lines = [f"{len(table)} clips of {table['label'].nunique()} classes"]
    for split in SPLITS:
        train, test = ((table[split] == part).sum() for part in (TRAIN, TEST))
        unused = len(table) - train - test
        lines.append(f"{split}: {train} to train on, {test} to test, {unused} in neither")
    return lines
