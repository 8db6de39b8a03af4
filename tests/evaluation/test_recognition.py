"""Action recognition: what is extracted, which splits are rejected, and what is reported."""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.feature_file import FeatureSet
from evaluation.recognition import Predictions, check_splits, clip_features, top1_results
from tests.evaluation.test_features import CPU, Brightness, decoding, primaries


def clips(names, splits):
    """Make a data set without videos. A clip's class is the first part of its name."""
    labels = np.array([name.split("/")[0] for name in names])
    return SimpleNamespace(names=names, labels=labels, splits=np.array(splits))


def test_a_split_without_training_classes_or_test_videos_is_rejected():
    names = ["a/1", "b/1", "a/2"]
    dataset = clips(names, [[1] * 3, [1] * 3, [2] * 3])
    check_splits(dataset, names)
    counts = "training classes: {}, .* test videos: {},"
    for lacking, numbers in (("b/1", (1, 1)), ("a/2", (2, 0))):
        with pytest.raises(ValueError, match=f"split1 .*{counts.format(*numbers)}"):
            check_splits(dataset, [name for name in names if name != lacking])
    dataset.splits[1, 1] = 2
    with pytest.raises(ValueError, match="split2"):
        check_splits(dataset, names)


def test_videos_without_features_are_listed_with_the_reason():
    dataset = primaries(4, broken=[2])
    dataset.names, dataset.absent = ["a/1", "b/1", "a/2", "b/2"], ["b/3"]
    features, left_out = clip_features(Brightness(), dataset, CPU, **decoding())
    assert {name: windows.shape for name, windows in features.items()} == {
        name: (5, 3) for name in ("a/1", "b/1", "b/2")
    }
    assert left_out == {"b/3": "absent", "a/2": "undecodable"}


def predictions_of(*splits):
    """Make the predictions of each split from {index of a test video: hit (1) or miss (0)}."""
    return [
        Predictions(
            np.array(list(hits)),
            np.array(["a"] * len(hits)),
            np.where(list(hits.values()), "a", "b"),
        )
        for hits in splits
    ]


def test_top1_has_the_counts_and_the_intervals_of_each_split():
    predictions = predictions_of({0: 1, 1: 0, 2: 1, 3: 1}, {0: 1, 4: 1}, {5: 0, 6: 0, 7: 1})
    results = top1_results(predictions, FeatureSet(dict.fromkeys("abc"), {"d": "absent"}))
    assert results.metrics == {
        "split1": 0.75,
        "split2": 1,
        "split3": pytest.approx(1 / 3),
        "mean": pytest.approx((0.75 + 1 + 1 / 3) / 3),
        "num_videos": 3,
        "num_missing": 1,
    }
    assert results.counts == {"split1": (3, 4), "split2": (2, 2), "split3": (1, 3)}
    assert results.intervals["split2"] == (1, 1)
    low, high = results.intervals["mean"]
    assert low < results.metrics["mean"] < high


def test_a_video_of_several_splits_is_drawn_with_all_of_its_results():
    """Three splits that test the same videos have the interval of one of them, no narrower one."""
    hits = {index: index % 3 > 0 for index in range(90)}
    results = top1_results(predictions_of(hits, hits, hits), FeatureSet({}, {}))
    assert results.intervals["mean"] == pytest.approx(results.intervals["split1"], abs=1e-9)
    apart = [{index + shift: hit for index, hit in hits.items()} for shift in (0, 90, 180)]
    spread = top1_results(predictions_of(*apart), FeatureSet({}, {})).intervals["mean"]
    assert np.ptp(spread) < 0.75 * np.ptp(results.intervals["mean"])
