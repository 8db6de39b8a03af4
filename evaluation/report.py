"""Write the results of an evaluation as one self-contained page, index.html.

The page is report.html with a JSON object inserted. Its script converts the object to text and
images in the browser: no data is ever parsed as HTML, and nothing is fetched.
"""

import base64
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from annotations.clips import SPLITS
from annotations.crosstask import AnnotatedVideo, Task
from annotations.htm_align import Sentence
from distributed.device import inference_amp
from evaluation.feature_file import FeatureSet
from evaluation.localization import PlacedSentences, PlacedSteps
from evaluation.recognition import Predictions
from evaluation.results import Results, list_metrics
from evaluation.retrieval import ground_truth_ranks, top_k_videos
from evaluation.thumbnails import encode_thumbnail
from retrieval_loader import Pair
from utils import DataError, atomic_write, one_line

TEMPLATE = Path(__file__).with_name("report.html")
SLOT = "{{ data }}"
TOP_VIDEOS = 5  # shown per query
BIN_ENDS = (1, 5, 10, 50, 100, 500, 1000)  # of the histogram of ranks
TOP_CONFUSIONS = 20  # pairs of classes that are listed

AnyPath = str | os.PathLike


def page_path(folder: AnyPath) -> Path:
    """Return the path of the page in its folder."""
    return Path(folder, "index.html")


def write_page(
    folder: AnyPath,
    title: str,
    results: Results,
    settings: Sequence[tuple[str, str]],
    data: dict,
) -> Path:
    """Write the page, replacing an older one, and return its path.

    settings: (name, value) pairs, see describe_settings. data: the result of one of the functions
    below whose names end in _data. Raises DataError if the page cannot be written.
    """
    data = {"title": title, "metrics": list_metrics(results), "settings": settings, **data}
    # Without a literal "<", no sentence can end the element that contains the JSON.
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace(SLOT, content)
    path = page_path(folder)
    try:
        with atomic_write(path) as file:
            file.write(page.encode())
    except OSError as error:
        reason = f"could not be written ({one_line(error)}); give another folder"
        raise DataError(path, reason) from None
    return path


def describe_settings(
    table: AnyPath, weights: AnyPath, features: AnyPath = "", *, amp: str, **flags: object
) -> list[tuple[str, str]]:
    """List the settings that metrics depend on: (name, value) pairs, with file names for paths.

    weights: if empty, the file of features is listed instead. flags: {name: value}.
    """
    source = ("weights", weights) if weights else ("features", features)
    return [
        ("table", Path(table).name),
        (source[0], Path(source[1]).name),
        *((f"--{flag}", str(value)) for flag, value in flags.items()),
        ("--amp", inference_amp(amp)),
        ("date", time.strftime("%Y-%m-%d %H:%M")),
    ]


def animate_middle_window(windows: torch.Tensor) -> bytes:
    """Encode the middle window of a video as a thumbnail, WebP of 2 to 4 kB.

    windows: uint8 [W, 3, T, H, W]. The page has one per query: 3 to 5 MB for 1,000 of them.
    """
    clip = windows[len(windows) // 2]
    return encode_thumbnail(clip, size=112, frames=4, milliseconds=400, quality=20)


def retrieval_data(
    pairs: Sequence[Pair], root: AnyPath, thumbnails: Sequence[bytes], scores: np.ndarray
) -> dict:
    """Build the page's data on a retrieval.

    pairs, thumbnails: those of the N items that were scored. root: the folder that the page's paths
    are relative to. scores [N, N]: the result of retrieval.retrieval_scores.
    """
    ranks, top = ground_truth_ranks(scores), top_k_videos(scores, TOP_VIDEOS)
    videos = [
        {**video_name(pair, root), "picture": base64.b64encode(thumbnail).decode()}
        for pair, thumbnail in zip(pairs, thumbnails, strict=True)
    ]
    queries = [
        {
            "text": pair.text if isinstance(pair.text, str) else "",  # an empty cell of the table
            "rank": int(ranks[query]),
            "score": f"{scores[query, query]:.4g}",
            "best": [[int(video), f"{scores[query, video]:.4g}"] for video in top[query]],
        }
        for query, pair in enumerate(pairs)
    ]
    return {"ranks": rank_histogram(ranks), "videos": videos, "queries": queries}


def video_name(pair: Pair, root: AnyPath) -> dict[str, str]:
    """Return a video's file name, its path below root and, for a segment, its seconds."""
    part = "" if pair.end is None else f"{pair.start:g}-{pair.end:g} s"
    path = os.path.relpath(pair.path, root)
    return {"name": Path(pair.path).name, "path": path, "part": part}


def rank_histogram(ranks: np.ndarray) -> list[tuple[str, int]]:
    """Count how many of the N ranks, from 1 to N, are in each of BIN_ENDS' bins: (bin, count)."""
    firsts = [1, *(end + 1 for end in BIN_ENDS if end < len(ranks))]
    lasts = [*(first - 1 for first in firsts[1:]), len(ranks)]
    return [
        (
            f"{first}" if first == last else f"{first}-{last}",
            int(((ranks >= first) & (ranks <= last)).sum()),
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]


def recognition_data(predictions: Sequence[Predictions]) -> dict:
    """Build the page's data on an action recognition.

    predictions: the result of linear_probe.predict_splits.

    "classes": a row per class with test videos, the worst first: its name, its top-1 in each split
    (None without test videos there) and the mean of these. "confusion": how many videos, of all
    splits, of each of "names" were predicted as each of them. "confused": the most frequent
    confusions as (class, predicted class, count, videos of the class).
    """
    names = sorted({str(name) for _, *pair in predictions for labels in pair for name in labels})
    counts = np.zeros((len(SPLITS), len(names), len(names)), dtype=int)
    for split, (_, *pair) in enumerate(predictions):
        np.add.at(counts[split], tuple(np.searchsorted(names, labels) for labels in pair), 1)
    total, right = counts.sum(axis=2), np.diagonal(counts, axis1=1, axis2=2)
    classes = []
    for place, name in enumerate(names):
        top1 = [
            float(right[split, place] / total[split, place]) if total[split, place] else None
            for split in range(len(SPLITS))
        ]
        if tested := [share for share in top1 if share is not None]:
            classes.append((name, *top1, float(np.mean(tested))))
    confusion = counts.sum(axis=0)
    wrong = confusion - np.diag(np.diag(confusion))
    most = np.argsort(-wrong, axis=None, kind="stable")[:TOP_CONFUSIONS]
    confused = [
        (names[truth], names[taken], int(wrong[truth, taken]), int(confusion[truth].sum()))
        for truth, taken in zip(*np.unravel_index(most, wrong.shape), strict=True)
        if wrong[truth, taken]
    ]
    return {
        "splits": SPLITS,
        "classes": sorted(classes, key=lambda row: row[-1]),
        "names": names,
        "confusion": confusion.tolist(),
        "confused": confused,
    }


def summary_data(rows: Sequence[dict]) -> dict:
    """Build the page's data on several evaluations.

    rows: each with "title"; "link", the path of its page or ""; "status", "done" or the reason why
    there are no results; "missing", the count of missing videos or ""; and "metrics", a list of
    (caption, [(published figure, source), ..], our value, what is behind it).
    """
    return {"summary": list(rows)}


def crosstask_data(
    tasks: dict[str, Task],
    videos: dict[str, AnnotatedVideo],
    found: FeatureSet,
    placed: dict[str, PlacedSteps],
    recalls: dict[str, dict],
) -> dict:
    """Build the page's data on a localization of steps.

    tasks: by id. videos, placed: by the videos' names. recalls: "tasks" of crosstask_metrics.

    "tasks": a row per task with videos, the worst first: id, title, recall (None without annotated
    steps), videos, hits, annotated steps. "timelines", "missing": see timeline and missing_videos.
    """
    rows = [
        (name, *(task[key] for key in ("title", "recall", "num_videos", "num_hits", "num_steps")))
        for name, task in recalls.items()
        if task["num_videos"]
    ]
    timelines = []
    for name, places in placed.items():
        video = videos[name]
        task = tasks[video.task]
        steps = []
        for index, text in enumerate(task.steps):
            segments = [(s.start, s.end) for s in video.segments if s.step == index + 1]
            second = None if places.seconds is None else places.seconds[index]
            hit = bool(places.hits[index]) if places.annotated[index] else None
            steps.append((text, segments, [(second, hit)]))
        timelines.append(timeline(video.video, task.title, found.features[name], steps))
    return {
        "tasks": sorted(rows, key=lambda row: 2 if row[2] is None else row[2]),
        "timelines": timelines,
        "unit": "steps",
        "missing": missing_videos(found),
    }


def htm_align_data(
    sentences: dict[str, list[Sentence]],
    found: FeatureSet,
    placed: Sequence[PlacedSentences],
    placed_64: Sequence[PlacedSentences],
) -> dict:
    """Build the page's data on an alignment of sentences; those that are alignable are shown.

    sentences: by the videos' names. placed, placed_64: of these videos, among all seconds and among
    those of the 64 s variant. "timelines", "missing": see timeline and missing_videos.
    """
    timelines = []
    for (name, said), *both in zip(sentences.items(), placed, placed_64, strict=True):
        rows = []
        for index, sentence in enumerate(said):
            if sentence.alignable:
                marks = [
                    (None if (second := int(p.seconds[index])) < 0 else second, bool(p.hits[index]))
                    for p in both
                ]
                rows.append((sentence.text, [(sentence.start, sentence.end)], marks))
        timelines.append(timeline(name, "", found.features[name], rows))
    return {"timelines": timelines, "unit": "sentences", "missing": missing_videos(found)}


def timeline(
    name: str,
    title: str,
    features: np.ndarray,
    rows: Sequence[tuple[str, Sequence[tuple[float, float]], Sequence[tuple[int | None, bool]]]],
) -> dict:
    """Describe a video's timeline. The first mark of a row decides whether the row is a hit.

    features: [T, ..], of each second. rows: (text, true segments in seconds, marks) with marks
    (second or None, hit). A hit is None if the video does not show the step.
    """
    hits = [marks[0][1] for _, _, marks in rows if marks[0][1] is not None]
    return {
        "name": name,
        "title": title,
        "seconds": len(features),
        "hits": sum(hits),
        "total": len(hits),
        "rows": [{"text": text, "segments": parts, "marks": marks} for text, parts, marks in rows],
    }


def missing_videos(found: FeatureSet) -> list[tuple[str, str]]:
    """List the videos without features: (name, "absent" or "undecodable")."""
    return list(found.left_out.items())
