"""YouCook2's validation segments, from our CSV file or the official JSON."""

from annotations.official import get, is_json, name_of, read_json, text_of
from annotations.tables import LARGEST_NUMBER, as_table, empty_notes, read_ours
from utils import InputError, shorten

YOUCOOK = ["end", "start", "task", "text", "video_id"]


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


def seconds(segment, where):
    """A segment's [start, end]."""
    good = len(segment) == 2 and all(
        type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER for value in segment
    )
    good = good and segment[0] <= segment[1]
    if not good:
        raise InputError(f"{where}: 'segment' is {shorten(segment)}, not [start, end]: mend it")
    return segment
