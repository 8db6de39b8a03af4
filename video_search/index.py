"""Read, write and search the index: a file with the embeddings of the windows of videos.

The file is written with torch.save and memory-mapped, as data only, with torch.load:

    format, version    FORMAT and VERSION
    folder             where the videos are, absolute
    settings           that the embeddings depend on, see feature_file.feature_settings
    weights, words     the files that embed a query's words, absolute
    paths              each video's path below the folder, in order
    sizes, mtimes      int64 [V], its file's bytes and modification time (ns) when it was read
    reasons            why it could not be used, or ''
    windows            int64 [V], how many it has
    starts             float64 [N], where each window starts, seconds
    ends               float64 [N], where it or its video ends; absent before 2026-11
    embeddings         float32 [N, D], video by video
"""

import bisect
import itertools
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import DataError, atomic_write, escapes_root, one_line, plural, printable
from video_decoder import EXTENSIONS

FORMAT = "MIL-NCE search index"
VERSION = 1

AnyPath = str | os.PathLike


class EmbeddedText(NamedTuple):
    """A text to search for, embedded, and notes on it for its author."""

    vector: torch.Tensor  # float32 [D]
    notes: list[str]


Embed = Callable[[str], EmbeddedText]  # raises InputError for a text that cannot be searched for


class Video(NamedTuple):
    """A video and its W windows."""

    path: str  # below the folder
    size: int  # bytes
    mtime_ns: int
    reason: str  # why it has no windows, or ''
    starts: torch.Tensor  # float64 [W], seconds, ascending
    embeddings: torch.Tensor  # float32 [W, D]
    ends: torch.Tensor | None = None  # float64 [W], seconds; None in files written before 2026-11

    @property
    def is_outdated(self) -> bool:
        """Whether black frames may fill its only window, as they did before `ends` was known."""
        return self.ends is None and len(self.starts) == 1


class IndexMetadata(NamedTuple):
    """The data that all videos of an index share. The names are keys of the file."""

    folder: str
    settings: dict
    weights: str
    words: str

    @property
    def window_seconds(self) -> float:
        """The duration of a window."""
        return self.settings["num_frames"] / self.settings["fps"]


class Index(NamedTuple):
    """An index in memory; starts and embeddings are those of all videos, concatenated."""

    metadata: IndexMetadata
    videos: list[Video]
    first: list[int]  # the row of each video's first window
    starts: torch.Tensor  # float64 [N]
    ends: torch.Tensor  # float64 [N]
    embeddings: torch.Tensor  # float32 [N, D]


class Moment(NamedTuple):
    """A window, with its score for a query."""

    row: int  # of the index
    video: int  # its number in the index
    start: float  # seconds
    end: float
    score: float


# --- the file -----------------------------------------------------------------------------------


def write_index(path: AnyPath, metadata: IndexMetadata, videos: Iterable[Video]) -> None:
    """Write an index atomically. Raises DataError if that fails, as on a full disk."""
    folder = Path(path).resolve().parent
    videos = sorted(videos, key=lambda video: video.path)
    used = [video for video in videos if len(video.starts)]
    ends = [v.starts + metadata.window_seconds if v.ends is None else v.ends for v in used]
    try:
        content = {
            "format": FORMAT,
            "version": VERSION,
            **metadata._asdict(),
            "paths": [video.path for video in videos],
            "sizes": torch.tensor([video.size for video in videos], dtype=torch.int64),
            "mtimes": torch.tensor([video.mtime_ns for video in videos], dtype=torch.int64),
            "reasons": [video.reason for video in videos],
            "windows": torch.tensor([len(video.starts) for video in videos], dtype=torch.int64),
            "starts": torch.cat([torch.zeros(0).double(), *(video.starts for video in used)]),
            "ends": torch.cat([torch.zeros(0).double(), *ends]),
            "embeddings": concatenate_on_disk([video.embeddings for video in used], folder),
        }
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if a write fails
        reason = f"could not be written ({one_line(error)}); make room and run the command again"
        raise DataError(path, reason) from None


def concatenate_on_disk(blocks: list[torch.Tensor], folder: Path) -> torch.Tensor:
    """Concatenate the rows of all blocks, float32 [n, D] each.

    The tensor is in an unnamed file in that folder, as it may not fit into memory.
    """
    if not blocks:
        return torch.zeros(0, 0)
    shape = sum(map(len, blocks)), blocks[0].shape[1]
    size = shape[0] * shape[1] * torch.float32.itemsize
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill this process
        rows = torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float32).view(shape)
    return torch.cat(blocks, out=rows)


def read_index(path: AnyPath) -> Index:
    """Memory-map an index. Raises OSError, or DataError if it is not an index or is damaged."""
    fix = "give another, or delete it and index the videos again"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        kind, version = content["format"], content["version"]
    except OSError:
        raise
    except Exception:  # torch.load raises many exception types on invalid files
        kind = version = None
    if kind != FORMAT:
        raise DataError(path, f"is not a search index, or damaged; {fix}")
    if version != VERSION:
        raise DataError(path, f"is a search index of version {version}, not {VERSION}; {fix}")
    try:
        return parse_index(content)
    except Exception as error:  # whatever it contains or lacks
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(path, f"is damaged ({reason}); {fix}") from None


def parse_index(content: dict) -> Index:
    """Validate the content of a file. Raises an exception of any type if it is not an index."""
    metadata = IndexMetadata(*(content[name] for name in IndexMetadata._fields))
    paths, reasons, windows = content["paths"], content["reasons"], content["windows"].tolist()
    starts, embeddings = content["starts"], content["embeddings"]
    known = "ends" in content
    ends = starts + metadata.window_seconds
    ends = content["ends"] if known else ends
    if not starts.dtype == ends.dtype == torch.float64 or embeddings.dtype != torch.float32:
        raise ValueError("the numbers have another type")
    if not starts.shape == ends.shape == (sum(windows),) or embeddings.shape[:-1] != starts.shape:
        raise ValueError("the windows do not add up")
    texts = (metadata.folder, metadata.weights, metadata.words, *reasons)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is not a string")
    for name in paths:
        if escapes_root(name) or os.path.splitext(name)[1].lower() not in EXTENSIONS:
            raise ValueError(f"{name!r} is not a video in the folder")
    parts = (
        starts.split(windows),
        embeddings.split(windows),
        ends.split(windows) if known else [None] * len(windows),
    )
    sizes, mtimes = content["sizes"].tolist(), content["mtimes"].tolist()
    videos = list(map(Video._make, zip(paths, sizes, mtimes, reasons, *parts, strict=True)))
    first = list(itertools.accumulate(windows, initial=0))[:-1]
    return Index(metadata, videos, first, starts, ends, embeddings)


# --- the search ---------------------------------------------------------------------------------


def get_moment(index: Index, row: int, score: float = 0.0) -> Moment:
    """Return the Moment of a row of the index."""
    start = index.starts[row].item()
    video = bisect.bisect_right(index.first, row) - 1
    return Moment(row, video, start, index.ends[row].item(), score)


def best_moments(index: Index, query: torch.Tensor, count: int) -> list[Moment]:
    """Return at most `count` windows with the highest scores, best first.

    query: float32 [D]. A score is the dot product, as in the evaluations. Of overlapping windows
    of one video, only the best is returned. Equal scores keep the order of the index. A window
    whose score is not a finite number is never returned.
    """
    if not len(index.starts):
        return []
    scores = torch.mv(index.embeddings, query).numpy()
    scores[~np.isfinite(scores)] = -np.inf
    length = index.metadata.window_seconds - 1e-6  # starts are exact to the microsecond
    found = []
    while len(found) < count:
        row = int(scores.argmax())
        if scores[row] == -np.inf:
            break
        best = get_moment(index, row, scores[row].item())
        found.append(best)
        begin = index.first[best.video]
        starts = index.videos[best.video].starts.numpy()
        overlapping = np.searchsorted(starts, (best.start - length, best.start + length))
        scores[begin + overlapping[0] : begin + overlapping[1]] = -np.inf
        scores[row] = -np.inf  # even if its start is NaN, so that the loop ends
    return found


def explain_no_moments(index: Index) -> str:
    """Explain why best_moments returns nothing: the problem, then the fix."""
    if len(index.starts):
        return "no score is a finite number; index the videos again, with other weights"
    failed = [video.reason for video in index.videos if video.reason]
    if not failed:
        return "the videos show nothing but black; index others"
    rest = "" if len(failed) == len(index.videos) else ", and the others show nothing but black"
    return (
        f"{plural(len(failed), 'video')} could not be used ({printable(failed[0])}){rest}; repair "
        "them, or index others"
    )


def format_scores(scores: Sequence[float]) -> list[str]:
    """Format scores with two decimals, or with as many more as tell different scores apart.

    Nine is the limit: a float32 has no more significant digits.
    """
    for decimals in range(2, 10):
        texts = [f"{score:.{decimals}f}" for score in scores]
        if len(set(texts)) == len(set(scores)):
            break
    return texts


def format_timestamp(seconds: int) -> str:
    """Format whole seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
