"""Checkpoints: {"epoch", "state_dict", "optimizer", "scheduler"}, or a bare state dict to read.

Keys may carry the `module.` of DistributedDataParallel; ours do, as the public release writes and
expects them. Files are data: nothing pickled is run.
"""

import contextlib
import re
import zipfile
from pathlib import Path

import torch

import s3dg
from utils import InputError, atomic_write, check_file, log, one_line

KEPT = 10  # newest checkpoints of a run, one an epoch
KEPT_STEPS = 2  # and newest ones in the middle of an epoch: to resume from
NAME = re.compile(r"epoch(\d{4,})(?:_step(\d{8,}))?\.pth\.tar")


@contextlib.contextmanager
def as_input_error(flag):
    """What s3dg says of a file becomes an InputError that names the flag it came from."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"--{flag}: {error}") from None


def read_checkpoint(path, flag="pretrain_cnn_path"):
    """Reads a checkpoint or the released weights: a dict whose "state_dict" has no `module.`.

    Raises InputError where the file is not one.
    """
    check_file(path, flag)
    with as_input_error(flag):
        return s3dg.read_weights(path)


def model_of(state, path, token_to_word_path="data/dict.npy", flag="pretrain_cnn_path"):
    """Builds the S3D that a state dict was made from, on the CPU, in training mode.

    `path` and `flag` name the file in messages. See s3dg.model_of.
    """
    with as_input_error(flag):
        return s3dg.model_of(state, path, token_to_word_path)


def load_model(path, token_to_word_path="data/dict.npy", flag="pretrain_cnn_path"):
    """The S3D of a checkpoint or of the released weights, on the CPU, in evaluation mode."""
    state = read_checkpoint(path, flag)["state_dict"]
    return model_of(state, path, token_to_word_path, flag).eval()


def numbered(folder):
    """The run's checkpoints as ((finished epochs, step or 0), path), oldest first."""
    found = ((NAME.fullmatch(path.name), path) for path in Path(folder).glob("epoch*.pth.tar"))
    return sorted(((int(match[1]), int(match[2] or 0)), path) for match, path in found if match)


def save_checkpoint(folder, content, step=None):
    """Writes epochNNNN.pth.tar, or epochNNNN_stepNNNNNNNN.pth.tar in the middle of an epoch.

    Removes all but the newest of its kind. Half a file never has that name. Returns the path, or
    None where it could not be written, which is logged: the older ones are still there.
    """
    folder = Path(folder)
    within = "" if step is None else f"_step{step:08d}"
    path = folder / f"epoch{content['epoch']:04d}{within}.pth.tar"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("epoch*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when a write fails
        reason = one_line(error)
        log.error("could not write %s, going on with the older checkpoints: %s", path, reason)
        return None
    # What is newer is damaged, or of smaller batches: the run went on from before it.
    found = numbered(folder)
    left = [old for key, old in found if key > (content["epoch"], step or 0)]
    for kept, is_step in ((KEPT, False), (KEPT_STEPS, True)):
        same = [old for (_, at), old in found if bool(at) == is_step and old not in left]
        left += same[:-kept]
    for old in left:
        with contextlib.suppress(OSError):
            old.unlink()
    return path


def check_sums(path):
    """Finds what torch.load does not: numbers that have changed on the disk."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        damaged = error
    if damaged:
        raise InputError(f"--resume: {path} is damaged ({damaged})")


def newest_checkpoint(folder):
    """The content of the newest checkpoint that can be read, with its "path", or None."""
    for _, path in reversed(numbered(folder)):
        try:
            check_sums(path)
            content = read_checkpoint(path, "resume")
        except InputError as error:
            log.warning("skipped a damaged checkpoint: %s", error)
            continue
        if {"epoch", "optimizer", "scheduler"} <= content.keys():
            return {**content, "path": path}
        log.warning("skipped %s: it has no optimizer or scheduler to resume from", path)
    return None
