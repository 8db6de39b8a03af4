"""Zero-shot localization in long videos: the steps of CrossTask and the sentences of HTM-Align.

Row t of a video's embeddings [T, 512] stands for second t, see features.SecondWindows. Similarities
are plain dot products. If any similarity of a video is not finite, nothing is placed in that video:
its steps and sentences are misses.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from annotations.crosstask import Segment
from annotations.htm_align import Sentence
from evaluation.feature_file import FeatureSet, name_features
from evaluation.features import SecondWindows, strided_features, track_progress
from evaluation.results import Results, bootstrap_interval
from localization_loader import LongVideos
from utils import log

# The sliding windows of HTM-Align's 64 s variant, in seconds: those of TAN's evaluation.
WINDOW, HOP, SHORTEST = 64, 16, 32
REACH = 64  # how far from a window the middle of an idle sentence may be
EDGE = 4  # windows at each end of the video that also cover the sentences up to that end
NO_CANDIDATE = -60_000.0  # the score of a sentence without candidate seconds


def localization_features(
    model: torch.nn.Module,
    dataset: LongVideos,
    device: torch.device,
    windows: SecondWindows,
    **decoding,
) -> FeatureSet:
    """Embed every second of the videos: float32 [T, 512] each.

    decoding: see strided_features.
    """
    outcomes = strided_features(model, dataset.paths, device, windows, **decoding)
    found = {}
    for index, video, error in track_progress(outcomes, len(dataset.paths)):
        if error:
            log.warning("skipped in the evaluation: %s", error)
        else:
            found[index] = video.features
    return name_features(found, dataset.names, dataset.absent)


# --- CrossTask ----------------------------------------------------------------------------------


def assign_steps(scores: np.ndarray) -> list[int] | None:
    """Assign a second to each step, in the steps' order, so that the sum of scores is the largest.

    scores: [T, N], second against step. Returns N increasing seconds; None if there are fewer
    seconds than steps or a score is not finite. Seconds without a step cost nothing.

    Ties are resolved as by the dynamic program of CrossTask's code. The last step takes second T-1
    if an optimal assignment has it there, otherwise the earliest second of any optimal assignment.
    Then, from the last step to the first, each takes the earliest second that remains optimal.
    """
    seconds, steps = scores.shape
    if seconds < steps or not np.isfinite(scores).all():
        return None
    # best[n][t]: the largest sum of steps 0 to n with step n exactly at second t.
    best = np.full((steps, seconds), -np.inf)
    best[0] = scores[:, 0]
    for step in range(1, steps):
        before = np.maximum.accumulate(best[step - 1, :-1])
        best[step, 1:] = before + scores[1:, step]
    last = best[-1]
    placed = [seconds - 1 if last[-1] == last.max() else int(last.argmax())]
    for step in range(steps - 2, -1, -1):
        placed.append(int(best[step, : placed[-1]].argmax()))
    return placed[::-1]


def step_truth(lines: Sequence[tuple[int, float, float]], num_seconds: int, num_steps: int):
    """Mark the seconds of a video that show a step: bool [num_seconds, num_steps].

    lines: (step from 1, start, end) of a video's annotations, with times in seconds. A line marks
    floor(start) to ceil(end) - 1, so one of zero length at a whole second marks nothing.
    """
    truth = np.zeros((num_seconds, num_steps), bool)
    for step, start, end in lines:
        truth[math.floor(start) : math.ceil(end), step - 1] = True
    return truth


class PlacedSteps(NamedTuple):
    """Where a task's N steps are placed in one of its videos."""

    seconds: list[int] | None  # None: nowhere
    annotated: np.ndarray  # bool [N], the steps that the video shows
    hits: np.ndarray  # bool [N], those whose second is right
    hits_unordered: np.ndarray  # bool [N], the same if each step takes its own best second


def place_steps(scores: np.ndarray, lines: Sequence[Segment]) -> PlacedSteps:
    """Place the steps of a video's task, and compare them with its annotations (see step_truth).

    scores: [T, N], second against step.
    """
    truth = step_truth(lines, *scores.shape)
    steps = np.arange(scores.shape[1])
    seconds = assign_steps(scores)
    nowhere = np.zeros(len(steps), bool)
    hits = nowhere if seconds is None else truth[seconds, steps]
    finite = np.isfinite(scores).all()
    unordered = truth[scores.argmax(axis=0), steps] if finite else nowhere
    return PlacedSteps(seconds, truth.any(axis=0), hits, unordered)


def mean_or_none(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


# Columns of count_steps.
TASK, ANNOTATED, HITS, UNORDERED = range(4)


def count_steps(placed: Sequence[Sequence[PlacedSteps]]) -> np.ndarray:
    """Count the steps of each of n videos: int [n, 4], the columns above. placed: by task."""
    counts = [
        (task, video.annotated.sum(), video.hits.sum(), video.hits_unordered.sum())
        for task, videos in enumerate(placed)
        for video in videos
    ]
    return np.array(counts, dtype=np.int64).reshape(-1, 4)


def mean_pooled_recall(counts: np.ndarray, column: int) -> float:
    """Pool hits / annotated steps over each task's videos. Return the mean over tasks, or NaN."""
    annotated, hits = (np.bincount(counts[:, TASK], counts[:, c]) for c in (ANNOTATED, column))
    some = annotated > 0
    return float(np.mean(hits[some] / annotated[some])) if some.any() else math.nan


def mean_video_recall(counts: np.ndarray) -> float:
    """Average the recalls of each task's videos. Return the mean over tasks, or NaN."""
    counts = counts[counts[:, ANNOTATED] > 0]
    recalls = np.bincount(counts[:, TASK], counts[:, HITS] / counts[:, ANNOTATED])
    videos = np.bincount(counts[:, TASK])
    return float(np.mean(recalls[videos > 0] / videos[videos > 0])) if len(counts) else math.nan


RECALLS = {
    "recall": partial(mean_pooled_recall, column=HITS),
    "recall_per_video": mean_video_recall,
    "recall_unordered": partial(mean_pooled_recall, column=UNORDERED),
}


def crosstask_metrics(
    placed: dict[str, Sequence[PlacedSteps]], titles: dict[str, str], num_missing: int
) -> dict[str, float | int | dict | None]:
    """Compute CrossTask's metrics, as fractions.

    placed, titles: by task. Each recall is a mean over the tasks that have annotated steps. For
    recall, the steps of a task's videos are pooled; for recall_per_video, the videos' recalls are
    averaged. num_hits and num_steps count all tasks together, so their ratio is not recall.
    num_missing: the number of videos that are absent or cannot be decoded.
    """
    counts = count_steps(list(placed.values()))
    tasks = {}
    for number, (task, videos) in enumerate(placed.items()):
        _, steps, hits, _ = counts[counts[:, TASK] == number].sum(axis=0).tolist()
        tasks[task] = {
            "title": titles[task],
            "recall": hits / steps if steps else None,
            "num_videos": len(videos),
            "num_hits": hits,
            "num_steps": steps,
        }
    _, steps, hits, _ = counts.sum(axis=0).tolist()
    return {
        **{name: recall(counts) if steps else None for name, recall in RECALLS.items()},
        "num_videos": len(counts),
        "num_missing": num_missing,
        "num_hits": hits,
        "num_steps": steps,
        "tasks": tasks,
    }


def crosstask_results(
    placed: dict[str, Sequence[PlacedSteps]], titles: dict[str, str], num_missing: int
) -> Results:
    """Compute crosstask_metrics, with intervals from resampled videos."""
    metrics = crosstask_metrics(placed, titles, num_missing)
    counts = count_steps(list(placed.values()))
    intervals = {}
    if metrics["num_steps"]:
        intervals = {name: bootstrap_interval(counts, recall) for name, recall in RECALLS.items()}
    return Results(metrics, {}, intervals)


# --- HTM-Align ----------------------------------------------------------------------------------


def candidate_seconds(sentences: Sequence[Sentence], num_seconds: int) -> np.ndarray:
    """Mark the seconds in which the 64 s variant searches for each sentence: bool [n, num_seconds].

    sentences: (alignable, start, end, ...) of a video, in the file's order. A window of 64 seconds
    slides in hops of 16. It is searched for the sentences from the first to the last of the idle
    (not alignable) ones that are spoken near it; near an end of the video, for all sentences up to
    that end.
    """
    candidates = np.zeros((len(sentences), num_seconds), bool)
    idle = [
        (index, (start + end) / 2)
        for index, (alignable, start, end, *_) in enumerate(sentences)
        if not alignable
    ]
    windows = range(0, num_seconds - SHORTEST, HOP)
    for number, first in enumerate(windows):
        near = [i for i, middle in idle if first - REACH <= middle <= first + WINDOW + REACH]
        if not near:
            continue
        low, high = min(near), max(near) + 1
        if number < EDGE:
            low = 0
        elif number >= len(windows) - EDGE:
            high = len(sentences)
        candidates[low:high, first : first + WINDOW] = True
    return candidates


def roc_auc(labels: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return P(score of a True > of a False) + P(equal) / 2; None if all labels are equal."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores)
    positive, negative = scores[labels], np.sort(scores[~labels])
    if not len(positive) or not len(negative):
        return None
    below = np.searchsorted(negative, positive, "left").sum()
    not_above = np.searchsorted(negative, positive, "right").sum()
    return int(below + not_above) / (2 * len(positive) * len(negative))


class PlacedSentences(NamedTuple):
    """Where a video's n sentences are placed, among all of its seconds or some of them."""

    seconds: np.ndarray  # int [n]; -1: nowhere
    hits: np.ndarray  # bool [n], whether the second is right; meaningless if not alignable
    scores: np.ndarray  # [n], at the best second


def place_sentences(
    scores: np.ndarray, sentences: Sequence[Sentence], candidates: np.ndarray | None = None
) -> PlacedSentences:
    """Place each sentence of a video at its best second, the first of several equal ones.

    scores: [n, T], sentence against second. candidates: bool [n, T], see candidate_seconds; all
    seconds if None. A sentence without candidates is placed at second 0, as in TAN's code.
    """
    if not np.isfinite(scores).all():
        nowhere = np.full(len(sentences), -1)
        lowest = np.full(len(sentences), -np.inf)
        return PlacedSentences(nowhere, np.zeros(len(sentences), bool), lowest)
    if candidates is not None:
        found = candidates.any(axis=1, keepdims=True)
        scores = np.where(candidates, scores, np.where(found, -np.inf, NO_CANDIDATE))
    seconds = scores.argmax(axis=1)
    starts = np.array([math.floor(start) for _, start, *_ in sentences])
    ends = np.array([math.ceil(end) for _, _, end, *_ in sentences])
    return PlacedSentences(seconds, (starts <= seconds) & (seconds <= ends), scores.max(axis=1))


def htm_align_results(
    sentences: Sequence[Sequence[Sentence]],
    placed: Sequence[PlacedSentences],
    placed_64: Sequence[PlacedSentences],
    num_missing: int,
) -> Results:
    """Compute HTM-Align's metrics over the sentences of all videos together.

    placed, placed_64: each video's sentences, placed among all of its seconds and among those of
    candidate_seconds. R1 and R1_64 are fractions of the alignable sentences. Intervals are from
    resampled sentences. num_missing: the number of videos that are absent or cannot be decoded.
    """
    alignable = np.array([bool(s[0]) for video in sentences for s in video], bool)
    metrics, counts, intervals = {}, {}, {}
    for suffix, places in ("", placed), ("_64", placed_64):
        hits = np.concatenate([place.hits for place in places])[alignable]
        scores = np.concatenate([place.scores for place in places])
        metrics[f"R1{suffix}"] = mean_or_none(hits)
        metrics[f"AUC{suffix}"] = roc_auc(alignable, scores)
        if len(hits):
            counts[f"R1{suffix}"] = int(hits.sum()), len(hits)
            intervals[f"R1{suffix}"] = bootstrap_interval(hits)
        if metrics[f"AUC{suffix}"] is not None:
            intervals[f"AUC{suffix}"] = bootstrap_interval(
                np.stack([alignable, scores], axis=1), area_of_rows
            )
    totals = {
        "num_videos": len(sentences),
        "num_missing": num_missing,
        "num_sentences": len(alignable),
        "num_alignable": int(alignable.sum()),
    }
    return Results({**metrics, **totals}, counts, intervals)


def area_of_rows(rows: np.ndarray) -> float:
    """Return the roc_auc of rows (label, score), NaN if all labels are equal."""
    area = roc_auc(rows[:, 0], rows[:, 1])
    return np.nan if area is None else area
