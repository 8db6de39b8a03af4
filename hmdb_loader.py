"""HMDB-51 for action recognition: short clips, 51 classes, three splits."""

from os.path import isfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from annotations.hmdb import SPLITS, hmdb_table
from annotations.tables import log_notes
from utils import InputError, check_folder
from video_decoder import DecodeError, decode_frames


class HMDB51(Dataset):
    """The clips of a table with columns video_id, label (`<class>_test`), split1..3, or of the
    official folder of split files.

    Files: <video_root>/<class>/<video_id>; those of them that are `absent` are left out. Without a
    video_root (None) it is the table alone: every clip, whether or not there is a file.
    `names` has each clip's <class>/<video_id>, `labels` [N] its class as a string, `splits` [N, 3]
    its part: 1 train, 2 test, 0 unused.
    An item: "video" uint8 [num_windows, 3, num_frames, size, size], every window at the clip's own
    frame rate, or "error" with one line.
    """

    def __init__(self, csv, video_root, *, num_frames=16, size=224, num_windows=4, decoder="pyav"):
        table, notes = hmdb_table(csv)
        log_notes(csv, notes)
        if video_root is not None:
            check_folder(video_root, "eval_video_root")
        table["label"] = table["label"].str.removesuffix("_test")
        table["name"] = table["label"] + "/" + table["video_id"]
        present = table
        if video_root is not None:
            present = table[[isfile(Path(video_root, name)) for name in table["name"]]]
            if present.empty:
                raise InputError(f"--eval_video_root: no video of {csv} is in {video_root}")
        self.absent = table["name"].drop(present.index).tolist()
        self.names = present["name"].tolist()
        self.video_root = video_root
        self.labels = present["label"].to_numpy(dtype=np.str_)
        self.splits = present[SPLITS].to_numpy(dtype=np.int64)
        self.num_frames, self.size = num_frames, size
        self.num_windows, self.decoder = num_windows, decoder
        self.item_spec = {"video": ((num_windows, 3, num_frames, size, size), torch.uint8)}

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return Path(self.video_root, self.names[index])

    def __getitem__(self, index):
        try:
            video = decode_frames(self.path(index), size=self.size, backend=self.decoder)
        except DecodeError as error:
            return {"error": str(error)}
        if video.shape[1] < self.num_frames:  # black frames at the end
            video = F.pad(video, (0, 0, 0, 0, 0, self.num_frames - video.shape[1]))
        starts = np.linspace(0, video.shape[1] - self.num_frames, self.num_windows, dtype=int)
        return {"video": torch.stack([video[:, s : s + self.num_frames] for s in starts])}
