"""Helpers for errors, files, signals and logging. They need the standard library and tqdm only."""

import contextlib
import ctypes
import errno
import logging
import multiprocessing
import os
import re
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

if sys.platform != "linux":
    raise ImportError(
        "this code needs Linux (fork, prctl, POSIX signals); s3dg.py and loss.py alone do not"
    )

# On these a training writes a checkpoint and exits. Ctrl-C sends SIGINT.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

LIBC = ctypes.CDLL(None)  # loaded before any fork

OUTSIDE = re.compile(r"^/|(^|/)\.\.(/|$)|\0")  # matches paths that may leave their folder

log = logging.getLogger("milnce")
FilePath = str | os.PathLike


class InputError(Exception):
    """The user's input cannot be used. The message is one line: the problem, then the fix."""


class DataError(InputError):
    """A file or folder cannot be used. Libraries raise it; input_error adds the flag.

    reason: the problem and the fix ("is empty; fill it in"). line: of a text file, from 1.
    """

    def __init__(self, path: FilePath, reason: str, line: int | None = None):
        self.path, self.reason, self.line = path, reason, line
        place = printable(path) if line is None else f"{printable(path)}, line {line}"
        super().__init__(f"{place}: {one_line(reason)}")


@contextlib.contextmanager
def input_error(flag: str) -> Iterator[None]:
    """Convert a library's errors about the value of a flag to InputErrors that name the flag.

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


def one_line(text: Any) -> str:
    """Convert an error or a text to one line."""
    return " ".join(str(text).split())


def shorten(value: Any) -> str:
    """Quote a value for a message, on one line, and truncate it if it is long."""
    text = repr(str(value))
    return text if len(text) < 100 else f"{text[:96]}..."


def printable(name: FilePath) -> str:
    """Convert a file name, which may contain any bytes, to text for a message."""
    return one_line(os.fsencode(name).decode(errors="backslashreplace"))


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: "1 video", "2,000 videos"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def run_script(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Run the main() of a script.

    After an InputError, print its line and exit with status 2. After Ctrl-C, print the line
    `stopped` and exit with status 130.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)


def run_stoppable_script(main: Callable[[], None]) -> None:
    """Run a script that writes nothing before its end. Ctrl-C and SIGTERM exit with status 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as at Ctrl-C
    run_script(main, "stopped; nothing was written")


@contextlib.contextmanager
def hold_stop_signals() -> Iterator[None]:
    """Delay the handlers of STOP_SIGNALS until the end of the context, which forks a process.

    Python would drop the KeyboardInterrupt of a handler that runs during a fork. The child starts
    with these signals blocked.
    """
    arrived = []
    with contextlib.ExitStack() as stack:  # which restores all, even if a handler raises meanwhile
        stack.callback(lambda: [signal.raise_signal(number) for number in arrived])
        if threading.current_thread() is threading.main_thread():  # only it runs handlers
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda got, frame: arrived.append(got))
        # For the child. Other threads of this process, such as a library's, still receive them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
        yield


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this child process as soon as its parent ends, for whatever reason.

    parent: the parent's process id, if this process was not started by multiprocessing. The thread
    that started it must then outlive it: the kernel watches the thread, not the process.
    """
    set_parent_death_signal = 1
    LIBC.prctl(set_parent_death_signal, signal.SIGKILL)
    if parent is None and (process := multiprocessing.parent_process()):
        parent = process.pid
    if parent and os.getppid() != parent:
        os._exit(1)  # the parent has already ended


def setup_logging(verbose: bool, path: FilePath | None = None, level: int = logging.INFO) -> None:
    """Send the log to the terminal (verbose), and append it to a file."""
    log.setLevel(level)
    log.propagate = False
    handlers = [logging.StreamHandler(sys.stdout)] if verbose else []
    if path is not None:
        handlers.append(logging.FileHandler(path, delay=True))  # no file before its first line
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = handlers or [logging.NullHandler()]


def lines_above(bar: tqdm) -> contextlib.AbstractContextManager:
    """Return a context in which log lines on the terminal appear above a bar, not within it."""
    shows = any(getattr(to, "stream", None) in (sys.stdout, sys.stderr) for to in log.handlers)
    return logging_redirect_tqdm([log]) if shows and not bar.disable else contextlib.nullcontext()


@contextlib.contextmanager
def atomic_write(path: FilePath) -> Iterator[BinaryIO]:
    """Open a binary file that appears under its name only when it is complete and on the disk.

    A link is followed. Raises OSError if the file cannot be written, or is a device.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():  # a device would be replaced
        raise OSError(errno.EINVAL, "not a file", str(path))
    # A unique name: another run may be writing the same file.
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


def append(path: FilePath, text: str) -> bool:
    """Append whole lines to a file. If that fails, log an error and return False.

    A full disk must not end a training.
    """
    try:
        with open(path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # an earlier run was killed in the middle of a line
                    file.write(b"\n")
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        log.error("could not write %s: %s", path, error.strerror)
        return False
    return True


def sync_folder(folder: FilePath) -> None:
    """Sync a folder to the disk, so that a renamed file keeps its name after a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def escapes_root(name: str) -> bool:
    """Check whether a path joined to a folder could lead out of it: absolute, or with `..`.

    Links inside the folder are not checked.
    """
    return OUTSIDE.search(name) is not None


def find_files(root: FilePath, extensions: Collection[str]) -> Iterator[str]:
    """Yield the paths, relative to a folder, of the files below it with one of the extensions.

    extensions: in lower case, with the dot. Links are followed, except to a folder that contains
    them. Raises OSError if a folder cannot be read.
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
                # Unlike a Path, a DirEntry mostly knows its type without a system call.
                found = Path(entry.path) if entry.is_symlink() else entry
                if found.is_dir():
                    folders.append((name, above))
                elif os.path.splitext(name)[1].lower() in extensions and found.is_file():
                    yield name
