"""YouCook2 for text-to-video retrieval: segments of cooking videos and their sentences."""

from pathlib import Path

from retrieval_loader import Retrieval
from utils import check_folder, read_table

EXTENSIONS = (".mp4", ".mkv", ".webm")


class YouCook2(Retrieval):
    """The segments of a table with columns end, start, task, text, video_id (seconds).

    Files: <video_root>/validation/<task>/<video_id>.{mp4,mkv,webm}. Items: see Retrieval.
    """

    def __init__(self, csv, video_root, tokenizer, **clips):
        columns = ["end", "start", "task", "text", "video_id"]
        table = read_table(csv, columns, numbers=["start", "end"])
        check_folder(video_root, "eval_video_root")
        found = {}
        for task, video in set(zip(table["task"], table["video_id"], strict=True)):
            stem = Path(video_root, "validation", str(task), str(video))
            files = (stem.with_name(stem.name + extension) for extension in EXTENSIONS)
            found[task, video] = next((file for file in files if file.is_file()), None)
        pairs = [
            (found[row.task, row.video_id], row.start, row.end, row.text)
            for row in table.itertuples()
        ]
        super().__init__(pairs, tokenizer, **clips)
