"""Write, prune and read the checkpoints of a training.

A checkpoint is {"epoch", "state_dict", "optimizer", "scheduler", "progress"}. The keys of its state
dict start with the `module.` of DistributedDataParallel, as the public release writes and expects
them. Files are read without running pickled code.
"""

import io
import itertools
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import s3dg
from utils import DataError, atomic_write, log, one_line

KEPT_EPOCHS = 10  # newest checkpoints of a run, one per epoch
KEPT_STEPS = 2  # newest checkpoints in the middle of an epoch
NAME = re.compile(r"epoch(\d{4,})(?:_step(\d{8,}))?\.pth\.tar")

# Files of PyTorch before 1.6, such as the release's checkpoints, are not zip archives.
OLD_FORMAT = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
# Messages of the RuntimeErrors that torch.load raises for invalid content.
CONTENT_FAULT = re.compile(r"PytorchStreamReader failed|record size|hasRecord|unexpected EOF")


class DamagedError(Exception):
    """A file's content is proven not to be a checkpoint. The message is the proof."""


@dataclass
class Progress:
    """The progress of a run, which its checkpoints contain as "progress"."""

    epoch: int = 0  # finished epochs
    step: int = 0
    bad_samples: int = 0  # replaced by another sample
    bad_in_epoch: int = 0
    skipped_steps: int = 0  # because the loss or the gradient was not finite
    skipped_in_row: int = 0

    def content(self, batch_size: int, num_videos: int) -> dict:
        """Return the "progress" of a checkpoint. batch_size: clips per step, over all ranks."""
        return {**asdict(self), "clips": self.step * batch_size, "videos": num_videos}

    @classmethod
    def resume(cls, checkpoint: dict, batch_size: int, num_videos: int) -> "Progress":
        """Return the progress at which to resume from a checkpoint.

        With another batch size that is the step at the same video. A checkpoint of another video
        list, or of the public release, is resumed at the start of its epoch.
        """
        epoch = checkpoint["epoch"]
        step = steps_before(epoch, num_videos, batch_size)
        saved = dict(checkpoint.get("progress", {}))
        if saved.pop("videos", None) != num_videos:
            return cls(epoch, step)
        saved["step"] = max(step, saved.pop("clips") // batch_size)
        return cls(**saved)


def steps_before(epoch: int, num_videos: int, batch_size: int) -> int:
    """Return the number of steps before an epoch.

    Batches continue across epochs, so that each epoch visits every video once.
    """
    return epoch * num_videos // batch_size


Key = tuple[int, int]  # (finished epochs, step in the middle of an epoch or 0); sorts by age


def list_checkpoints(folder: Path) -> list[tuple[Key, Path]]:
    """List the run's checkpoints, oldest first.

    Raises DataError if the folder exists but cannot be listed. (Path.glob would return nothing,
    and the run would start from scratch.)
    """
    folder = Path(folder)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        reason = f"cannot be listed ({error.strerror}); fix that, or give another folder"
        raise DataError(folder, reason) from None
    found = ((NAME.fullmatch(name), folder / name) for name in names)
    return sorted((parse_key(match), path) for match, path in found if match)


def parse_key(match: re.Match) -> Key:
    """Return the key of a file name, given its match of NAME."""
    return int(match[1]), int(match[2] or 0)


def format_name(epoch: int, step: int | None = None) -> str:
    """Format the file name of a checkpoint; `step` is given in the middle of an epoch."""
    within = "" if step is None else f"_step{step:08d}"
    return f"epoch{epoch:04d}{within}.pth.tar"


def save_checkpoint(
    folder: Path, content: dict, step: int | None = None, resumed: tuple[Path, int] | None = None
) -> Path | None:
    """Write epochNNNN.pth.tar, or epochNNNN_stepNNNNNNNN.pth.tar in the middle of an epoch.

    The write is atomic. Old checkpoints are removed after it, see prune. resumed: the path of the
    checkpoint that the run resumed from, and the step at which it did. Returns the path. If the
    write fails, logs the error and returns None; the older checkpoints remain.
    """
    folder = Path(folder)
    path = folder / format_name(content["epoch"], step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("epoch*.tmp"):  # of a run that was killed
            partial.unlink(missing_ok=True)
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when a write fails
        log.error("could not write %s, the older checkpoints remain: %s", path, one_line(error))
        return None
    try:
        if resumed and step is not None:
            renumber(folder, (content["epoch"], step), *resumed)
        prune(folder, (content["epoch"], step or 0))
    except (OSError, DataError) as error:
        log.warning("could not remove old checkpoints: %s", one_line(error))
    return path


def renumber(folder: Path, saved: Key, resumed: Path, first_step: int) -> None:
    """Restore the order of an epoch's files after a resume with larger batches.

    Steps of larger batches have lower numbers, so the file that the run resumed from would look
    newer than the one just saved, `saved`. It is renamed to the step at which the run resumed. The
    files before it in the same epoch, whose numbers are also too high, are removed: two newer ones
    exist. Files newer than the resumed one are not of this run and stay.
    """
    last = parse_key(NAME.fullmatch(resumed.name))
    found = list_checkpoints(folder)
    stale = [path for key, path in found if key[0] == saved[0] and saved < key <= last]
    if resumed in stale:
        os.replace(resumed, folder / format_name(saved[0], first_step))
        stale.remove(resumed)
    for path in stale:
        path.unlink(missing_ok=True)


def prune(folder: Path, saved: Key) -> None:
    """Remove all but the newest checkpoints of each kind up to `saved`, never one after it.

    Damaged files have been renamed by then, so a newer file is intact as far as this run knows.
    """
    found = [(key, path) for key, path in list_checkpoints(folder) if key <= saved]
    for kept, is_step in ((KEPT_EPOCHS, False), (KEPT_STEPS, True)):
        same = [path for (_, step), path in found if bool(step) == is_step]
        for path in same[:-kept]:
            path.unlink(missing_ok=True)


def verify_checksums(data: bytes) -> None:
    """Raise DamagedError if a record has changed on the disk, which torch.load does not notice."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wrong = archive.testzip()
    except (OSError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many types on damaged headers
        raise DamagedError(f"{type(error).__name__}: {one_line(error)}") from None
    if wrong:
        raise DamagedError(f"the checksum of {wrong} is wrong")


def load(path: Path) -> dict:
    """Load a checkpoint's content. Raises DamagedError if it is proven damaged.

    The file is read into memory first. So the content that is loaded is the one that was checked,
    and no I/O error can occur inside zipfile or torch.load, which would report it as invalid
    content. Other exceptions (OSError, MemoryError, torch's RuntimeError for lack of memory) prove
    nothing.
    """
    with open(path, "rb") as file:
        data = file.read()
    if OLD_FORMAT not in data[:32]:  # the old format has no checksums
        verify_checksums(data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        if "Unsupported" in str(error):  # a type that is not plain data: strange, but not damaged
            raise
        raise DamagedError(f"torch.load rejects its pickle, {type(error).__name__}") from None
    except RuntimeError as error:
        text = one_line(error)
        if CONTENT_FAULT.search(text) and "alloc" not in text:
            raise DamagedError(text.split(". ")[0]) from None
        raise
    try:
        return s3dg.parse_weights(content, path.name)
    except ValueError as error:
        raise DamagedError(str(error)) from None


def newest_checkpoint(folder: Path, damaged: dict[Path, str] | None = None) -> dict | None:
    """Return the content of the newest checkpoint that is not damaged, with its "path", or None.

    Changes nothing on the disk. Files with damaged content are skipped and added to `damaged`, as
    {path: proof}, for set_aside. Raises DataError if a file cannot be read for any other reason:
    it may be intact, and training from an older one would overwrite it.
    """
    damaged = {} if damaged is None else damaged
    skipped, gone = set(), None
    paths = [path for _, path in list_checkpoints(folder)]
    while paths:
        path = paths.pop()
        if path in skipped:
            continue
        try:
            content = load(path)
        except DamagedError as proof:
            damaged[path] = str(proof)
            skipped.add(path)
        except Exception as error:
            if isinstance(error, FileNotFoundError) and path != gone:
                # Renamed or removed since it was listed. Another process may have made newer ones.
                gone = path
                paths = [path for _, path in list_checkpoints(folder)]
                continue
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            raise DataError(
                path,
                f"cannot be read ({one_line(reason).rstrip(': ')}) but may be intact; fix the "
                "cause and start again, or move the file to another folder to resume from an older "
                "one",
            ) from None
        else:
            if {"epoch", "optimizer", "scheduler"} <= content.keys():
                return {**content, "path": path}
            skipped.add(path)
            log.warning(
                "skipped %s: it has no optimizer or scheduler to resume from; move it to another "
                "folder to keep it, as later checkpoints replace it",
                path,
            )
    return None


def set_aside(damaged: dict[Path, str]) -> None:
    """Rename the damaged files that newest_checkpoint found to *.damaged, and log the proof.

    Call it in one process, once all have agreed on the checkpoint to resume from. No existing file
    is replaced. Raises DataError if a file cannot be renamed: a new checkpoint would overwrite it.
    """
    for path, proof in damaged.items():
        try:
            taken = set(os.listdir(path.parent))
            target = path.with_name(f"{path.name}.damaged")
            for number in itertools.count(2):
                if target.name not in taken:
                    break
                target = path.with_name(f"{path.name}.{number}.damaged")
            path.rename(target)
        except FileNotFoundError:  # another process has renamed it
            log.warning("skipped a damaged checkpoint, which is gone now: %s (%s)", path, proof)
        except OSError as error:
            raise DataError(
                path,
                f"is damaged ({proof}) and cannot be renamed ({error.strerror}); move it to "
                "another folder and start again",
            ) from None
        else:
            log.warning(
                "skipped a damaged checkpoint: %s (%s), renamed to %s", path, proof, target.name
            )
