"""Linear action recognition on frozen features: HMDB-51 (paper, section 4).

A module of its own, because importing scikit-learn takes as long as importing torch, and trainings
do not need it.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.svm import LinearSVC

from annotations.hmdb import SPLITS, TEST, TRAIN
from evaluation.features import video_features
from utils import InputError, log


def fit_predict_split(features, labels, parts):
    """What a linear SVM on frozen features takes one split's test videos for (paper, section 4).

    features [N, W, D]: W windows a video, each a training sample of its own; a test video's score
    is the sum of its windows' decision values. labels [N], parts [N]: 1 train, 2 test. Returns
    labels, as many as there are test videos.

    The SVM is that of the release, LinearSVC(C=100), but solved in the primal, which has no seed.
    The release's dual solver may stop short of convergence; its result then depends on the seed.
    """
    train, test = parts == TRAIN, parts == TEST
    windows, dim = features.shape[1:]
    svm = LinearSVC(C=100, dual=False, max_iter=10_000)
    svm.fit(features[train].reshape(-1, dim), np.repeat(labels[train], windows))
    scores = svm.decision_function(features[test].reshape(-1, dim))
    if scores.ndim == 1:  # two classes have one score, of the second
        scores = np.stack([-scores, scores], axis=1)
    scores = scores.reshape(test.sum(), windows, -1).sum(axis=1)
    return svm.classes_[scores.argmax(axis=1)]


def check_splits(labels, splits):
    """Each split needs two classes to train on and a video to test."""
    for name, part in zip(SPLITS, splits.T, strict=True):
        if len(set(labels[part == TRAIN])) < 2 or not (part == TEST).any():
            raise InputError(
                f"--eval_csv, --eval_video_root: of {name}, the videos that can be read have "
                f"{len(set(labels[part == TRAIN]))} classes to train on (two are needed) and "
                f"{(part == TEST).sum()} videos to test (one is)"
            )


def hmdb_features(model, dataset, device, **decoding):
    """Pooled mixed_5c features of HMDB-51: a dict from name to float32 [W, 1024], and another from
    the name of a video that has none to "absent" or "undecodable".

    For the keyword arguments see video_features.
    """
    check_splits(dataset.labels, dataset.splits)  # before the hours of decoding
    videos = video_features(model, dataset, device, mixed5c=True, **decoding)
    kept = list(videos)
    check_splits(dataset.labels[kept], dataset.splits[kept])
    features = {dataset.names[index]: windows for index, windows in videos.items()}
    left_out = dict.fromkeys(dataset.absent, "absent")
    undecodable = (name for name in dataset.names if name not in features)
    return features, {**left_out, **dict.fromkeys(undecodable, "undecodable")}


def evaluate_hmdb(dataset, features, left_out):
    """Linear classification of HMDB-51 (paper, section 4): top-1 of each split, mean.

    The dataset's labels and splits are scored on what hmdb_features gave. Returns the figures, and
    for each split the labels of its test videos and what they were taken for: a pair of arrays.
    """
    kept = [index for index, name in enumerate(dataset.names) if name in features]
    labels, splits = dataset.labels[kept], dataset.splits[kept]
    check_splits(labels, splits)
    if left_out:
        reasons = list(left_out.values())
        absent, undecodable = reasons.count("absent"), reasons.count("undecodable")
        log.info("left out: %d absent videos, %d undecodable", absent, undecodable)
    windows = np.stack([features[dataset.names[index]] for index in kept])
    with ThreadPoolExecutor(len(SPLITS)) as pool:  # liblinear releases the interpreter's lock
        fitted = pool.map(lambda parts: fit_predict_split(windows, labels, parts), splits.T)
        predictions = list(fitted)
    truths = [labels[part == TEST] for part in splits.T]
    outcomes = list(zip(truths, predictions, strict=True))
    accuracies = [float(np.mean(truth == predicted)) for truth, predicted in outcomes]
    figures = {**dict(zip(SPLITS, accuracies, strict=True)), "mean": float(np.mean(accuracies))}
    return figures, outcomes
