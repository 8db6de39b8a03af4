"""Action recognition on HMDB-51 and UCF-101: features, checks of the splits, metrics."""

from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np
import torch

from annotations.clips import SPLITS, TEST, TRAIN
from evaluation.feature_file import FeatureSet, name_features
from evaluation.features import video_features
from evaluation.results import Results, bootstrap_interval
from recognition_loader import Recognition


class Predictions(NamedTuple):
    """The classes of a split's n test videos, as strings."""

    videos: np.ndarray  # [n], their indices in the data set
    labels: np.ndarray  # [n], true
    predicted: np.ndarray  # [n]


def check_splits(dataset: Recognition, names: Container[str]) -> None:
    """Check that these videos include two training classes and a test video in each split.

    Raises ValueError if they do not.
    """
    kept = np.array([name in names for name in dataset.names])
    for split, parts in zip(SPLITS, dataset.splits.T, strict=True):
        classes = len(set(dataset.labels[kept & (parts == TRAIN)]))
        tested = int((kept & (parts == TEST)).sum())
        if classes < 2 or not tested:
            raise ValueError(
                f"too few videos of {split} can be read (training classes: {classes}, at least 2 "
                f"needed; test videos: {tested}, at least 1 needed); add videos"
            )


def clip_features(
    model: torch.nn.Module, dataset: Recognition, device: torch.device, **decoding
) -> FeatureSet:
    """Compute the pooled mixed_5c features of a data set's videos, float32 [W, 1024] each.

    decoding: see video_features.
    """
    videos = video_features(model, dataset, device, mixed5c=True, **decoding)
    return name_features(videos, dataset.names, dataset.absent)


def top1_results(predictions: Sequence[Predictions], found: FeatureSet) -> Results:
    """Compute the top-1 accuracy of each split, and their mean, as fractions.

    Intervals are from resampled test videos. For the mean, a video is drawn together with its
    results in all splits that test it. found: the features, for the numbers of videos.
    """
    hits = {
        split: labels == predicted
        for split, (_, labels, predicted) in zip(SPLITS, predictions, strict=True)
    }
    accuracies = {split: float(hit.mean()) for split, hit in hits.items()}
    tested, rows = np.unique(np.concatenate([p.videos for p in predictions]), return_inverse=True)
    outcomes = np.full((len(tested), len(SPLITS)), np.nan)
    columns = np.repeat(range(len(SPLITS)), [len(hit) for hit in hits.values()])
    outcomes[rows, columns] = np.concatenate(list(hits.values()))
    return Results(
        {
            **accuracies,
            "mean": float(np.mean(list(accuracies.values()))),
            "num_videos": len(found.features),
            "num_missing": len(found.left_out),
        },
        {split: (int(hit.sum()), len(hit)) for split, hit in hits.items()},
        {
            **{split: bootstrap_interval(hit) for split, hit in hits.items()},
            "mean": bootstrap_interval(outcomes, mean_of_splits),
        },
    )


def mean_of_splits(outcomes: np.ndarray) -> float:
    """Return the mean accuracy of the splits. outcomes [n, splits]: 1, 0, or NaN if not tested."""
    tested = (~np.isnan(outcomes)).sum(axis=0)
    if not tested.all():
        return np.nan
    return float((np.nansum(outcomes, axis=0) / tested).mean())
