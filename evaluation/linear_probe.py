"""A linear SVM on frozen features: action recognition on HMDB-51 and UCF-101 (paper, section 4).

A separate module because it imports scikit-learn, which is slow to import and which trainings and
retrieval do not need.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.svm import LinearSVC

from annotations.clips import SPLITS, TEST, TRAIN
from evaluation.recognition import Predictions, check_splits
from recognition_loader import Recognition


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
    if scores.ndim == 1:  # two classes have one score, that of the second
        scores = np.stack([-scores, scores], axis=1)
    scores = scores.reshape(test.sum(), windows, -1).sum(axis=1)
    return svm.classes_[scores.argmax(axis=1)]


def predict_splits(dataset: Recognition, features: dict[str, np.ndarray]) -> list[Predictions]:
    """Train and test on each of the three splits, with the data set's labels.

    features: by the videos' names; videos without features are skipped. Raises ValueError if the
    others do not make three splits, see check_splits.
    """
    check_splits(dataset, features)
    kept = np.array([index for index, name in enumerate(dataset.names) if name in features])
    labels, splits = dataset.labels[kept], dataset.splits[kept]
    windows = np.stack([features[dataset.names[index]] for index in kept])
    with ThreadPoolExecutor(len(SPLITS)) as pool:  # liblinear releases the interpreter's lock
        predicted = list(
            pool.map(lambda parts: fit_predict_split(windows, labels, parts), splits.T)
        )
    tests = [parts == TEST for parts in splits.T]
    return [
        Predictions(kept[test], labels[test], classes)
        for test, classes in zip(tests, predicted, strict=True)
    ]
