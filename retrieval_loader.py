"""Data sets of text-to-video retrieval: texts, and evenly spaced windows of their videos."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from utils import DataError
from video_decoder import ClipSpec, DecodeError, decode_clips, probe_duration, video_exists

RETRIEVAL_WORDS = 30  # words kept of a text


class Pair(NamedTuple):
    """A text and the stretch of video that it describes, in seconds."""

    path: Path
    start: float
    end: float | None  # None: the whole video
    text: str | float  # NaN: an empty text


def window_starts(start: float, end: float, *, clip: ClipSpec, num_windows: int) -> list[float]:
    """Return the seconds at which the windows of [start, end - 0.4] start, evenly spaced."""
    return np.linspace(start, max(start, end - clip.seconds - 0.4), num_windows).tolist()


class Retrieval(Dataset):
    """Texts and the stretches of video that they describe. A subclass defines `list_pairs`.

    `pairs` are those whose video exists; `num_missing` counts the others. An item has "video",
    uint8 [num_windows, 3, num_frames, size, size], or "error", a line, if it cannot be decoded. Its
    text is `pairs[index].text`, which `tokenizer` converts to int64 [30].
    """

    def __init__(
        self,
        table: pd.DataFrame,
        video_root: str | Path,
        tokenizer: Callable[[str], torch.Tensor],
        clip: ClipSpec = ClipSpec(),
        *,
        num_windows: int = 4,
    ):
        """Raise DataError if all videos of the table are absent."""
        pairs = self.list_pairs(table, video_root)
        present = {path for path in {pair.path for pair in pairs} if video_exists(path)}
        self.pairs = [pair for pair in pairs if pair.path in present]
        self.num_missing = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise DataError(video_root, "has no video of the table; give their folder")
        self.tokenizer, self.clip, self.num_windows = tokenizer, clip, num_windows
        self.item_spec = {"video": ((num_windows, *clip.shape), torch.uint8)}

    @staticmethod
    def list_pairs(table: pd.DataFrame, video_root: str | Path) -> list[Pair]:
        """Return the pair of each row of a table, whether or not its video exists."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.pairs)

    def path(self, index: int) -> Path:
        return self.pairs[index].path

    def __getitem__(self, index: int) -> dict:
        path, start, end, _ = self.pairs[index]
        try:
            end = probe_duration(path) if end is None else end
            starts = window_starts(start, end, clip=self.clip, num_windows=self.num_windows)
            video = decode_clips(path, starts, **self.clip.options)
        except DecodeError as error:
            return {"error": str(error)}
        return {"video": video}
