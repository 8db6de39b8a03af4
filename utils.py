"""Small things that the modules share: errors, files, logging. Standard library and tqdm only."""

import contextlib
import ctypes
import errno
import json
import logging
import multiprocessing
import os
import secrets
import signal
import sys
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a training answers them with a checkpoint

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # not loaded after a fork

log = logging.getLogger("milnce")


class InputError(Exception):
    """The user's input cannot be used. The message is one line: the problem, then the fix."""


class DataError(InputError):
    """A file or folder cannot be used. Libraries raise it; input_error adds the flag.

    reason: the problem and the fix ("is empty; fill it in"). line: of a text file, from 1.
    """

    def __init__(self, path: str | os.PathLike, reason: str, line: int | None = None):
        self.path, self.reason, self.line = path, reason, line
        place = printable(path) if line is None else f"{printable(path)}, line {line}"
        super().__init__(f"{place}: {one_line(reason)}")


@contextlib.contextmanager
def input_error(flag: str):
    """Report what a library raises about the value of this flag as an InputError that names it.

    flag: as the user spells it, such as "--eval_csv". Catches DataError, ValueError and OSError.
    """
    try:
        yield
    except DataError as error:
        raise InputError(f"{flag}: {error}") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        place = f"{printable(error.filename)}: " if error.filename is not None else ""
        raise InputError(f"{flag}: {place}{reason}") from None
    except ValueError as error:
        raise InputError(f"{flag}: {one_line(error)}") from None


def one_line(text):
    """An error, or another text, as a message can have it: without line ends."""
    return " ".join(str(text).split())


def shorten(value):
    """A value of a file as a message can have it: quoted, on one line, and not too long."""
    text = repr(str(value))
    return text if len(text) < 100 else f"{text[:96]}..."


def printable(name):
    """A file's name, whatever bytes it has, in a message."""
    return one_line(os.fsencode(name).decode(errors="backslashreplace"))


def run_script(main):
    """Runs an entry script's main(). An InputError becomes one line and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_stoppable_script(main):
    """run_script for one that leaves nothing half done behind where it is stopped by a signal."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as at Ctrl-C
    try:
        run_script(main)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        sys.exit(130)


def die_with_parent(parent=None):
    """Have the kernel kill this child process as soon as its parent is gone, however it went.

    parent: the parent's process id, if this process was not started by multiprocessing. It then
    has to be the thread that lives on until the child has ended: the kernel goes by threads.
    """
    if LIBC:
        set_parent_death_signal = 1
        LIBC.prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is None and (process := multiprocessing.parent_process()):
        parent = process.pid
    if parent and os.getppid() != parent:
        os._exit(1)  # it went before


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


def lines_above(bar):
    """A context in which log lines on the terminal come above a bar there, and not into it."""
    shows = any(getattr(to, "stream", None) in (sys.stdout, sys.stderr) for to in log.handlers)
    return logging_redirect_tqdm([log]) if shows and not bar.disable else contextlib.nullcontext()


@contextlib.contextmanager
def atomic_write(path):
    """Opens a file for bytes. It has its name only once it is whole and on the disk.

    A link is followed. Raises OSError where it cannot be written, or is a device.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():  # it would be replaced by a file
        raise OSError(errno.EINVAL, "not a file", str(path))
    # A name of its own: another run may be writing the same file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
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


def append(path, text):
    """Adds whole lines to a file. A log that cannot be written, on a full disk, is no reason to end
    a training: False.
    """
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, of a run that was killed
                    file.write(b"\n")
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        log.error("could not write %s: %s", path, error.strerror)
        return False
    return True


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


def format_metric(value):
    """A figure as people read it."""
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def print_metrics(title, figures, output=""):
    """Prints an evaluation's figures, and writes them to a JSON file where --output names one."""
    shown = (f"{name} {format_metric(value)}" for name, value in figures.items())
    print(f"{title}: {'  '.join(shown)}")
    if output:
        Path(output).write_text(json.dumps(figures, indent=2) + "\n")
