"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from retrieval_loader import Pair, Retrieval
from video_decoder import ClipSpec, video_exists

SUFFIXES = (".mp4", ".mkv", ".webm")  # of the files, in order of preference


class YouCook2(Retrieval):
    """The segments of a table, see annotations.youcook.youcook_table. Items: see Retrieval.

    Files: <video_root>/validation/<task>/<video_id>.{mp4,mkv,webm}.
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
        """Raise DataError if all videos are absent."""
        videos = set(zip(table["task"], table["video_id"], strict=True))
        paths = {(task, name): find_video(video_root, task, name) for task, name in videos}
        pairs = [
            Pair(paths[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]
        super().__init__(pairs, video_root, tokenizer, clip, num_windows)


def find_video(video_root: str | Path, task: str, name: str) -> Path:
    """Return the path of a video; if it is absent, the first of those that it could have."""
    folder = Path(video_root, "validation", task)
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next(filter(video_exists, paths), paths[0])
