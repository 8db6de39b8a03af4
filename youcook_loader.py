"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from pathlib import Path

import pandas as pd

from retrieval_loader import Pair, Retrieval
from video_decoder import find_video


class YouCook2(Retrieval):
    """The segments of a table; see annotations.youcook.youcook_table. Items: see Retrieval.

    Files: <video_root>/validation/<task>/<video_id>.{mp4,mkv,webm}.
    """

    @staticmethod
    def list_pairs(table: pd.DataFrame, video_root: str | Path) -> list[Pair]:
        videos = set(zip(table["task"], table["video_id"], strict=True))
        folder = Path(video_root, "validation")
        paths = {(task, name): find_video(folder / task / name) for task, name in videos}
        return [
            Pair(paths[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]
