"""video_decoder: the golden frames, and the same pixels from both backends."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import video_decoder
from video_decoder import BACKENDS

SHARED = Path(__file__).resolve().parents[2] / "shared"
VIDEOS = SHARED / "videos"
GOLDEN = SHARED / "golden" / "frames.json"

needs_shared = pytest.mark.skipif(not VIDEOS.is_dir(), reason="the shared clips are not here")


def golden_rows():
    rows = json.loads(GOLDEN.read_text()) if VIDEOS.is_dir() else []
    return [
        pytest.param(row, id=f"{number}-{row['kind']}-{row['video']}")
        for number, row in enumerate(rows)
    ]


def sha256(clip):
    """Of a [3,T,H,W] clip, as the golden file takes it: [T,H,W,3] in C order."""
    return hashlib.sha256(np.ascontiguousarray(clip.permute(1, 2, 3, 0).numpy())).hexdigest()


def decode_row(row, backend):
    """The clips a golden row speaks of."""
    path, count, size = VIDEOS / row["video"], row["num_frames"], row["size"]
    if row["kind"] == "hmdb":
        video = video_decoder.decode_frames(path, size=size, backend=backend)
        missing = max(0, count - video.shape[1])
        video = torch.nn.functional.pad(video, (0, 0, 0, 0, 0, missing))
        starts = np.linspace(0, video.shape[1] - count, row["num_clip"], dtype=int)
        return [video[:, start : start + count] for start in starts]
    settings = {"fps": row["fps"], "num_frames": count, "size": size, "backend": backend}
    if row["kind"] == "train":
        crop_only = row["crop_only"]
        return [video_decoder.decode_clip(path, row["start"], crop_only=crop_only, **settings)]
    last = max(row["start"], row["end"] - count / row["fps"] - 0.4)
    starts = np.linspace(row["start"], last, row["num_clip"])
    return list(video_decoder.decode_clips(path, starts, **settings))


@needs_shared
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", golden_rows())
def test_golden_frames(row, backend):
    expected = row["sha256"] if isinstance(row["sha256"], list) else [row["sha256"]]
    assert [sha256(clip) for clip in decode_row(row, backend)] == expected
