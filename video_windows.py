"""Windows all along a video, one every `stride` seconds, and their features.

Window k starts at k * stride seconds and has num_frames frames, fps a second, of the centre square,
as in the evaluations: decode_clips of video_decoder. A video has the windows that end by its end,
and at least the first. What is after the last of them is left out rather than filled up: a window
that is partly black would describe the padding, too. A video shorter than a window is one
window with black frames at its end, as in training.
"""

import contextlib
import datetime
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from evaluation import window_features
from utils import lines_above, log
from video_decoder import DecodeError, decode_clips, probe_duration
from workers import described, sample_batches

# Windows that are decoded at once: what a worker holds, however long the video. Each group opens
# the file anew and decodes from the keyframe before it, so fewer would cost time.
CHUNK = 16
LOG_EVERY = 60  # seconds, where there is no terminal for a progress bar


def strided_starts(duration, *, num_frames, fps, stride):
    """Where the windows of a video of `duration` seconds start: a list of seconds, at least [0.0].

    To the microsecond, as video files count: sums of floats would lose a window that just fits.
    """
    step = max(1, round(stride * 1e6))
    free = round(duration * 1e6) - round(num_frames / fps * 1e6)
    return [k * step / 1e6 for k in range(max(0, free) // step + 1)]


class Durations(Dataset):
    """How long videos are: items "seconds", float64 [], or "error" with one line."""

    fields = {"seconds": ((), torch.float64)}  # noqa: RUF012

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, index):
        try:
            return {"seconds": torch.tensor(probe_duration(self.paths[index]), dtype=torch.float64)}
        except DecodeError as error:
            return {"error": str(error)}


class Chunks(Dataset):
    """Windows of videos. A key is (index of the video, starts of at most CHUNK windows, seconds).

    An item: "video" uint8 [CHUNK, 3, num_frames, size, size], of which the first len(starts) are
    filled, or "error" with one line.
    """

    def __init__(self, paths, *, num_frames, size, fps, decoder):
        self.paths = paths
        self.settings = {"fps": fps, "num_frames": num_frames, "size": size, "backend": decoder}
        self.fields = {"video": ((CHUNK, 3, num_frames, size, size), torch.uint8)}

    def __getitem__(self, key):
        index, starts = key
        try:
            clips = decode_clips(self.paths[index], starts, **self.settings)
        except DecodeError as error:
            return {"error": str(error)}
        rest = clips.new_zeros(CHUNK - len(clips), *clips.shape[1:])
        return {"video": torch.cat([clips, rest]) if len(rest) else clips}


class VideoFeatures(NamedTuple):
    """What strided_features has of a video."""

    starts: list[float]  # of its W windows, seconds
    features: np.ndarray  # float32 [W, 512 or 1024]
    black: list[int]  # the windows that are black throughout, as where nothing can be decoded


def strided_features(
    model,
    paths,
    device,
    *,
    num_frames,
    size,
    fps,
    stride,
    batch_size,
    workers,
    sample_timeout,
    decoder="pyav",
    mixed5c=False,
):
    """Features of the windows all along each video, as the videos are done.

    Yields (index in paths, VideoFeatures), or (index, one line) for a video that cannot be used.
    Each is decoded in one pass, CHUNK windows at a time; batches run on from one video to the
    next. What is held of the videos, besides the features, does not depend on how long they are.
    The model is to be in evaluation mode.
    """
    work = {}  # index -> the VideoFeatures so far, with a list of features
    asked = deque()  # (index, first window) of the chunks that are being decoded
    failed = deque()
    probes = sample_batches(
        Durations(paths),
        ([index] for index in range(len(paths))),
        workers=min(1, workers),
        timeout=sample_timeout,
        ahead=8,
    )

    def keys():
        for index, item in enumerate(probes):
            if error := item["errors"][0]:
                failed.append((index, described(error, paths[index])))
                continue
            duration = item["seconds"].item()
            starts = strided_starts(duration, num_frames=num_frames, fps=fps, stride=stride)
            work[index] = VideoFeatures(starts, [], [])
            for first in range(0, len(starts), CHUNK):
                if index not in work:
                    break  # it failed in the meantime
                asked.append((index, first))
                yield [(index, starts[first : first + CHUNK])]

    chunks = sample_batches(
        Chunks(paths, num_frames=num_frames, size=size, fps=fps, decoder=decoder),
        keys(),
        workers=workers,
        timeout=sample_timeout,
    )

    def decoded():
        for item in chunks:
            index, first = asked.popleft()
            if index not in work:
                continue
            if error := item["errors"][0]:
                del work[index]
                failed.append((index, described(error, paths[index])))
                continue
            video = work[index]
            clips = item["video"][0, : len(video.starts) - first].clone()  # used again
            video.black.extend(k for k, clip in enumerate(clips, first) if not clip.any())
            yield index, clips

    with contextlib.closing(probes), contextlib.closing(chunks):
        windows = window_features(model, decoded(), device, batch_size=batch_size, mixed5c=mixed5c)
        for index, feature in windows:
            while failed:
                yield failed.popleft()
            if index not in work:
                continue
            video = work[index]
            video.features.append(feature)
            if len(video.features) == len(video.starts):
                if video.black:
                    counts = len(video.black), len(video.starts)
                    log.warning("%s: %d of %d windows are black", paths[index], *counts)
                yield index, work.pop(index)._replace(features=np.stack(video.features))
        yield from failed


def with_progress(outcomes, total):
    """Passes on the outcomes, a video each, and shows how many are done and the time left."""
    bar = tqdm(total=total, desc="features", unit="video", disable=None)
    began = shown = time.monotonic()
    with bar, lines_above(bar):
        for done, outcome in enumerate(outcomes, 1):
            yield outcome
            bar.update()
            now = time.monotonic()
            if bar.disable and now > shown + LOG_EVERY:
                shown = now
                left = datetime.timedelta(seconds=round((now - began) / done * (total - done)))
                log.info("%d of %d videos, %s left", done, total, left)
