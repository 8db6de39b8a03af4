"""Localization: CrossTask's placed steps, HTM-Align's placed sentences, and their metrics.

evaluations.json has values that were computed with the reference code.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from evaluation.localization import (
    assign_steps,
    candidate_seconds,
    crosstask_metrics,
    crosstask_results,
    htm_align_results,
    place_sentences,
    place_steps,
    roc_auc,
    step_truth,
)
from tests.helpers import golden_json

GOLDEN = golden_json("evaluations")
CROSSTASK, HTM_ALIGN = GOLDEN["crosstask"], GOLDEN["htm_align"]


def similarities(row, shape):
    """Draw the matrix of a row of evaluations.json. (The reference received it as float32.)"""
    rs = np.random.RandomState(row["seed"])
    if row["kind"] == "normal":
        matrix = rs.standard_normal(shape)
    elif row["kind"] == "grid":
        matrix = rs.randint(1, 5, shape) / 4
    elif row["kind"] == "signed":
        matrix = rs.randint(-2, 3, shape) / 4
    else:
        matrix = np.full(shape, 0.25)
        for place in row.get("peaks", ()):
            matrix[tuple(place)] = 1
    return matrix


def close(value):
    return pytest.approx(value, abs=1e-9)


# --- CrossTask ----------------------------------------------------------------------------------


def golden_steps(case):
    return similarities(case, (case["T"], case["N"]))


@pytest.mark.parametrize("case", CROSSTASK["assign"], ids=lambda case: case["name"])
def test_steps_are_placed_where_the_reference_places_them(case):
    scores = golden_steps(case)
    seconds = assign_steps(scores.astype(np.float32))
    assert seconds == case["seconds"]
    if seconds:
        assert scores[seconds, range(case["N"])].sum() == close(case["total"])


def brute_force(scores):
    """Search all placements for the optimum that the reference chooses.

    The last step's second decides first (T-1, then the earliest), then that of the step before it
    (the earliest), and so on.
    """
    seconds, steps = scores.shape
    places = list(itertools.combinations(range(seconds), steps))
    totals = [sum(scores[t, n] for n, t in enumerate(place)) for place in places]
    optima = [place for place, total in zip(places, totals, strict=True) if total == max(totals)]
    return list(min(optima, key=lambda place: (place[-1] != seconds - 1, place[::-1])))


@given(st.data())
def test_ties_are_resolved_as_by_a_search_of_all_placements(data):
    steps = data.draw(st.integers(1, 4))
    shape = (data.draw(st.integers(steps, 8)), steps)
    scores = data.draw(arrays(np.float64, shape, elements=st.sampled_from([-0.5, 0.0, 0.5, 1.0])))
    assert assign_steps(scores) == brute_force(scores)


def test_a_video_of_three_hours_is_placed():
    scores = np.random.RandomState(0).standard_normal((10_800, 11)).astype(np.float32)
    seconds = assign_steps(scores)
    assert seconds == sorted(set(seconds)) and len(seconds) == 11
    assert scores[seconds, range(11)].min() > 2.5  # each step gets one of its largest scores


def test_scores_are_summed_in_double_precision():
    """In float32 the small scores would vanish beside the large one, and all sums would tie."""
    scores = np.zeros((6, 2), np.float32)
    scores[0, 0] = 1e8
    scores[:, 1] = [0, 1, 2, 3, 2, 0]
    assert assign_steps(scores) == [0, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_place_nothing(bad):
    scores = np.zeros((6, 2))
    scores[3, 0] = bad
    assert assign_steps(scores) is None
    placed = place_steps(scores, [(1, 0, 6), (2, 0, 6)])
    assert placed.annotated.all() and not placed.hits.any() and not placed.hits_unordered.any()


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ((1, 0, 1), [0]),
        ((1, 1.2, 2.1), [1, 2]),
        ((1, 2.5, 2.5), [2]),
        ((1, 3.0, 3.0), []),
        ((1, 3.9, 40.0), [3, 4]),
        ((1, 5.0, 6.0), []),
        ((1, 4.99, 5.0), [4]),
    ],
)
def test_a_segment_marks_the_seconds_that_it_overlaps(line, seconds):
    truth = step_truth([line], 5, 2)
    assert truth.shape == (5, 2) and truth.dtype == bool
    assert np.flatnonzero(truth[:, 0]).tolist() == seconds and not truth[:, 1].any()


def golden_lines(video):
    cells = [line.split(",") for line in video["lines"]]
    return [(int(step), float(start), float(end)) for step, start, end in cells]


def golden_placed(videos, tasks):
    placed = {task: {} for task in tasks}
    for video in videos:
        if video["lines"] is not None:
            scores = similarities(video, (video["T"], tasks[video["task"]]))
            placed[video["task"]][video["video"]] = place_steps(scores, golden_lines(video))
    return placed


def metrics_of(placed):
    titles = {task: f"Task {task}" for task in placed}
    videos = {task: list(videos.values()) for task, videos in placed.items()}
    return crosstask_metrics(videos, titles, num_missing=0)


def test_crosstask_intervals_resample_videos():
    """Each statistic of a resample is that of crosstask_metrics on the same videos."""
    placed = {
        task: list(videos.values())
        for task, videos in golden_placed(CROSSTASK["videos"], CROSSTASK["tasks"]).items()
    }
    results = crosstask_results(placed, dict.fromkeys(placed, ""), num_missing=0)
    assert results.metrics == crosstask_metrics(placed, dict.fromkeys(placed, ""), num_missing=0)
    drawable = [(task, video) for task, videos in placed.items() for video in videos]
    rng = np.random.default_rng(0)
    drawn = {name: [] for name in results.intervals}
    for rows in rng.integers(len(drawable), size=(1000, len(drawable))):
        sample = {task: [] for task in placed}
        for row in rows:
            sample[drawable[row][0]].append(drawable[row][1])
        metrics = crosstask_metrics(sample, dict.fromkeys(placed, ""), num_missing=0)
        for name, values in drawn.items():
            values.append(np.nan if metrics[name] is None else metrics[name])
    assert drawn.keys() == {"recall", "recall_per_video", "recall_unordered"}
    for name, values in drawn.items():
        assert results.intervals[name] == pytest.approx(np.nanquantile(values, [0.025, 0.975]))


def test_the_hits_of_crosstask_match_the_reference():
    placed = golden_placed(CROSSTASK["videos"], CROSSTASK["tasks"])
    videos = {name: video for videos in placed.values() for name, video in videos.items()}
    assert videos.keys() == CROSSTASK["expected"]["videos"].keys()
    for name, expected in CROSSTASK["expected"]["videos"].items():
        assert videos[name].seconds == expected["seconds"]
        assert (np.flatnonzero(videos[name].annotated) + 1).tolist() == expected["annotated"]
        assert (np.flatnonzero(videos[name].hits) + 1).tolist() == expected["hit"]


def check_crosstask(metrics):
    expected = CROSSTASK["expected"]
    for name, key in (
        ("recall", "recall"),
        ("recall_unordered", "unordered"),
        ("recall_per_video", "per_video"),
    ):
        assert metrics[name] == close(expected[key]["mean"])
    for task, recall in expected["recall"]["tasks"].items():
        assert metrics["tasks"][task]["recall"] == close(recall)


def test_the_metrics_of_crosstask_match_the_reference():
    metrics = metrics_of(golden_placed(CROSSTASK["videos"], CROSSTASK["tasks"]))
    check_crosstask(metrics)
    annotated = [video["annotated"] for video in CROSSTASK["expected"]["videos"].values()]
    assert metrics["num_videos"] == len(annotated) == 12
    assert metrics["num_steps"] == sum(map(len, annotated))
    hits = [video["hit"] for video in CROSSTASK["expected"]["videos"].values()]
    assert metrics["num_hits"] == sum(map(len, hits))
    first = metrics["tasks"]["101"]
    counts = {"num_videos": 3, "num_hits": 6, "num_steps": 10}
    assert first == {"title": "Task 101", "recall": close(0.6), **counts}
    assert metrics["recall"] != close(CROSSTASK["expected"]["log_softmax"]["mean"])


def test_a_task_without_annotated_steps_is_not_in_the_mean():
    more = CROSSTASK["task_without_steps"]
    tasks = {**CROSSTASK["tasks"], **more["tasks"]}
    metrics = metrics_of(golden_placed([*CROSSTASK["videos"], *more["videos"]], tasks))
    check_crosstask(metrics)
    assert metrics["tasks"]["505"]["recall"] is None
    assert metrics["tasks"]["505"]["num_videos"] == 2
    alone = metrics_of(golden_placed(more["videos"], more["tasks"]))
    assert alone["recall"] is alone["recall_per_video"] is alone["recall_unordered"] is None


# --- HTM-Align ----------------------------------------------------------------------------------


def golden_sentences(video):
    scores = similarities(video, (len(video["sentences"]), video["T"]))
    return scores, video["sentences"], candidate_seconds(video["sentences"], video["T"])


@pytest.mark.parametrize("video", HTM_ALIGN["videos"], ids=lambda video: video["video"])
def test_sentences_are_placed_where_the_reference_places_them(video):
    scores, sentences, candidates = golden_sentences(video)
    assert candidates.shape == (len(sentences), video["T"])
    expected = HTM_ALIGN["expected"]["videos"][video["video"]]
    assert candidates.sum(axis=1).tolist() == expected["candidates"]
    alignable = np.array([sentence[0] for sentence in sentences], bool)
    for key, among in (("global", None), ("window_64", candidates)):
        placed = place_sentences(scores, sentences, among)
        assert placed.seconds[alignable].tolist() == expected[key]["seconds"]
        hits = "".join(str(int(hit)) for hit in placed.hits[alignable])
        assert hits == expected[key]["hits"]


def golden_metrics(videos):
    matrices = [golden_sentences(video) for video in videos]
    return htm_align_results(
        [sentences for _, sentences, _ in matrices],
        [place_sentences(scores, sentences) for scores, sentences, _ in matrices],
        [place_sentences(*matrix) for matrix in matrices],
        num_missing=0,
    ).metrics


def test_the_metrics_of_htm_align_match_the_reference():
    metrics = golden_metrics(HTM_ALIGN["videos"])
    expected = HTM_ALIGN["expected"]
    assert metrics["R1"] == close(expected["global"]["R1"])
    assert metrics["AUC"] == close(expected["global"]["AUC"])
    assert metrics["R1_64"] == close(expected["window_64"]["R1"])
    assert metrics["AUC_64"] == close(expected["window_64"]["AUC"])
    counts = [metrics[key] for key in ("num_videos", "num_sentences", "num_alignable")]
    sentences = [sentence for video in HTM_ALIGN["videos"] for sentence in video["sentences"]]
    assert counts == [9, len(sentences), sum(sentence[0] for sentence in sentences)]


def test_sentences_of_one_kind_have_no_auc():
    videos = {video["video"]: video for video in HTM_ALIGN["videos"]}
    alignable = golden_metrics([videos["all_alignable"]])
    assert alignable["R1"] == 0 and alignable["AUC"] is alignable["AUC_64"] is None
    idle = golden_metrics([videos["none_alignable"]])
    assert idle["R1"] is idle["R1_64"] is idle["AUC"] is None


def test_sentences_of_a_video_with_a_nan_score_are_misses_with_the_lowest_scores():
    sentences = [(1, 0.0, 40.0), (0, 3.0, 5.0)]
    good, bad = np.zeros((2, 40)), np.zeros((2, 40))
    bad[1, 7] = np.nan
    for candidates in (None, candidate_seconds(sentences, 40)):
        placed = [place_sentences(scores, sentences, candidates) for scores in (good, bad)]
        assert placed[0].hits[0] and not placed[1].hits.any()
        assert placed[1].scores.max() < placed[0].scores.min()
        metrics = htm_align_results([sentences] * 2, placed, placed, num_missing=0).metrics
        assert metrics["R1"] == 0.5 and metrics["AUC"] == 0.5


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([-np.inf, -6e4, 0.0, 0.5, 1.0]))))
def test_auc_counts_pairs(rows):
    labels, scores = [row[0] for row in rows], [row[1] for row in rows]
    pairs = [(a > b) + (a == b) / 2 for x, a in rows if x for y, b in rows if not y]
    assert roc_auc(labels, scores) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_auc_agrees_with_scikit_learn():
    rs = np.random.RandomState(0)
    labels, scores = rs.rand(500) < 0.3, rs.randint(0, 40, 500) / 8
    assert roc_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
