"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from retrieval_loader import Pair, Retrieval
from utils import find_video
from video_decoder import ClipSpec


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
        folder = Path(video_root, "validation")
        paths = {(task, name): find_video(folder / task / name) for task, name in videos}
        pairs = [
            Pair(paths[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]
        super().__init__(pairs, video_root, tokenizer, clip, num_windows)
