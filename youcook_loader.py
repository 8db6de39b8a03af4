"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from os.path import isfile
from pathlib import Path

import pandas as pd

from retrieval_loader import Pair, Retrieval

SUFFIXES = (".mp4", ".mkv", ".webm")  # of the files, in order of preference


class YouCook2(Retrieval):
    """The segments of a table, see annotations.youcook.youcook_table. Items: see Retrieval.

    Files: <video_root>/validation/<task>/<video_id>.{mp4,mkv,webm}.
    """

    @staticmethod
    def list_pairs(table: pd.DataFrame, video_root: str | Path) -> list[Pair]:
        videos = set(zip(table["task"], table["video_id"], strict=True))
        paths = {(task, name): find_video(video_root, task, name) for task, name in videos}
        return [
            Pair(paths[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]


def find_video(video_root: str | Path, task: str, name: str) -> Path:
    """Return the path of a video; if it is absent, the first of those that it could have."""
    folder = Path(video_root, "validation", task)
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next(filter(isfile, paths), paths[0])
