"""The linear SVM of action recognition: what it is trained on, what is scored, what is rejected."""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.linear_probe import (
    check_splits,
    fit_predict_split,
    hmdb_features,
    predict_splits,
    top1_metrics,
)
from tests.evaluation.test_features import CPU, Brightness, decoding, primaries


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_svm_sums_a_videos_windows(classes):
    rng = np.random.default_rng(0)
    labels = np.array([f"c{i % classes}" for i in range(60)])
    centres = 3 * rng.standard_normal((classes, 8))
    features = centres[np.arange(60) % classes][:, None] + rng.standard_normal((60, 4, 8))
    parts = np.where(np.arange(60) < 40, 1, 2)
    assert (fit_predict_split(features, labels, parts) == labels[40:]).all()
    # One window far on the wrong side outweighs three that are right: a sum, not a vote.
    outvoted = features.copy()
    outvoted[parts == 2, 0] = 50 * centres[(np.arange(60)[parts == 2] + 1) % classes]
    assert np.mean(fit_predict_split(outvoted, labels, parts) == labels[40:]) < 0.5


def test_unused_clips_neither_train_nor_test():
    labels = np.array(["a", "b", "a", "b", "a"])
    features = np.array([0.0, 1, 0, 1, 100])[:, None, None]
    parts = np.array([1, 1, 2, 2, 0])
    assert fit_predict_split(features, labels, parts).tolist() == ["a", "b"]


def clips(names, splits):
    """A data set without videos; a clip's class is the first part of its name."""
    labels = np.array([name.split("/")[0] for name in names])
    return SimpleNamespace(names=names, labels=labels, splits=np.array(splits))


def test_a_split_without_training_classes_or_test_videos_is_rejected():
    names = ["a/1", "b/1", "a/2"]
    dataset = clips(names, [[1] * 3, [1] * 3, [2] * 3])
    check_splits(dataset, names)
    for lacking, counts in (("b/1", "1 classes .* 1 videos"), ("a/2", "2 classes .* 0 videos")):
        with pytest.raises(ValueError, match=f"split1 .* {counts}"):
            check_splits(dataset, [name for name in names if name != lacking])
    dataset.splits[1, 1] = 2
    with pytest.raises(ValueError, match="split2"):
        check_splits(dataset, names)


def hard_clips(n=300, dim=512, used=8):
    """Clips that no plane separates, with fewer training windows than features: a case in which the
    dual solver does not converge. A data set without videos, and the features by name."""
    rng = np.random.default_rng(0)
    names = [f"c{i % 5}/{i}.avi" for i in range(n)]
    splits = rng.permuted(np.repeat([1, 2], n // 2)[:, None].repeat(3, axis=1), axis=0)
    features = np.zeros((n, 2, dim), dtype=np.float32)
    features[..., :used] = rng.standard_normal((n, 2, used))
    return clips(names, splits), dict(zip(names, features, strict=True))


@pytest.mark.filterwarnings("error")
def test_the_svm_converges_without_a_seed():
    dataset, features = hard_clips()
    windows = np.stack(list(features.values()))
    predictions = predict_splits(dataset, features)
    for seed, (part, split) in enumerate(zip(dataset.splits.T, predictions, strict=True)):
        np.random.seed(seed)
        np.testing.assert_array_equal(split.labels, dataset.labels[part == 2])
        expected = fit_predict_split(windows, dataset.labels, part)
        np.testing.assert_array_equal(split.predicted, expected)
    metrics = top1_metrics(predictions)
    accuracies = [np.mean(labels == predicted) for labels, predicted in predictions]
    assert list(metrics) == ["split1", "split2", "split3", "mean"]
    assert list(metrics.values()) == [*accuracies, np.mean(accuracies)]


def test_labels_and_splits_are_the_data_sets_and_clips_without_features_take_no_part():
    names = ["a/1", "b/1", "a/2", "b/2", "a/3", "b/3"]
    features = {name: np.full((2, 1), name[0] == "b", dtype=np.float32) for name in names[:5]}
    dataset = clips(names, [[1] * 3, [1] * 3, [2] * 3, [2] * 3, [0] * 3, [2] * 3])
    metrics = top1_metrics(predict_splits(dataset, features))
    assert metrics == {"split1": 1, "split2": 1, "split3": 1, "mean": 1}
    dataset.labels[3] = "a"
    assert top1_metrics(predict_splits(dataset, features))["mean"] == 0.5
    dataset.splits[2:] = 0
    with pytest.raises(ValueError, match="split1"):
        predict_splits(dataset, features)


def test_videos_without_features_are_listed_with_the_reason():
    dataset = primaries(4, broken=[2])
    dataset.names, dataset.absent = ["a/1", "b/1", "a/2", "b/2"], ["b/3"]
    features, left_out = hmdb_features(Brightness(), dataset, CPU, **decoding())
    assert {name: windows.shape for name, windows in features.items()} == {
        name: (5, 3) for name in ("a/1", "b/1", "b/2")
    }
    assert left_out == {"b/3": "absent", "a/2": "undecodable"}
