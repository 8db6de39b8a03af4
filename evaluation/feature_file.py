"""The features of an evaluation's videos in one file, so that a second run needs no video.

A .npz, to be read with numpy.load and without pickles:

    features   float32 [N, W, D], W windows of each of N videos
    videos     [N], their paths below --eval_video_root
    left_out   [M], the paths of the videos that have none
    reasons    [M], "absent" or "undecodable"
    settings   JSON: what the features were made with, see feature_settings
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from distributed.device import inference_amp
from utils import InputError, atomic_write, check_file, log, one_line


def checksum(path, flag):
    """The SHA-256 of a file that a flag names, as settings have it."""
    check_file(path, flag)
    return "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()


def feature_settings(args, flags=("num_windows_test",), weights="pretrain_cnn_path"):
    """All that changes the features, by flag; the weights as their file's SHA-256, or None.

    flags: those that say which windows and which features, besides what all features depend on.
    weights: the flag that names the file of weights.
    """
    path = getattr(args, weights)
    return {
        weights: checksum(path, weights) if path else None,
        "num_frames": args.num_frames,
        "video_size": args.video_size,
        **{flag: getattr(args, flag) for flag in flags},
        "amp": inference_amp(args.amp),
        "decoder": args.decoder,
    }


def difference(made, settings):
    """What settings differ in from those that features were made with, for a message, or ''.

    One that is None may be any, and so may the decoder of features that were made before it was
    one of the settings.
    """
    made = {"decoder": settings.get("decoder"), **made}
    return "; ".join(
        f"--{flag} {made.get(flag)}, not {value}"
        for flag, value in settings.items()
        if value is not None and made.get(flag) != value
    )


def write_features(path, settings, features, left_out):
    """Writes the file, whole or not at all. A failure is logged: there are figures to report still.

    features: path below --eval_video_root -> float32 [W, D]; left_out: path -> why it has none.
    """
    try:
        with atomic_write(path) as file:
            np.savez(
                file,
                features=np.stack(list(features.values())),
                videos=np.array(list(features)),
                left_out=np.array(list(left_out), dtype=np.str_),
                reasons=np.array(list(left_out.values()), dtype=np.str_),
                settings=json.dumps(settings),
            )
    except OSError as error:
        log.error("--features: could not write %s: %s", path, one_line(error))
    else:
        log.info("features of %d videos kept in %s", len(features), path)


def read_features(path, settings, names):
    """The features and the left_out of these videos, as write_features got them.

    Raises InputError where the file is damaged, was made with other settings than these (one that
    is None may be any) or without some of the videos. Labels and splits are not its business, and
    nor is whether an absent video has come since: delete the file to have that one, too.
    """
    check_file(path, "features")
    try:
        with np.load(path, allow_pickle=False) as file:
            made = dict(json.loads(file["settings"].item()))
            features = dict(zip(file["videos"].tolist(), file["features"], strict=True))
            left_out = dict(zip(file["left_out"].tolist(), file["reasons"].tolist(), strict=True))
    except Exception as error:  # numpy and zipfile have many ways to say that it is not theirs
        raise InputError(
            f"--features: {path} is damaged or not a file of features ({type(error).__name__}): "
            "delete it or name another file"
        ) from None
    if differ := difference(made, settings):
        raise InputError(
            f"--features: {path} was made with {differ}: delete it or name another file"
        )
    unknown = [name for name in names if name not in features and name not in left_out]
    if unknown:
        raise InputError(
            f"--features: {path} was made without {len(unknown)} of the table's videos "
            f"({unknown[0]}): delete it or name another file"
        )
    log.info("features of %d videos read from %s", len(features), path)
    return (
        {name: features[name] for name in names if name in features},
        {name: left_out[name] for name in names if name in left_out},
    )
