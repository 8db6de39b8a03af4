"""Linear action recognition on frozen features: HMDB-51 (paper, section 4).

A separate module because it imports scikit-learn, which is slow to import and which trainings do
not need.
"""

from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from sklearn.svm import LinearSVC

from annotations.hmdb import SPLITS, TEST, TRAIN
from evaluation.feature_file import FeatureSet
from evaluation.features import video_features
from hmdb_loader import HMDB51


class Predictions(NamedTuple):
    """The classes of a split's n test videos, as strings."""

    labels: np.ndarray  # [n], true
    predicted: np.ndarray  # [n]


def fit_predict_split(features: np.ndarray, labels: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Train a linear SVM on one split and predict the labels of its test videos [n].

    features [N, W, D]: W windows per video, each a training sample. A test video's score is the sum
    of its windows' decision values. labels [N]; parts [N]: TRAIN, TEST or neither.

    The SVM is that of the release, LinearSVC(C=100), but solved in the primal, which has no seed.
    The release's dual solver may stop short of convergence; its result then depends on the seed.
    """
    train, test = parts == TRAIN, parts == TEST
    windows, dim = features.shape[1:]
    svm = LinearSVC(C=100, dual=False, max_iter=10_000)
    svm.fit(features[train].reshape(-1, dim), np.repeat(labels[train], windows))
    scores = svm.decision_function(features[test].reshape(-1, dim))
    if scores.ndim == 1:  # two classes have one score, the second one's
        scores = np.stack([-scores, scores], axis=1)
    scores = scores.reshape(test.sum(), windows, -1).sum(axis=1)
    return svm.classes_[scores.argmax(axis=1)]


def check_splits(dataset: HMDB51, names: Container[str]) -> None:
    """Check that in each split these videos have two classes to train on and one to test.

    Raises ValueError if not.
    """
    kept = np.array([name in names for name in dataset.names])
    for split, parts in zip(SPLITS, dataset.splits.T, strict=True):
        classes = len(set(dataset.labels[kept & (parts == TRAIN)]))
        tested = int((kept & (parts == TEST)).sum())
        if classes < 2 or not tested:
            raise ValueError(
                f"the videos of {split} that can be read have {classes} classes to train on (two "
                f"are needed) and {tested} videos to test (one is needed); add videos"
            )


def hmdb_features(
    model: torch.nn.Module, dataset: HMDB51, device: torch.device, **decoding
) -> FeatureSet:
    """Compute the pooled mixed_5c features of HMDB-51's videos, float32 [W, 1024] each.

    decoding: see video_features.
    """
    videos = video_features(model, dataset, device, mixed5c=True, **decoding)
    features = {dataset.names[index]: windows for index, windows in videos.items()}
    undecodable = (name for name in dataset.names if name not in features)
    left_out = {
        **dict.fromkeys(dataset.absent, "absent"),
        **dict.fromkeys(undecodable, "undecodable"),
    }
    return FeatureSet(features, left_out)


def predict_splits(dataset: HMDB51, features: dict[str, np.ndarray]) -> list[Predictions]:
    """Train and test on each of the three splits, with the data set's labels.

    features: by the videos' names; videos without features are skipped. Raises ValueError if the
    others do not make three splits, see check_splits.
    """
    check_splits(dataset, features)
    kept = [index for index, name in enumerate(dataset.names) if name in features]
    labels, splits = dataset.labels[kept], dataset.splits[kept]
    windows = np.stack([features[dataset.names[index]] for index in kept])
    with ThreadPoolExecutor(len(SPLITS)) as pool:  # liblinear releases the interpreter's lock
        predicted = list(
            pool.map(lambda parts: fit_predict_split(windows, labels, parts), splits.T)
        )
    truths = [labels[parts == TEST] for parts in splits.T]
    return list(map(Predictions, truths, predicted))


def top1_metrics(predictions: Sequence[Predictions]) -> dict[str, float]:
    """Compute the top-1 accuracy of each split, and their mean, as fractions."""
    accuracies = [float(np.mean(labels == predicted)) for labels, predicted in predictions]
    return {**dict(zip(SPLITS, accuracies, strict=True)), "mean": float(np.mean(accuracies))}
