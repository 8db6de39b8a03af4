"""UCF-101's clips and splits, from a CSV table or the official lists."""

import os
import re
from pathlib import Path

import pandas as pd

from annotations.clips import COLUMNS, SPLITS, TEST, TRAIN, UNUSED, read_clips
from annotations.official import parse_name, read_lines
from annotations.tables import AnyPath, data_error, make_table
from utils import DataError, plural, shorten

CLASSES = "classInd.txt"
CLASS_LINE = re.compile(r"\s*(\d+)\s+(\S.*?)\s*")  # 37 HandstandPushups
CLIP_LINE = re.compile(r"\s*(\S.*?)(?:\s+(\d+))?\s*")  # <class>/<file>.avi, in a train list and 37


def ucf_table(path: AnyPath) -> tuple[pd.DataFrame, list[str]]:
    """Return UCF-101's clips, and notes on clips that are missing from a split.

    The table has the columns video_id (the file's name), label (the class, which is the folder's
    name) and split1 to split3 (1 train, 2 test, 0 unused). path: such a table as CSV; or the
    official folder ucfTrainTestlist, whose clips are sorted by class and name. Raises DataError or
    OSError.
    """
    if not os.path.isdir(path):
        return read_clips(path), []
    table = make_table(read_lists(Path(path)), COLUMNS)
    lacking = [(split, int((table[split] == UNUSED).sum())) for split in SPLITS]
    notes = [f"{split} lacks {plural(count, 'clip')}" for split, count in lacking if count]
    return table, notes


def read_lists(folder: Path) -> list[tuple]:
    """Return the rows of the official folder."""
    lists = {
        number: {TRAIN: folder / f"trainlist0{number}.txt", TEST: folder / f"testlist0{number}.txt"}
        for number in range(1, len(SPLITS) + 1)
    }
    for file in [folder / CLASSES, *(file for files in lists.values() for file in files.values())]:
        if not file.is_file():
            raise DataError(
                folder, f"has no {file.name}; give the official folder ucfTrainTestlist"
            )
    numbers = read_classes(folder / CLASSES)
    splits = []
    for files in lists.values():
        clips = {}
        for part, file in files.items():
            read_list(file, part, numbers, clips)
        splits.append(clips)
    return [
        (name, label, *(clips.get((label, name), UNUSED) for clips in splits))
        for label, name in sorted(set().union(*splits))
    ]


def read_classes(path: Path) -> dict[str, int]:
    """Return the number of each class."""
    numbers = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        with data_error(path, number):
            match = CLASS_LINE.fullmatch(line)
            if not match:
                raise ValueError(f"{shorten(line)} is not a number and a class; fix it")
            label = parse_name(match[2])
            if label in numbers or int(match[1]) in numbers.values():
                raise ValueError(f"{shorten(line)} is duplicated; remove one")
            numbers[label] = int(match[1])
    if not numbers:
        raise DataError(path, "has no classes; fetch it again")
    return numbers


def read_list(path: Path, part: int, numbers: dict[str, int], clips: dict) -> None:
    """Add the clips of a list to those of its split, {(class, file): part}.

    The class is the name of the folder, not part of the file's name: for HandstandPushups, the two
    differ in capitals. Its number is required in a train list, and checked wherever it is given.
    """
    count = len(clips)
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        with data_error(path, number):
            match = CLIP_LINE.fullmatch(line)
            clip = tuple(parse_name(match[1]).split("/"))
            if len(clip) != 2 or not all(clip):
                raise ValueError(f"{shorten(line)} is not <class>/<file>; fix it")
            label = clip[0]
            if label not in numbers:
                raise ValueError(f"the class {shorten(label)} is not in {CLASSES}; fix one of them")
            if match[2] is None and part == TRAIN:
                raise ValueError(f"{shorten(line)} lacks the number of its class; fetch it again")
            if match[2] is not None and int(match[2]) != numbers[label]:
                raise ValueError(
                    f"{shorten(label)} is {numbers[label]} in {CLASSES}, not {match[2]}; fix one "
                    "of them"
                )
            if clip in clips:
                raise ValueError(f"{shorten(match[1])} is duplicated in its split; remove one")
            clips[clip] = part
    if len(clips) == count:
        raise DataError(path, "has no clips; fetch it again")
