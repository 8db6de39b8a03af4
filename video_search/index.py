"""The index of a search: a plain file of the moments of videos, and how they are found in it.

It is written with torch.save and read, as data only, with torch.load, which maps it into memory:

    format, version    what it is
    folder             where the videos are, absolute
    settings           by flag, what the embeddings were made with (feature_file.feature_settings)
    weights, words     the files that a query's words are embedded with, absolute
    paths              each video's path below the folder, in order
    sizes, mtimes      int64 [V], its file's bytes and time of change (nanoseconds) when it was read
    reasons            why it could not be used, or ''
    windows            int64 [V], how many it has
    starts             float64 [N], where each window starts, seconds
    embeddings         float32 [N, D], video by video
"""

import bisect
import itertools
import mmap
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from annotations.tables import escapes_root
from utils import InputError, atomic_write, check_file, format_flag, one_line
from video_decoder import EXTENSIONS

FORMAT = "MIL-NCE search index"
VERSION = 1


class Video(NamedTuple):
    """A video and its W windows."""

    path: str  # below the folder
    size: int
    mtime_ns: int
    reason: str  # why it has no windows, or ''
    starts: torch.Tensor  # float64 [W], seconds, ascending
    embeddings: torch.Tensor  # float32 [W, D]


class IndexMetadata(NamedTuple):
    """What the videos of an index have in common."""

    folder: str
    settings: dict
    weights: str
    words: str


class Index(NamedTuple):
    """What read_index gives; starts and embeddings are those of all videos, one after the other."""

    about: IndexMetadata
    videos: list[Video]
    first: list[int]  # the row of each video's first window
    starts: torch.Tensor  # float64 [N]
    embeddings: torch.Tensor  # float32 [N, D]


class Moment(NamedTuple):
    """A window that was found: its row and its video's number in the index, seconds, its score."""

    row: int
    video: int
    start: float
    end: float
    score: float


# --- the file -----------------------------------------------------------------------------------


def write_index(path, about, videos):
    """Writes an index, whole or not at all. Raises InputError where the disk does not take it."""
    folder = Path(path).resolve().parent
    videos = sorted(videos, key=lambda video: video.path)
    used = [video for video in videos if len(video.starts)]
    try:
        content = {
            "format": FORMAT,
            "version": VERSION,
            **about._asdict(),
            "paths": [video.path for video in videos],
            "sizes": torch.tensor([video.size for video in videos], dtype=torch.int64),
            "mtimes": torch.tensor([video.mtime_ns for video in videos], dtype=torch.int64),
            "reasons": [video.reason for video in videos],
            "windows": torch.tensor([len(video.starts) for video in videos], dtype=torch.int64),
            "starts": torch.cat([torch.zeros(0).double(), *(video.starts for video in used)]),
            "embeddings": stacked([video.embeddings for video in used], folder),
        }
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when a write fails
        raise InputError(
            f"--out: could not write {path} ({one_line(error)}): make room, and start again"
        ) from None


def stacked(blocks, folder):
    """The rows of all blocks, float32 [n, D] each, in one tensor.

    It lies in a file without a name in that folder rather than in memory, which it may not fit in.
    """
    if not blocks:
        return torch.zeros(0, 0)
    shape = sum(map(len, blocks)), blocks[0].shape[1]
    size = shape[0] * shape[1] * torch.float32.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill this process
        rows = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32).view(shape)
    return torch.cat(blocks, out=rows)


def read_index(path, flag="INDEX"):
    """Maps an index into memory. Raises InputError where the file is none, or damaged."""
    check_file(path, flag)
    mend = "give another, or delete it and index the videos again"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind, version = content["format"], content["version"]
    except Exception:  # torch.load has many ways to say that a file is not one of its own
        kind = version = None
    if kind != FORMAT:
        raise InputError(f"{format_flag(flag)}: {path} is no search index, or damaged: {mend}")
    if version != VERSION:
        raise InputError(
            f"{format_flag(flag)}: {path} is a search index of version {version}, "
            f"not {VERSION}: {mend}"
        )
    try:
        return checked(content)
    except Exception as error:  # whatever may be in it, or lacking
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{format_flag(flag)}: {path} is damaged ({reason}): {mend}") from None


def checked(content):
    """The Index of a file's content. Raises an exception of some kind where it is not one."""
    about = IndexMetadata(*(content[name] for name in IndexMetadata._fields))
    paths, reasons, windows = content["paths"], content["reasons"], content["windows"].tolist()
    starts, embeddings = content["starts"], content["embeddings"]
    if starts.dtype != torch.float64 or embeddings.dtype != torch.float32:
        raise ValueError("numbers of another type")
    if starts.shape != (sum(windows),) or embeddings.shape[:-1] != starts.shape:
        raise ValueError("the windows do not add up")
    texts = (about.folder, about.weights, about.words, *reasons)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no texts where there should be")
    for name in paths:
        if escapes_root(name) or os.path.splitext(name)[1].lower() not in EXTENSIONS:
            raise ValueError(f"{name!r} is not a video in the folder")
    window_length(about)
    parts = starts.split(windows), embeddings.split(windows)
    sizes, mtimes = content["sizes"].tolist(), content["mtimes"].tolist()
    videos = list(map(Video._make, zip(paths, sizes, mtimes, reasons, *parts, strict=True)))
    first = list(itertools.accumulate(windows, initial=0))[:-1]
    return Index(about, videos, first, starts, embeddings)


# --- the search ---------------------------------------------------------------------------------


def window_length(about):
    """Seconds from a window's start to its end."""
    return about.settings["num_frames"] / about.settings["fps"]


def moment(index, row, score=0.0):
    """The Moment of a row of the index."""
    start = index.starts[row].item()
    video = bisect.bisect_right(index.first, row) - 1
    return Moment(row, video, start, start + window_length(index.about), score)


def best_moments(index, query, count):
    """The Moments of at most `count` windows that score highest, the best first.

    query: float32 [D]. A score is the dot product, as in the evaluations. Of windows of one video
    that overlap there is the best only; of equal scores the first comes first. A window whose score
    is no finite number is never found.
    """
    if not len(index.starts):
        return []
    scores = torch.mv(index.embeddings, query).numpy()
    scores[~np.isfinite(scores)] = -np.inf
    length = window_length(index.about) - 1e-6  # starts are exact to the microsecond
    found = []
    while len(found) < count:
        row = int(scores.argmax())
        if scores[row] == -np.inf:
            break
        best = moment(index, row, scores[row].item())
        found.append(best)
        begin = index.first[best.video]
        starts = index.videos[best.video].starts.numpy()
        overlapping = np.searchsorted(starts, (best.start - length, best.start + length))
        scores[begin + overlapping[0] : begin + overlapping[1]] = -np.inf
        scores[row] = -np.inf  # whatever its start is: there is an end to this
    return found


def format_timestamp(seconds):
    """Whole seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
