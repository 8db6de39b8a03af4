"""Store the features of an evaluation's videos in one file, so that a later run needs no video.

The file is a .npz, which numpy.load reads without pickles:

    features   float32 [N, W, D], W windows of each of N videos; if the videos have different
               numbers of windows, [sum of windows, D], one video after the other
    windows    int64 [N], the number of windows of each video (absent in files older than 2026-12)
    videos     [N], names of the videos, such as paths below --eval_video_root
    left_out   [M], names of the videos without features
    reasons    [M], "absent" or "undecodable"
    settings   JSON: the settings that the features depend on, see feature_settings
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distributed.device import inference_amp
from s3dg import summarize
from utils import DataError, atomic_write, log

AnyPath = str | os.PathLike


class FeatureSet(NamedTuple):
    """The features of a data set, keyed by video name."""

    features: dict[str, np.ndarray]  # float32 [W, D]
    left_out: dict[str, str]  # videos without features: "absent" or "undecodable"


def name_features(
    found: Mapping[int, np.ndarray], names: Sequence[str], absent: Iterable[str]
) -> FeatureSet:
    """Key features by the videos' names, and list the videos without features.

    found: the features of the decodable videos, by index in names. absent: the names of the videos
    without a file, which are not in names.
    """
    features = {name: found[index] for index, name in enumerate(names) if index in found}
    undecodable = (name for name in names if name not in features)
    reasons = {**dict.fromkeys(absent, "absent"), **dict.fromkeys(undecodable, "undecodable")}
    return FeatureSet(features, reasons)


def log_left_out(left_out: dict[str, str]) -> None:
    """Log the number of videos without features and the first names, for each reason."""
    for reason in ("absent", "undecodable"):
        if names := [name for name, why in left_out.items() if why == reason]:
            log.info("skipped videos: %d %s (%s)", len(names), reason, summarize(names, 10))


def checksum(path: AnyPath) -> str:
    """Compute the SHA-256 of a file, "sha256:<hex>". Raises OSError."""
    return "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()


def feature_settings(
    weights: str | None,
    *,
    num_frames: int,
    video_size: int,
    amp: str,
    weights_key: str = "pretrain_cnn_path",
    **others: object,
) -> dict:
    """Return the settings that features depend on, as they are stored: {flag name: value}.

    weights: the checksum of their file, stored under weights_key; None if unknown. amp: as on the
    command line, "auto" included. others: the script's other settings, such as the stride.
    """
    return {
        weights_key: weights,
        "num_frames": num_frames,
        "video_size": video_size,
        **others,
        "amp": inference_amp(amp),
    }


def difference(made: dict, settings: dict) -> str:
    """Describe how settings differ from those that features were made with; '' if they do not.

    A setting of None matches any value. Features that were made before the decoder was stored
    match any decoder.
    """
    made = {"decoder": settings.get("decoder"), **made}
    return "; ".join(
        f"--{flag} {made.get(flag)}, not {value}"
        for flag, value in settings.items()
        if value is not None and made.get(flag) != value
    )


def write_features(path: AnyPath, settings: dict, stored: FeatureSet) -> None:
    """Write the file atomically. Raises OSError."""
    videos = list(stored.features.values())
    windows = [len(features) for features in videos]
    join = np.stack if len(set(windows)) == 1 else np.concatenate
    with atomic_write(path) as file:
        np.savez(
            file,
            features=join(videos),
            windows=np.array(windows),
            videos=np.array(list(stored.features)),
            left_out=np.array(list(stored.left_out), dtype=np.str_),
            reasons=np.array(list(stored.left_out.values()), dtype=np.str_),
            settings=json.dumps(settings),
        )
    log.info("features written to %s (videos: %d)", path, len(stored.features))


def read_settings(path: AnyPath) -> dict:
    """Read the settings that a feature file was made with. The file must be valid."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(file["settings"].item())


def read_windows(file: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the features of each video [W, D]. Raises an exception if the file is damaged."""
    features = file["features"]
    if features.ndim == 3:
        return list(features)
    ends = np.cumsum(file["windows"])
    if ends[-1] != len(features):
        raise ValueError("the numbers of windows do not add up")
    return np.split(features, ends[:-1])


def read_features(path: AnyPath, settings: dict, names: Iterable[str]) -> FeatureSet:
    """Read the features of the named videos.

    Raises OSError; DataError if the file is damaged, was made with other settings (see difference)
    or lacks some of the videos. A video that was absent when the file was written stays absent.
    """
    fix = "delete it or give another file"
    try:
        with np.load(path, allow_pickle=False) as file:
            made = dict(json.loads(file["settings"].item()))
            features = dict(zip(file["videos"].tolist(), read_windows(file), strict=True))
            left_out = dict(zip(file["left_out"].tolist(), file["reasons"].tolist(), strict=True))
    except OSError:
        raise
    except Exception as error:  # np.load raises many exception types on invalid files
        reason = f"is damaged or not a feature file ({type(error).__name__}); {fix}"
        raise DataError(path, reason) from None
    if differ := difference(made, settings):
        raise DataError(path, f"was made with {differ}; {fix}")
    names = list(names)
    unknown = [name for name in names if name not in features and name not in left_out]
    if unknown:
        raise DataError(path, f"lacks videos of the table: {summarize(unknown)}; {fix}")
    log.info("features read from %s (videos: %d)", path, len(features))
    return FeatureSet(
        {name: features[name] for name in names if name in features},
        {name: left_out[name] for name in names if name in left_out},
    )
