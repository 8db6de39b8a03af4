"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from os.path import isfile
from pathlib import Path

from annotations.tables import log_notes
from annotations.youcook import youcook_table
from retrieval_loader import Retrieval
from utils import check_folder

EXTENSIONS = (".mp4", ".mkv", ".webm")


class YouCook2(Retrieval):
    """The segments of a table with columns end, start, task, text, video_id (seconds), or of the
    official JSON.

    Files: <video_root>/validation/<task>/<video_id>.{mp4,mkv,webm}. Items: see Retrieval.
    """

    def __init__(self, csv, video_root, tokenizer, **clips):
        table, notes = youcook_table(csv)
        log_notes(csv, notes)
        check_folder(video_root, "eval_video_root")
        found = {}
        for task, video in set(zip(table["task"], table["video_id"], strict=True)):
            stem = Path(video_root, "validation", task, video)
            files = (stem.with_name(stem.name + extension) for extension in EXTENSIONS)
            found[task, video] = next((file for file in files if isfile(file)), None)
        pairs = [
            (found[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]
        super().__init__(pairs, tokenizer, **clips)
