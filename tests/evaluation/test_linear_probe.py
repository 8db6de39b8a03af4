"""The linear SVM of action recognition: what is trained on, what is scored, what is told."""

from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.linear_probe import check_splits, evaluate_hmdb, fit_predict_split, hmdb_features
from tests.evaluation.test_retrieval import CPU, Brightness, decoding, primaries
from utils import InputError


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


def test_a_split_without_training_classes_or_test_videos_is_refused():
    labels = np.array(["a", "b", "a"])
    check_splits(labels, np.array([[1] * 3, [1] * 3, [2] * 3]))
    with pytest.raises(InputError, match="split2"):
        check_splits(labels, np.array([[1, 1, 1], [1, 2, 1], [2, 2, 2]]))
    with pytest.raises(InputError, match="split1"):
        check_splits(labels, np.ones((3, 3), dtype=int))


def hard_clips(n=300, dim=512, used=8):
    """Clips that no plane separates, with fewer training windows than features: a case in which the
    dual solver does not converge. A data set without videos, and the features by name."""
    rng = np.random.default_rng(0)
    names = [f"c{i % 5}/{i}.avi" for i in range(n)]
    splits = rng.permuted(np.repeat([1, 2], n // 2)[:, None].repeat(3, axis=1), axis=0)
    features = np.zeros((n, 2, dim), dtype=np.float32)
    features[..., :used] = rng.standard_normal((n, 2, used))
    dataset = SimpleNamespace(
        names=names, labels=np.array([name[:2] for name in names]), splits=splits
    )
    return dataset, dict(zip(names, features, strict=True))


@pytest.mark.filterwarnings("error")
def test_the_svm_converges_without_a_seed():
    dataset, features = hard_clips()
    windows = np.stack(list(features.values()))
    metrics, outcomes = evaluate_hmdb(dataset, features, {})
    for seed, part in enumerate(dataset.splits.T):
        np.random.seed(seed)
        truth, predicted = outcomes[seed]
        np.testing.assert_array_equal(truth, dataset.labels[part == 2])
        np.testing.assert_array_equal(predicted, fit_predict_split(windows, dataset.labels, part))
    accuracies = [np.mean(truth == predicted) for truth, predicted in outcomes]
    assert list(metrics) == ["split1", "split2", "split3", "mean"]
    assert list(metrics.values()) == [*accuracies, np.mean(accuracies)]


def test_labels_and_splits_are_the_data_sets_and_clips_without_features_are_left_out(milnce_log):
    milnce_log.set_level("INFO", logger="milnce")
    names = ["a/1", "b/1", "a/2", "b/2", "a/3", "b/3"]
    features = {name: np.full((2, 1), name[0] == "b", dtype=np.float32) for name in names[:5]}
    dataset = SimpleNamespace(
        names=names,
        labels=np.array([name[0] for name in names]),
        splits=np.array([[1] * 3, [1] * 3, [2] * 3, [2] * 3, [0] * 3, [2] * 3]),
    )
    figures, _ = evaluate_hmdb(dataset, features, {"b/3": "undecodable", "b/4": "absent"})
    assert figures == {"split1": 1, "split2": 1, "split3": 1, "mean": 1}
    assert "left out: 1 absent videos, 1 undecodable" in milnce_log.text
    dataset.labels[3] = "a"
    assert evaluate_hmdb(dataset, features, {})[0]["mean"] == 0.5
    dataset.splits[2:] = 0
    with pytest.raises(InputError, match="split1"):
        evaluate_hmdb(dataset, features, {})


def test_what_has_no_features_is_told_with_its_reason():
    dataset = primaries(4, broken=[2])
    dataset.names, dataset.absent = ["a/1", "b/1", "a/2", "b/2"], ["b/3"]
    dataset.labels = np.array(["a", "b", "a", "b"])
    dataset.splits = np.array([[1] * 3, [1] * 3, [2] * 3, [2] * 3])
    features, left_out = hmdb_features(Brightness(), dataset, CPU, **decoding())
    assert {name: windows.shape for name, windows in features.items()} == {
        name: (5, 3) for name in ("a/1", "b/1", "b/2")
    }
    assert left_out == {"b/3": "absent", "a/2": "undecodable"}
    dataset.broken = [0, 2]  # one class is left to train on: nobody keeps such features
    with pytest.raises(InputError, match="split1"):
        hmdb_features(Brightness(), dataset, CPU, **decoding())
