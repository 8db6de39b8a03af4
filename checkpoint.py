"""Checkpoints: {"epoch", "state_dict", "optimizer", "scheduler"}, or a bare state dict to read.

Keys may carry the `module.` of DistributedDataParallel; ours do, as the public release writes and
expects them. Files are data: nothing pickled is run.
"""

import contextlib
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import nn

from s3dg import S3D, WORD_DIM
from utils import InputError, check_file, log, one_line, sync_folder

KEPT = 10  # newest checkpoints of a run, one an epoch
KEPT_STEPS = 2  # and newest ones in the middle of an epoch: to resume from
NAME = re.compile(r"epoch(\d{4,})(?:_step(\d{8,}))?\.pth\.tar")


def read_checkpoint(path, flag="pretrain_cnn_path"):
    """Reads a checkpoint or the released weights: a dict whose "state_dict" has no `module.`.

    Raises InputError where the file is not one.
    """
    check_file(path, flag)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has many ways to say that a file is not one of its own
        raise InputError(
            f"--{flag}: {path} is damaged, not a checkpoint or holds more than data "
            f"({type(error).__name__}): give a checkpoint or weights"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            f"--{flag}: {path} holds a {type(content).__name__}: give a checkpoint or weights"
        )
    state = content.get("state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(
            f"--{flag}: {path} holds no state dict (its keys are {first(content)}): give a "
            "checkpoint or weights"
        )
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    return {**(content if "state_dict" in content else {}), "state_dict": state}


def first(names, most=3):
    """The first few of some names, for a message."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def load_weights(model, state, path, flag="pretrain_cnn_path"):
    """Fills the model; an InputError names the first keys and shapes that differ."""
    own = model.state_dict()
    faults = []
    if lacking := [name for name in own if name not in state]:
        faults.append(f"it lacks {first(lacking)}")
    if unknown := [name for name in state if name not in own]:
        faults.append(f"it has unknown {first(unknown)}")
    shapes = [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if shapes:
        faults.append(first(shapes))
    if faults:
        raise InputError(f"--{flag}: {path} does not fit the S3D model: {'; '.join(faults)}")
    model.load_state_dict(state)


def model_of(state, path, token_to_word_path="data/dict.npy", flag="pretrain_cnn_path"):
    """Builds the S3D that a state dict was made from, on the CPU, in training mode.

    Stem, gating, embedding size and vocabulary are read off the weights' shapes; `path` and `flag`
    name the file in messages.
    """

    def shape(name, dims):
        if name not in state or state[name].ndim != dims:
            raise InputError(f"--{flag}: {path} is not of an S3D model: it lacks a proper {name}")
        return state[name].shape

    model = S3D(
        num_classes=shape("fc.weight", 2)[0],
        gating="gating.fc.weight" in state,
        space_to_depth=shape("conv1.conv1.weight", 5)[1] == 24,
        token_to_word_path=token_to_word_path,
    )
    rows = shape("text_module.word_embd.weight", 2)[0]
    if rows != model.text_module.word_embd.num_embeddings:
        model.text_module.word_embd = nn.Embedding.from_pretrained(torch.zeros(rows, WORD_DIM))
    load_weights(model, state, path, flag)
    return model


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
    partial = path.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("epoch*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when a write fails
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
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
