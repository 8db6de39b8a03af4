"""MSR-VTT for text-to-video retrieval: short videos, a sentence each (the 1k-A test list)."""

from os.path import isfile
from pathlib import Path

from annotations.msrvtt import msrvtt_table
from annotations.tables import log_notes
from retrieval_loader import Retrieval
from utils import check_folder


class MSRVTT(Retrieval):
    """The videos of a table with columns key, vid_key, video_id, sentence, or those of an official
    JSON's test split with their first sentences.

    Files: <video_root>/<video_id>.mp4, of which the windows span the whole. Items: see Retrieval.
    """

    def __init__(self, csv, video_root, tokenizer, **clips):
        table, notes = msrvtt_table(csv)
        log_notes(csv, notes)
        check_folder(video_root, "eval_video_root")
        pairs = []
        for row in table.itertuples():
            path = Path(video_root, f"{row.video_id}.mp4")
            pairs.append((path if isfile(path) else None, 0.0, None, row.sentence))
        super().__init__(pairs, tokenizer, **clips)
