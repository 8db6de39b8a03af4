"""MSR-VTT's test videos and sentences, from a CSV file or an official JSON."""

import csv

from annotations.official import get, is_json, name_of, read_json, read_lines, text_of
from annotations.tables import (
    as_table,
    empty_notes,
    read_ours,
    read_table,
    require_non_empty,
    require_unique,
)
from utils import InputError, check_file, shorten

MSRVTT = ["key", "vid_key", "video_id", "sentence"]


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
        return require_unique(table, ["video_id"], path, flag), []
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


def read_ids(path):
    """The videos of a list, in its order: a dict from id to its sentence there, or None.

    path: a text file with an id on each line; or a CSV file with a column video_id, and perhaps
    one with sentences.
    """
    check_file(path, "ids")
    lines = read_lines(path, f"--ids: {path}")
    if lines and "video_id" in next(csv.reader(lines[:1])):
        table = read_table(path, ["video_id"], names=["video_id"], flag="ids")
        require_unique(
            require_non_empty(table, ["video_id"], path, "ids"), ["video_id"], path, "ids"
        )
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
