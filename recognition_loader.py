"""Data sets of action recognition: whole clips with a class, in three splits."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from annotations.clips import SPLITS
from utils import DataError
from video_decoder import ClipSpec, DecodeError, decode_frames, video_exists


class Recognition(Dataset):
    """The clips of a table; see annotations.clips. A subclass defines `classes`.

    Files: <video_root>/<class>/<video_id>; clips without a file are not in the data set but in
    `absent`. `names` has each clip's <class>/<video_id>, `labels` [N] its class as a string,
    `splits` [N, 3] its part: 1 train, 2 test, 0 unused.

    An item has "video", uint8 [num_windows, 3, num_frames, size, size], whose windows are at the
    clip's own frame rate; or "error", a line.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        video_root: str | Path | None,
        clip: ClipSpec = ClipSpec(),
        *,
        num_windows: int = 4,
    ):
        """video_root: None to use the table alone, with all its clips.

        Raises DataError if all videos are absent.
        """
        labels = self.classes(table)
        names = labels + "/" + table["video_id"]
        present = pd.Series(True, index=table.index)
        if video_root is not None:
            present = names.map(lambda name: video_exists(Path(video_root, name)))
            if not present.any():
                raise DataError(video_root, "has no video of the table; give their folder")
        self.absent = names[~present].tolist()
        self.names = names[present].tolist()
        self.labels = labels[present].to_numpy(dtype=np.str_)
        self.splits = table.loc[present, SPLITS].to_numpy(dtype=np.int64)
        self.video_root, self.clip, self.num_windows = video_root, clip, num_windows
        self.item_spec = {"video": ((num_windows, *clip.shape), torch.uint8)}

    @staticmethod
    def classes(table: pd.DataFrame) -> pd.Series:
        """Return the class of each clip of a table, which is the name of its folder."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        return Path(self.video_root, self.names[index])

    def __getitem__(self, index: int) -> dict:
        clip = self.clip
        try:
            video = decode_frames(self.path(index), size=clip.size, backend=clip.decoder)
        except DecodeError as error:
            return {"error": str(error)}
        if video.shape[1] < clip.num_frames:  # add black frames
            video = F.pad(video, (0, 0, 0, 0, 0, clip.num_frames - video.shape[1]))
        starts = np.linspace(0, video.shape[1] - clip.num_frames, self.num_windows, dtype=int)
        return {"video": torch.stack([video[:, s : s + clip.num_frames] for s in starts])}
