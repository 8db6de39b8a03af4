"""The linear SVM of action recognition: its samples, its scores, and which splits it rejects."""

import numpy as np
import pytest

from evaluation.linear_probe import fit_predict_split, predict_splits
from tests.evaluation.test_recognition import clips


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


def hard_clips(n=300, dim=512, used=8):
    """Make clips on which the dual solver does not converge: a data set and features by name.

    No plane separates the clips, and there are fewer training windows than features.
    """
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


def test_labels_and_splits_are_from_the_data_set_and_clips_without_features_are_skipped():
    names = ["a/1", "b/1", "a/2", "b/2", "a/3", "b/3"]
    features = {name: np.full((2, 1), name[0] == "b", dtype=np.float32) for name in names[:5]}
    dataset = clips(names, [[1] * 3, [1] * 3, [2] * 3, [2] * 3, [0] * 3, [2] * 3])
    for split in predict_splits(dataset, features):
        assert split.videos.tolist() == [2, 3]
        assert split.labels.tolist() == split.predicted.tolist() == ["a", "b"]
    dataset.labels[3] = "a"
    for split in predict_splits(dataset, features):
        assert split.labels.tolist() == ["a", "a"] and split.predicted.tolist() == ["a", "b"]
    dataset.splits[2:] = 0
    with pytest.raises(ValueError, match="split1"):
        predict_splits(dataset, features)
