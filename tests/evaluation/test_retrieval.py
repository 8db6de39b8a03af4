"""Retrieval: ranks, metrics, and the effect of broken videos on them."""

import subprocess
import sys

import numpy as np
import pytest

from evaluation.features import video_features
from evaluation.results import bootstrap_interval
from evaluation.retrieval import (
    count_videos,
    ground_truth_ranks,
    retrieval_metrics,
    retrieval_results,
    retrieval_scores,
    top_k_videos,
)
from tests.evaluation.test_features import CPU, Brightness, decoding, primaries
from tests.helpers import ROOT, golden_json


@pytest.mark.parametrize("case", golden_json("misc")["metrics"], ids=lambda c: f"n{c['n']}")
def test_metrics_match_the_golden_values(case):
    n = case["n"]
    scores = np.random.RandomState(case["numpy_seed"]).standard_normal((n, n)) + 2 * np.eye(n)
    metrics = retrieval_metrics(scores)
    assert metrics == pytest.approx({name: case[name] for name in ("R1", "R5", "R10", "MR")})


def test_results_have_counts_and_intervals_over_the_queries():
    scores = np.random.default_rng(2).standard_normal((60, 60)) + 2 * np.eye(60)
    results = retrieval_results(scores, {"num_videos": 60, "num_missing": 1})
    assert results.metrics == {**retrieval_metrics(scores), "num_videos": 60, "num_missing": 1}
    assert {name: hits / of for name, (hits, of) in results.counts.items()} == {
        name: results.metrics[name] for name in ("R1", "R5", "R10")
    }
    for name, (low, high) in results.intervals.items():
        assert low <= results.metrics[name] <= high and low < high, name
    assert results.intervals["MR"] == bootstrap_interval(ground_truth_ranks(scores), np.median)


def test_ties_count_against_the_right_video():
    metrics = retrieval_metrics(np.zeros((20, 20)))
    assert metrics == {"R1": 0, "R5": 0, "R10": 0, "MR": 20}


def test_nan_scores_rank_last():
    assert retrieval_metrics(np.full((20, 20), np.nan))["MR"] == 20


def test_the_best_videos_agree_with_the_ranks():
    """As many videos come before the right one as count against it."""
    scores = np.random.default_rng(0).integers(0, 4, (30, 30)).astype(float)  # most are ties
    scores[3, 3] = scores[5, 6] = np.nan
    order = top_k_videos(scores, 30)
    places = [list(row).index(text) + 1 for text, row in enumerate(order)]
    assert places == ground_truth_ranks(scores).tolist()
    assert all(sorted(row) == list(range(30)) for row in order)
    first = scores[0, order[0]]
    assert (first[1:] <= first[:-1]).all()
    np.testing.assert_array_equal(top_k_videos(scores, 5), order[:, :5])
    assert top_k_videos(scores[:3, :3], 5).shape == (3, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_videos_are_logged_and_removed_from_both_sides(milnce_log, workers):
    for broken, counts in (((), (3, 2)), ((1,), (2, 3))):
        model, dataset = Brightness(), primaries(3, broken=broken)
        videos = video_features(model, dataset, CPU, **decoding(workers))
        scores = retrieval_scores(model, dataset, videos, CPU)
        assert retrieval_metrics(scores) == {"R1": 1, "R5": 1, "R10": 1, "MR": 1}
        assert tuple(count_videos(dataset, videos).values()) == counts
    assert "video 1 is broken" in milnce_log.text


def test_it_is_an_error_if_no_video_can_be_decoded():
    with pytest.raises(ValueError, match="none of the videos can be decoded"):
        retrieval_scores(Brightness(), primaries(2), {}, CPU)


def test_training_imports_no_package_for_pages_or_svms():
    """They take seconds to import, and training should run without them."""
    others = {"PIL", "sklearn", "flask", "waitress"}
    code = f"import main_distributed, sys; assert not {others} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
