"""The evaluations' tables, read from our CSV files or from what the data sets' authors hand out.

Each function takes either and returns (table, notes): a pandas table as the CSV file has it, and
lines that say what of an official file is not in it. They raise InputError, which names the flag,
the file and the place, where a file is not what it should be.
"""

import csv
import json
import os
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from tables import (
    LARGEST_NUMBER,
    check_names,
    filled,
    leads_outside,
    read_table,
    unique,
)
from utils import (
    InputError,
    check_file,
    log,
    one_line,
    shorten,
    write_whole,
)

YOUCOOK = ["end", "start", "task", "text", "video_id"]
MSRVTT = ["key", "vid_key", "video_id", "sentence"]
SPLITS = ["split1", "split2", "split3"]
HMDB = ["video_id", "label", *SPLITS]
UNUSED, TRAIN, TEST = 0, 1, 2  # what a split says of a clip
SPLIT_FILE = re.compile(r"(.+)_test_split([123])\.txt")
SPLIT_LINE = re.compile(r"\s*(\S.*?)\s+([012])\s*")


def youcook_table(path, flag="eval_csv"):
    """YouCook2's validation segments: end, start (seconds), task, text, video_id.

    path: that table, or the official youcookii_annotations_trainval.json, whose order is kept.
    """
    if not is_json(path):
        names = ["task", "video_id"]
        return read_ours(path, flag, YOUCOOK, names, numbers=["start", "end"]), []
    where = f"--{flag}: {path}"
    content = read_json(path, flag)
    database = get(content, "database", dict, where)
    rows, others = [], {}
    for video, entry in database.items():
        at = f"{where}, video {shorten(video)}"
        subset = get(entry, "subset", str, at)
        if subset != "validation":
            others[subset] = others.get(subset, 0) + 1
            continue
        task = name_of(get(entry, "recipe_type", (str, int), at), at)
        for number, segment in enumerate(get(entry, "annotations", list, at), 1):
            in_segment = f"{at}, annotation {number}"
            start, end = seconds(get(segment, "segment", list, in_segment), in_segment)
            text = text_of(get(segment, "sentence", str, in_segment), in_segment)
            rows.append((end, start, task, text, name_of(video, at)))
    if not rows:
        raise InputError(
            f"{where} has no annotation of a validation video: give the file with them"
        )
    notes = [f"left out: {n} videos of the subset {shorten(name)}" for name, n in others.items()]
    table = as_table(rows, YOUCOOK)
    return table, notes + empty_notes(table["text"])


def msrvtt_table(path, ids=None, flag="eval_csv"):
    """MSR-VTT's test videos with a sentence each: key, vid_key, video_id, sentence.

    path: that table (MSRVTT_JSFUSION_test.csv is one), or an official videodatainfo JSON. Of a
    JSON, `ids` is a file that lists the videos, see read_ids; without it they are those of the
    JSON's test split, which is not what papers report on as 1k-A. A video's sentence is the one
    in the list, otherwise the first that the JSON has of it and that is not empty.
    """
    if not is_json(path):
        if ids:
            raise InputError(f"--ids goes with a JSON of annotations: {path} has its own videos")
        table = read_ours(path, flag, MSRVTT, ["video_id"])
        return unique(table, ["video_id"], path, flag), []
    where = f"--{flag}: {path}"
    content = read_json(path, flag)
    splits = {}
    for number, video in enumerate(get(content, "videos", list, where), 1):
        at = f"{where}, entry {number} of videos"
        name = name_of(get(video, "video_id", str, at), at)
        if name in splits:
            raise InputError(f"{at}: {shorten(name)} is there twice: give an intact file")
        splits[name] = None if ids else get(video, "split", str, at)
    sentences, further = {}, {}
    for number, sentence in enumerate(get(content, "sentences", list, where), 1):
        at = f"{where}, entry {number} of sentences"
        name = get(sentence, "video_id", str, at)
        text = text_of(get(sentence, "caption", str, at), at)
        if sentences.get(name):
            further[name] = further.get(name, 0) + 1
        else:
            sentences[name] = text
    if ids:
        listed = read_ids(ids)
        unknown = [name for name in listed if name not in splits]
        if unknown:
            raise InputError(
                f"--ids: {path} does not have {len(unknown)} of the {len(listed)} videos of {ids} "
                f"(the first is {shorten(unknown[0])}): give the JSON that does"
            )
        reason = f"not in {ids}"
    else:
        listed = dict.fromkeys(name for name, split in splits.items() if split == "test")
        if not listed:
            raise InputError(f"{where} has no video of the split test: give the test set's JSON")
        reason = "not of the split test"
    others = len(splits) - len(listed)
    notes = [f"left out: {others} videos that are {reason}"] if others else []
    if not ids and len(listed) != 1000:
        notes.append(
            f"these are {len(listed)} videos, not the 1,000 of the list 1k-A of most papers: "
            "data/msrvtt/prepare.py takes a list"
        )
    chosen = {name: text or sentences.get(name) for name, text in listed.items()}
    silent = [name for name, text in chosen.items() if text is None]
    if silent:
        raise InputError(
            f"{where} has no sentence for {len(silent)} of its videos (the first is "
            f"{shorten(silent[0])}): give the file with them"
        )
    from_list = sum(bool(text) for text in listed.values())
    if from_list:
        notes.append(f"{from_list} sentences are those of {ids}")
    passed_over = sum(further.get(name, 0) for name, text in listed.items() if not text)
    if passed_over:
        notes.append(
            f"left out: {passed_over} sentences, all but the first of each video; papers report on "
            "those of MSRVTT_JSFUSION_test.csv"
        )
    rows = [
        (f"ret{number}", f"msr{name.removeprefix('video')}", name, text)
        for number, (name, text) in enumerate(chosen.items())
    ]
    table = as_table(rows, MSRVTT)
    return table, notes + empty_notes(table["sentence"])


def read_ours(path, flag, columns, names, numbers=()):
    """A table of ours, which has rows; `names` are the columns that no row may leave empty."""
    table = read_table(path, columns, numbers=numbers, names=names, flag=flag)
    if table.empty:
        raise InputError(f"--{flag}: {path} has no rows: give the whole table")
    return filled(table, names, path, flag)


def read_ids(path):
    """The videos of a list, in its order: a dict from id to its sentence there, or None.

    path: a text file with an id on each line; or a CSV file with a column video_id, and perhaps
    one with sentences.
    """
    check_file(path, "ids")
    lines = read_lines(path, f"--ids: {path}")
    if lines and "video_id" in next(csv.reader(lines[:1])):
        table = read_table(path, ["video_id"], names=["video_id"], flag="ids")
        unique(filled(table, ["video_id"], path, "ids"), ["video_id"], path, "ids")
        sentences = table["sentence"] if "sentence" in table else [None] * len(table)
        given = [text if isinstance(text, str) else None for text in sentences]
        return dict(zip(table["video_id"], given, strict=True))
    found = {}
    for number, line in enumerate(lines, 1):
        name = line.strip()
        at = f"--ids: {path}, line {number}"
        if name in found:
            raise InputError(f"{at}: {shorten(name)} is there twice: take one of them out")
        if name:
            found[name_of(name, at)] = None
    if not found:
        raise InputError(f"--ids: {path} lists no videos: give a file with an id on each line")
    return found


def hmdb_table(path, flag="eval_csv"):
    """HMDB-51's clips: video_id, label (`<class>_test`), split1..3 (1 train, 2 test, 0 unused).

    path: that table, or the official folder of `<class>_test_split<k>.txt` with lines `name part`.
    Sorted by the files' names and the clips', as the table is.
    """
    if not os.path.isdir(path):
        table = read_ours(path, flag, HMDB, ["video_id", "label"], numbers=SPLITS)
        classes = table.assign(label=table["label"].str.removesuffix("_test").replace("", None))
        check_names(classes, ["label"], path, flag)  # ".._test" leads out only without its suffix
        filled(classes, ["label"], path, flag)  # as "_test" would: a clip's path would start at /
        if not table[SPLITS].isin((UNUSED, TRAIN, TEST)).all(axis=None):
            raise InputError(f"--{flag}: {path}: splits are 0 (unused), 1 (train) or 2 (test)")
        return unique(table, ["label", "video_id"], path, flag), []
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


# ---- what the formats share ----------------------------------------------------------------------


def is_json(path):
    return str(path).lower().endswith(".json")


def read_json(path, flag):
    """The content of a JSON file. A key that an object has twice is a fault, not the last one."""
    check_file(path, flag)

    def distinct(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {shorten(twice)} is there twice")
        return content

    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError
        raise InputError(
            f"--{flag}: {path} is not JSON ({one_line(error)}): fetch it again"
        ) from None


def read_lines(path, where):
    """The lines of a text file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{where} is not a text file ({one_line(error)}): give one") from None


def get(content, key, kinds, where):
    """content[key], of one of these types; JSON's true and false are no numbers."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    words = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
    if not isinstance(content, dict) or key not in content:
        have = ", ".join(map(shorten, list(content)[:5])) if isinstance(content, dict) else "none"
        raise InputError(f"{where} has no {key!r} (its keys: {have}): give the official file")
    value = content[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(words[kind] for kind in kinds)
        raise InputError(f"{where}: {key!r} is {shorten(value)}, not {expected}: mend it")
    return value


def seconds(segment, where):
    """A segment's [start, end]."""
    good = len(segment) == 2 and all(
        type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER for value in segment
    )
    good = good and segment[0] <= segment[1]
    if not good:
        raise InputError(f"{where}: 'segment' is {shorten(segment)}, not [start, end]: mend it")
    return segment


def text_of(sentence, where):
    """A sentence, with line ends that a CSV file keeps."""
    check_encodable(sentence, where)
    return "\n".join(sentence.splitlines())


def name_of(name, where):
    """A path, or a part of one, that stays in the data's folder."""
    name = str(name)
    if not name or leads_outside(name):
        fault = "leads out of the data's folder: it needs to be a path in it, without .."
        raise InputError(f"{where}: {shorten(name)} {fault if name else 'is not a name'}")
    check_encodable(name, where)
    return name


def check_encodable(text, where):
    """JSON can spell halves of characters, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: {shorten(text)} is not Unicode text: mend it") from None


def as_table(rows, columns):
    """Rows as read_table would give them: an empty text is a missing one."""
    table = pd.DataFrame(rows, columns=columns)
    texts = table.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in table.dtypes]]
    table[texts] = table[texts].mask(table[texts] == "")
    return table


def empty_notes(texts):
    """A note where sentences are missing: they stay in, as a sentence without words."""
    count = int(texts.isna().sum())
    return [f"{count} sentences are empty"] if count else []


def log_notes(path, notes):
    """Has an evaluation's log say what of an official file is not evaluated."""
    for note in notes:
        log.info("%s: %s", path, note)


def write_table(path, table, summary, notes):
    """What data/*/prepare.py end with: the CSV file, and what is in it and what is not."""
    try:
        with write_whole(path) as file:
            file.write(table.to_csv(index=False, lineterminator="\n").encode())
    except OSError as error:
        raise InputError(f"--out: {path} cannot be written: {one_line(error)}") from None
    print("\n".join([f"{path}: {summary}", *notes]))
