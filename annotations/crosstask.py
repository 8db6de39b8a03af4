"""CrossTask's tasks and annotated videos, from the folder of the official release."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from annotations.official import parse_name, read_lines
from annotations.tables import LARGEST_NUMBER, AnyPath, data_error
from utils import DataError, plural, shorten

SUBSETS = ("test", "val", "all")
FILES = ("tasks_primary.txt", "videos.csv", "videos_val.csv", "annotations")  # of the release


class Task(NamedTuple):
    """A primary task: its title and the texts of its steps, in their order."""

    title: str
    steps: list[str]


class Segment(NamedTuple):
    """A stretch of a video that shows a step of its task."""

    step: int  # from 1
    start: float  # seconds
    end: float


class AnnotatedVideo(NamedTuple):
    task: str
    video: str
    segments: list[Segment]


def crosstask_videos(
    folder: AnyPath, subset: str
) -> tuple[dict[str, Task], list[AnnotatedVideo], list[str]]:
    """Return the primary tasks by id, their annotated videos, and notes on what is skipped.

    folder: of the official release. subset: "val" for the videos of videos_val.csv, "test" for the
    others of videos.csv, "all" for both. Raises DataError or OSError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(folder, "is not a folder; give the one of the official release")
    present = os.listdir(folder)
    for name in FILES:
        if name not in present:
            raise DataError(folder, f"has no {name}; give the folder of the official release")
    if not (folder / "annotations").is_dir():
        raise DataError(folder / "annotations", "is not a folder; fetch it again")
    tasks = read_tasks(folder / "tasks_primary.txt")
    listed = read_videos(folder / "videos.csv")
    val = read_videos(folder / "videos_val.csv")
    if subset == "all":
        chosen = {**listed, **val}
    else:
        chosen = val if subset == "val" else {key: n for key, n in listed.items() if key not in val}

    annotated, skipped = [], Counter()
    for (task, video), (source, line) in chosen.items():
        path = folder / "annotations" / f"{task}_{video}.csv"
        if not path.is_file():
            skipped["without annotations" if task in tasks else "of related tasks"] += 1
        elif task not in tasks:
            fault = f"is annotated, but its task {shorten(task)} is not in tasks_primary.txt"
            raise DataError(source, f"video {shorten(video)} {fault}; fix it", line)
        else:
            segments = read_segments(path, len(tasks[task].steps))
            annotated.append(AnnotatedVideo(task, video, segments))
    if not annotated:
        raise DataError(folder, f"has no annotated video of the subset {subset}; give another")
    known = {f"{task}_{video}.csv" for task, video in [*listed, *val]}
    unlisted = [file for file in (folder / "annotations").glob("*.csv") if file.name not in known]
    skipped["with annotations that videos.csv does not list"] = len(unlisted)
    notes = [
        f"skipped: {plural(count, 'video')} {reason}" for reason, count in skipped.items() if count
    ]
    return tasks, annotated, notes


def read_tasks(path: Path) -> dict[str, Task]:
    """Return the tasks of tasks_primary.txt by id. Raises DataError or OSError.

    Its lines are: id, title, URL, number of steps, the steps separated by commas, an empty line.
    """
    lines = [line.strip() for line in read_lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    start = next((number for number, line in enumerate(lines) if line), 0)
    tasks = {}
    for first in range(start, len(lines), 6):
        block = lines[first : first + 6]
        with data_error(path, first + 1):
            if len(block) < 5 or any(block[5:]):
                raise ValueError(
                    "a task is five lines (id, title, URL, number of steps, steps) and an empty "
                    "line; fix it"
                )
            name, title, _, count, steps = block[:5]
            if parse_name(name) in tasks:
                raise ValueError(f"the task {shorten(name)} is duplicated; remove one")
            steps = [step.strip() for step in steps.split(",")]
            if not all(steps):
                raise ValueError(f"a step of task {shorten(name)} is empty; fill it in")
            if count != str(len(steps)):
                reason = f"has {len(steps)} steps, not {shorten(count)} as stated; fix it"
                raise ValueError(f"the task {shorten(name)} {reason}")
            tasks[name] = Task(title, steps)
    if not tasks:
        raise DataError(path, "has no tasks; fetch it again")
    return tasks


def read_rows(path: Path, num_cells: int) -> list[tuple[int, list[str]]]:
    """Return the rows of a file without a header and quotes, each with its line number.

    The last cell may contain commas. Raises DataError or OSError.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            cells = [cell.strip() for cell in line.split(",", num_cells - 1)]
            if len(cells) < num_cells:
                reason = f"{shorten(line)} has fewer than {num_cells} cells; fix it"
                raise DataError(path, reason, number)
            rows.append((number, cells))
    return rows


def read_videos(path: Path) -> dict[tuple[str, str], tuple[Path, int]]:
    """Return the (task, video) pairs of a list `task,video,url`, each with its file and line."""
    videos = {}
    for number, (task, video, _) in read_rows(path, 3):
        with data_error(path, number):
            videos.setdefault((parse_name(task), parse_name(video)), (path, number))
    return videos


def read_segments(path: Path, num_steps: int) -> list[Segment]:
    """Return the segments of a video, lines `step,start,end`. Raises DataError or OSError."""
    segments = []
    for number, (step, *times) in read_rows(path, 3):
        with data_error(path, number):
            if not (step.isdecimal() and 1 <= int(step) <= num_steps):
                raise ValueError(f"{shorten(step)} is not a step from 1 to {num_steps}; fix it")
            start, end = map(parse_seconds, times)
            if end < start:
                raise ValueError(f"the segment ends at {end:g}, before it starts; fix it")
            segments.append(Segment(int(step), start, end))
    return segments


def parse_seconds(text: str) -> float:
    """Parse a time in seconds. Raises ValueError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= LARGEST_NUMBER:
        raise ValueError(f"{shorten(text)} is not a time in seconds; fix it")
    return seconds
