"""HMDB-51 for action recognition: short clips, 51 classes, three splits."""

from os.path import isfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from annotations import SPLITS, hmdb_table, log_notes
from utils import InputError, check_folder
from video_decoder import DecodeError, decode_frames


class HMDB51(Dataset):
    """The clips of a table with columns video_id, label (`<class>_test`), split1..3, or of the
    official folder of split files.

    Files: <video_root>/<class>/<video_id>; absent ones are left out and counted. `labels` [N] has
    each clip's class as a string, `splits` [N, 3] its part: 1 train, 2 test, 0 unused.
    An item: "video" uint8 [num_windows, 3, num_frames, size, size], every window at the clip's own
    frame rate, or "error" with one line.
    """

    def __init__(self, csv, video_root, *, num_frames=16, size=224, num_windows=4, decoder="pyav"):
        table, notes = hmdb_table(csv)
        log_notes(csv, notes)
        check_folder(video_root, "eval_video_root")
        table["label"] = table["label"].str.removesuffix("_test")
        table["path"] = [Path(video_root, row.label, row.video_id) for row in table.itertuples()]
        present = table[[isfile(path) for path in table["path"]]]
        if present.empty:
            raise InputError(f"--eval_video_root: no video of {csv} is in {video_root}")
        self.num_missing = len(table) - len(present)
        self.paths = present["path"].tolist()
        self.labels = present["label"].to_numpy(dtype=np.str_)
        self.splits = present[SPLITS].to_numpy(dtype=np.int64)
        self.num_frames, self.size = num_frames, size
        self.num_windows, self.decoder = num_windows, decoder
        self.fields = {"video": ((num_windows, 3, num_frames, size, size), torch.uint8)}

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return self.paths[index]

    def __getitem__(self, index):
        try:
            video = decode_frames(self.paths[index], size=self.size, backend=self.decoder)
        except DecodeError as error:
            return {"error": str(error)}
        if video.shape[1] < self.num_frames:  # black frames at the end
            video = F.pad(video, (0, 0, 0, 0, 0, self.num_frames - video.shape[1]))
        starts = np.linspace(0, video.shape[1] - self.num_frames, self.num_windows, dtype=int)
        return {"video": torch.stack([video[:, s : s + self.num_frames] for s in starts])}
