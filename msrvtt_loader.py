"""MSR-VTT for text-to-video retrieval: short videos with one sentence each (the 1k-A test list)."""

from pathlib import Path

import pandas as pd

from retrieval_loader import Pair, Retrieval


class MSRVTT(Retrieval):
    """The videos of a table; see annotations.msrvtt.msrvtt_table. Items: see Retrieval.

    Files: <video_root>/<video_id>.mp4, whose whole length the windows span.
    """

    @staticmethod
    def list_pairs(table: pd.DataFrame, video_root: str | Path) -> list[Pair]:
        return [
            Pair(Path(video_root, f"{row.video_id}.mp4"), 0.0, None, row.sentence)
            for row in table.itertuples()
        ]
