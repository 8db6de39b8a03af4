"""HMDB-51's clips and splits, from our CSV file or the official split files."""

import os
import re
from pathlib import Path

from annotations.official import name_of, read_lines
from annotations.tables import as_table, check_names, read_ours, require_non_empty, require_unique
from utils import InputError, shorten

SPLITS = ["split1", "split2", "split3"]
HMDB = ["video_id", "label", *SPLITS]
UNUSED, TRAIN, TEST = 0, 1, 2  # what a split says of a clip
SPLIT_FILE = re.compile(r"(.+)_test_split([123])\.txt")
SPLIT_LINE = re.compile(r"\s*(\S.*?)\s+([012])\s*")


def hmdb_table(path, flag="eval_csv"):
    """HMDB-51's clips: video_id, label (`<class>_test`), split1..3 (1 train, 2 test, 0 unused).

    path: that table, or the official folder of `<class>_test_split<k>.txt` with lines `name part`.
    Sorted by the files' names and the clips', as the table is.
    """
    if not os.path.isdir(path):
        table = read_ours(path, flag, HMDB, ["video_id", "label"], numbers=SPLITS)
        classes = table.assign(label=table["label"].str.removesuffix("_test").replace("", None))
        check_names(classes, ["label"], path, flag)  # ".._test" leads out only without its suffix
        require_non_empty(
            classes, ["label"], path, flag
        )  # as "_test" would: a clip's path would start at /
        if not table[SPLITS].isin((UNUSED, TRAIN, TEST)).all(axis=None):
            raise InputError(f"--{flag}: {path}: splits are 0 (unused), 1 (train) or 2 (test)")
        return require_unique(table, ["label", "video_id"], path, flag), []
    where = f"--{flag}: {path}"
    try:
        found = [
            (SPLIT_FILE.fullmatch(name), Path(path, name)) for name in sorted(os.listdir(path))
        ]
    except OSError as error:
        raise InputError(f"{where} cannot be read ({error.strerror}): give another") from None
    classes = {}  # class -> split -> file
    for match, file in found:
        if match and not file.name.startswith("."):  # as archives made on a Mac have them
            classes.setdefault(name_of(match[1], where), {})[int(match[2])] = file
    if not classes:
        raise InputError(
            f"{where} has no files such as brush_hair_test_split1.txt: give the folder of the "
            "official split files"
        )
    rows = []
    for label, files in classes.items():
        lacking = [split for split in (1, 2, 3) if split not in files]
        if lacking:
            raise InputError(f"{where} has no {label}_test_split{lacking[0]}.txt: give all files")
        parts = {split: read_split(file, f"--{flag}: {file}") for split, file in files.items()}
        for split, clips in parts.items():
            for name in sorted(parts[1].keys() ^ clips.keys())[:1]:
                there, absent = (split, 1) if name in clips else (1, split)
                raise InputError(
                    f"--{flag}: {files[absent]} does not have {shorten(name)}, which "
                    f"{files[there].name} has: each file lists all clips of its class"
                )
        for name in sorted(parts[1]):
            rows.append((name, f"{label}_test", *(parts[split][name] for split in (1, 2, 3))))
    return as_table(rows, HMDB), []


def read_split(path, where):
    """A split file: a dict from a clip's name to 0, 1 or 2."""
    clips = {}
    for number, line in enumerate(read_lines(path, where), 1):
        if not line.strip():
            continue
        at = f"{where}, line {number}"
        match = SPLIT_LINE.fullmatch(line)
        if not match:
            raise InputError(f"{at}: {shorten(line)} is not a clip's name and 0, 1 or 2: mend it")
        name = name_of(match[1], at)
        if name in clips:
            raise InputError(f"{at}: {shorten(name)} is there twice: take one of them out")
        clips[name] = int(match[2])
    if not clips:
        raise InputError(f"{where} has no clips in it: fetch it again")
    return clips
