"""What the two retrieval data sets have in common: a text and evenly spaced windows of a video."""

import numpy as np
import torch
from torch.utils.data import Dataset

from utils import InputError
from video_decoder import DecodeError, decode_clips, probe_duration

TEXT_WORDS = 30


def window_starts(start, end, *, num_frames, fps, num_windows):
    """Where the windows of [start, end] (seconds) start; 0.4 s are spared before the end."""
    return np.linspace(start, max(start, end - num_frames / fps - 0.4), num_windows).tolist()


class Retrieval(Dataset):
    """Pairs of a text and a stretch of video; the videos that are absent are left out and counted.

    pairs: (path or None where absent, start, end or None for the whole video, text), in seconds.
    An item: "text" int64 [30] and "video" uint8 [num_windows, 3, num_frames, size, size], or
    "error" with one line in place of a video that cannot be decoded.
    """

    def __init__(
        self, pairs, tokenizer, *, num_frames=16, size=224, fps=5, num_windows=4, decoder="pyav"
    ):
        self.pairs = [pair for pair in pairs if pair[0] is not None]
        self.num_missing = len(pairs) - len(self.pairs)
        if not self.pairs:
            raise InputError("--eval_video_root: none of the videos of the table is there")
        self.tokenizer = tokenizer
        self.num_frames, self.size, self.fps = num_frames, size, fps
        self.num_windows, self.decoder = num_windows, decoder
        self.item_spec = {"video": ((num_windows, 3, num_frames, size, size), torch.uint8)}

    def __len__(self):
        return len(self.pairs)

    def path(self, index):
        return self.pairs[index][0]

    def __getitem__(self, index):
        path, start, end, text = self.pairs[index]
        item = {"text": self.tokenizer(text)}
        try:
            starts = window_starts(
                start,
                probe_duration(path) if end is None else end,
                num_frames=self.num_frames,
                fps=self.fps,
                num_windows=self.num_windows,
            )
            item["video"] = decode_clips(
                path,
                starts,
                fps=self.fps,
                num_frames=self.num_frames,
                size=self.size,
                backend=self.decoder,
            )
        except DecodeError as error:
            item["error"] = str(error)
        return item
