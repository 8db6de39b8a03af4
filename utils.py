"""Small things the scripts share: user errors, tables, the schedule, logging, the device."""

import contextlib
import csv
import ctypes
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pandas as pd
import torch

import s3dg

LARGEST_NUMBER = 1e7  # of a table: seconds, in practice; the decoder takes no time far beyond
OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|\0")  # what a path must not have to stay in its folder

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}  # of --amp

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a training answers them with a checkpoint

log = logging.getLogger("milnce")


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, and what to do."""


def one_line(text):
    """An error, or another text, as a message can have it: without line ends."""
    return " ".join(str(text).split())


def run_script(main):
    """Runs an entry script's main(). An InputError becomes one line and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def die_with_parent():
    """Has the kernel kill this child process as soon as its parent is gone, however it went."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:
        os._exit(1)  # it went before


def check_file(path, flag):
    """Refuses a path that is not a readable file; `flag` is the flag it came from."""
    if not path:
        raise InputError(f"--{flag} is needed: give the path of a file")
    if not os.path.isfile(path):
        raise InputError(f"--{flag}: there is no file {path}: give an existing one")
    if not os.access(path, os.R_OK):
        raise InputError(f"--{flag}: {path} cannot be read: change its permissions")


def check_folder(path, flag):
    """Refuses a path that is not a folder; an empty one means that the flag was forgotten."""
    if not path:
        raise InputError(f"--{flag} is needed: give the path of a folder")
    if not os.path.isdir(path):
        raise InputError(f"--{flag}: there is no folder {path}: give an existing one")


def read_table(path, columns, numbers=(), names=(), flag="eval_csv"):
    """Reads a CSV file's columns. All are strings but `numbers`, which are 0 or above; an empty
    cell is a missing text. `names` are columns of paths, see check_names.

    Words such as "null" or "NA" stay words. Raises InputError naming the file and the fault.
    """
    check_file(path, flag)
    needed = f"give one with {', '.join(columns)}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except ValueError as error:  # pandas' parser errors and undecodable bytes are ValueErrors
        reason = one_line(error)
        raise InputError(f"--{flag}: {path} is not a CSV table ({reason}): {needed}") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first cells for row names
        reason = "its rows have more cells than its first line"
        raise InputError(f"--{flag}: {path} is not a CSV table ({reason}): {needed}")
    missing = [column for column in columns if column not in table.columns]
    if missing:
        have = shorten(", ".join(map(str, table.columns)))
        raise InputError(
            f"--{flag}: {path} has no column {', '.join(missing)} (it has {have}): add it"
        )
    for column in numbers:
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = table.index[~values.between(0, LARGEST_NUMBER)]
        if len(wrong):
            fault = f"is not a number from 0 to {LARGEST_NUMBER:.0e}: mend it"
            raise cell_error(path, flag, wrong[0], column, table[column][wrong[0]], fault)
        table[column] = values
    check_names(table, names, path, flag)
    return table


def leads_outside(name):
    """Whether a path, joined to a folder, could lead out of it: an absolute one, or one with `..`.

    What the folder itself holds, links included, is its owner's business.
    """
    return OUTSIDE.search(name) is not None


def check_names(table, columns, path, flag):
    """Refuses paths in a table, of videos or parts of such paths, that lead out of their folder."""
    for column in columns:
        for row, name in enumerate(table[column]):
            if isinstance(name, str) and leads_outside(name):
                fault = "leads out of the data's folder: give a path in it, without .."
                raise cell_error(path, flag, row, column, name, fault)


def shorten(value):
    """A value of a file as a message can have it: quoted, on one line, and not too long."""
    text = repr(str(value))
    return text if len(text) < 100 else f"{text[:96]}..."


def cell_error(path, flag, row, column, value, fault):
    """The InputError for a cell of a CSV table, by the line on which its row starts."""
    cell = shorten(value) if isinstance(value, str) else "an empty cell"
    return InputError(
        f"--{flag}: {path}, line {line_of_row(path, row)}, column {column}: {cell} {fault}"
    )


def line_of_row(path, row):
    """The line, from 1, on which a row of read_table starts: quoted cells may have line ends."""
    with open(path, newline="", encoding="utf-8-sig") as file, contextlib.suppress(csv.Error):
        reader = csv.reader(file)
        rows = -1  # the first record is the header
        before = 0  # lines
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():  # pandas passes over blank lines
                if rows == row:
                    return before + 1
                rows += 1
            before = reader.line_num
    return row + 2  # a cell that the csv module takes for too large


def read_words(args):
    """The word list of --token_to_word_path."""
    check_file(args.token_to_word_path, "token_to_word_path")
    try:
        return s3dg.load_words(args.token_to_word_path)
    except ValueError as error:
        raise InputError(f"--token_to_word_path: {error}: give a .npy word list") from None


def check_words_fit(words, rows, path, flag="token_to_word_path"):
    """Every word has a row in the embedding, and row 0 is the padding's."""
    if len(words) + 1 != rows:
        raise InputError(
            f"--{flag}: {path} has {len(words)} words, but the word embedding has "
            f"{rows} rows (one a word and one for padding): give the list made with these vectors"
        )


def check_clip_size(args, model):
    """The space_to_depth stem takes even numbers only."""
    for flag, value in (("num_frames", args.num_frames), ("video_size", args.video_size)):
        if model.space_to_depth and value % 2:
            raise InputError(f"--{flag} {value}: this model's stem needs an even number")


def inference_amp(args):
    """The --amp of evaluations: none by default, as figures are not to depend on the machine."""
    return "none" if args.amp == "auto" else args.amp


def check_compiler():
    """torch.compile writes C++, on a GPU as well."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise InputError("--compile needs a C++ compiler, g++ or $CXX: install one or drop it")


def lr_multiplier(step, warmup_steps, total_steps):
    """The learning rate's share of its peak: linear from 0, then half a cosine to 0 (steps)."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def pick_device(args, local_rank=0):
    """The torch.device of --device and --gpu for the process of this rank on its node."""
    if args.device == "cpu":
        if args.gpu is not None:
            raise InputError("--gpu and --device cpu exclude each other: drop one")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if args.device == "cuda" or args.gpu is not None:
            raise InputError("--device: no CUDA GPU is available here: use --device cpu")
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant where it is asked for
    index = local_rank if args.gpu is None else args.gpu
    if not 0 <= index < torch.cuda.device_count():
        raise InputError(f"--gpu: there is no GPU {index}, only {torch.cuda.device_count()} here")
    return torch.device("cuda", index)


def to_unit_range(video):
    """uint8 clips [.., 3, T, H, W] -> float32 in [0, 1], on the device: bytes travel there."""
    return video.to(torch.float32, copy=True).div_(255)


def setup_logging(verbose, path=None, level=logging.INFO):
    """Sends the log to the terminal (verbose) and to a file that is added to."""
    log.setLevel(level)
    log.propagate = False
    handlers = [logging.StreamHandler(sys.stdout)] if verbose else []
    if path is not None:
        handlers.append(logging.FileHandler(path))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = handlers or [logging.NullHandler()]


def check_output(path, flag="output"):
    """Refuses, before the work, a file that could not be written after it."""
    folder = Path(path).resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)) or Path(path).is_dir():
        raise InputError(f"--{flag}: {path} cannot be written: give a file in an existing folder")


def make_folder(path, flag):
    """Makes a folder that is to be written to. Raises InputError where that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{flag}: cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"--{flag}: the folder {path} cannot be written to")


@contextlib.contextmanager
def write_whole(path):
    """Opens a file for bytes. It has its name only once it is whole and on the disk."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_absent(path, flag):
    """Refuses to write over something that is there."""
    if os.path.lexists(path):
        raise InputError(f"--{flag}: {path} is there already: remove it or give another")


def sync_folder(folder):
    """Has the disk know of a renamed file, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find_files(root, extensions):
    """Yields the paths, relative to a folder, of the files below it with one of the extensions.

    extensions: in lower case, with the dot. Links are followed, but not into a folder that they are
    in. Raises OSError where a folder cannot be read.
    """
    folders = [("", ())]
    while folders:
        folder, above = folders.pop()
        path = os.path.join(root, folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in above:
            continue
        above = (*above, (status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                name = os.path.join(folder, entry.name)
                # An entry mostly knows its kind without asking the disk.
                found = Path(entry.path) if entry.is_symlink() else entry
                if found.is_dir():
                    folders.append((name, above))
                elif os.path.splitext(name)[1].lower() in extensions and found.is_file():
                    yield name


def report(title, figures, output=""):
    """Prints an evaluation's figures, and writes them to a JSON file where --output names one."""
    shown = (f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in figures.items())
    print(f"{title}: {'  '.join(shown)}")
    if output:
        Path(output).write_text(json.dumps(figures, indent=2) + "\n")
