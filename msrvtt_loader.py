"""MSR-VTT for text-to-video retrieval: short videos, a sentence each (the 1k-A test list)."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from retrieval_loader import Pair, Retrieval
from video_decoder import ClipSpec


class MSRVTT(Retrieval):
    """The videos of a table, see annotations.msrvtt.msrvtt_table. Items: see Retrieval.

    Files: <video_root>/<video_id>.mp4, whose whole length the windows span.
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
        pairs = [
            Pair(Path(video_root, f"{row.video_id}.mp4"), 0.0, None, row.sentence)
            for row in table.itertuples()
        ]
        super().__init__(pairs, video_root, tokenizer, clip, num_windows)
