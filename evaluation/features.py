"""Features of videos: of an evaluation's windows, and of windows at a constant stride.

The windows of strided_features start at k * stride seconds, k = 0, 1, ..., and have clip.num_frames
frames of the centre square at clip.fps, as in the evaluations. A video has those that end before it
does, and at least the first. The rest of the video is left out: the feature of a partly black
window would describe the padding too. A video shorter than a window has one, with black frames at
its end, as in training.
"""

import contextlib
import datetime
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from distributed.device import PRECISIONS, check_compiler, inference_amp
from distributed.workers import describe_error, sample_batches
from s3dg import S3D, fuse_for_inference, load_model, to_unit_range
from utils import lines_above, log
from video_decoder import ClipSpec, DecodeError, decode_clips, probe_duration

# What a worker decodes and holds at once, however long the video. Each group opens the file again
# and decodes from the keyframe before it, so smaller groups would cost time.
GROUP_SIZE = 16
LOG_EVERY = 60  # seconds, without a terminal for a progress bar


def load_inference_model(
    weights: str | os.PathLike,
    device: torch.device,
    *,
    amp: str = "none",
    channels_last: bool = True,
    compile: bool = False,
) -> S3D:
    """Load the released weights or a checkpoint for inference, see s3dg.fuse_for_inference.

    amp: a key of PRECISIONS, or "auto". Raises ValueError or FileNotFoundError for the weights, and
    ValueError if torch.compile cannot work here.
    """
    if compile:
        check_compiler()
    model = load_model(weights)
    if channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model = fuse_for_inference(model.to(device), PRECISIONS[inference_amp(amp)])
    if compile:
        model.compile()
    return model


def clip_batches(
    items: Iterable[tuple[int, torch.Tensor]], batch_size: int
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batch the windows of successive videos: (owners, uint8 [batch_size or fewer, 3, T, H, W]).

    items: (owner, windows [W, 3, T, H, W]) pairs. At most batch_size windows and those of one video
    are held, so memory does not grow with the number of windows.
    """
    owners = []
    for owner, windows in items:
        for clip in windows:
            if not owners:
                clips = clip.new_empty(batch_size, *clip.shape)
            clips[len(owners)] = clip
            owners.append(owner)
            if len(owners) == batch_size:
                yield owners, clips
                owners = []
    if owners:
        yield owners, clips[: len(owners)]


@torch.inference_mode()
def window_features(
    model: torch.nn.Module,
    items: Iterable[tuple[int, torch.Tensor]],
    device: torch.device,
    *,
    batch_size: int,
    mixed5c: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (owner, float32 [512]) for each window, or float32 [1024] with mixed5c.

    items: see clip_batches. The model needs to be in evaluation mode.
    """
    for owners, clips in clip_batches(items, batch_size):
        output = model(to_unit_range(clips.to(device)), None, mode="video", mixed5c=mixed5c)
        yield from zip(owners, output.float().cpu().numpy(), strict=True)


# --- the windows of an evaluation ---------------------------------------------------------------


def video_features(
    model: torch.nn.Module,
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int,
    workers: int,
    sample_timeout: float,
    mixed5c: bool = False,
    rank: int = 0,
    world_size: int = 1,
    on_windows: Callable[[int, torch.Tensor], object] = lambda index, windows: None,
    on_video: Callable[[], object] = lambda: None,
) -> dict[int, np.ndarray]:
    """Compute the features of the windows of each video: {index: float32 [W, 512 or 1024]}.

    Videos that cannot be decoded are logged and have no entry. Of several ranks, each takes every
    world_size-th video. The model needs to be in evaluation mode.

    on_windows: called with the index and the windows, uint8 [W, 3, T, H, W], of a decoded video.
    on_video: called after each video; an exception that it raises ends the evaluation.
    """
    shard = range(rank, len(dataset), world_size)
    batches = sample_batches(
        dataset, ([index] for index in shard), workers=workers, timeout=sample_timeout
    )

    def decode_videos():
        # No bar without a terminal: it does not belong in a log, which may be on a full disk.
        hidden = True if rank > 0 else None
        bar = tqdm(shard, desc=type(dataset).__name__, unit="video", disable=hidden)
        with bar, lines_above(bar):
            for index, batch in zip(bar, batches, strict=True):
                if error := batch["errors"][0]:
                    reason = describe_error(error, dataset.path(index))
                    log.warning("left out of the evaluation: %s", reason)
                else:
                    windows = batch["video"][0]
                    on_windows(index, windows)
                    yield index, windows
                on_video()

    features = {}
    with contextlib.closing(batches):
        for index, feature in window_features(
            model, decode_videos(), device, batch_size=batch_size, mixed5c=mixed5c
        ):
            features.setdefault(index, []).append(feature)
    return {index: np.stack(windows) for index, windows in features.items()}


# --- windows at a constant stride ---------------------------------------------------------------


def strided_starts(duration: float, clip: ClipSpec, stride: float) -> list[float]:
    """Return where the windows of a video of `duration` seconds start: seconds, at least [0.0].

    Computed in microseconds, as in video files: sums of floats would lose a window that just fits.
    """
    step = max(1, round(stride * 1e6))
    free = round(duration * 1e6) - round(clip.seconds * 1e6)
    return [k * step / 1e6 for k in range(max(0, free) // step + 1)]


class Durations(Dataset):
    """The durations of videos: items "seconds", float64 [], or "error" with one line."""

    item_spec = {"seconds": ((), torch.float64)}  # noqa: RUF012

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, index):
        try:
            return {"seconds": torch.tensor(probe_duration(self.paths[index]), dtype=torch.float64)}
        except DecodeError as error:
            return {"error": str(error)}


class WindowGroups(Dataset):
    """Windows of videos. A key is (index of the video, starts of at most GROUP_SIZE windows).

    An item: "video" uint8 [GROUP_SIZE, 3, T, H, W], of which the first len(starts) are filled, or
    "error" with one line.
    """

    def __init__(self, paths, clip):
        self.paths, self.clip = paths, clip
        self.item_spec = {"video": ((GROUP_SIZE, *clip.shape), torch.uint8)}

    def __getitem__(self, key):
        index, starts = key
        try:
            clips = decode_clips(self.paths[index], starts, **self.clip.options)
        except DecodeError as error:
            return {"error": str(error)}
        rest = clips.new_zeros(GROUP_SIZE - len(clips), *clips.shape[1:])
        return {"video": torch.cat([clips, rest]) if len(rest) else clips}


class VideoFeatures(NamedTuple):
    """The features of a video's W windows."""

    starts: list[float]  # seconds
    features: np.ndarray  # float32 [W, 512 or 1024]
    black: list[int]  # windows in which every pixel is black, as if nothing can be decoded


class Outcome(NamedTuple):
    """What strided_features yields for a video: its features, or why it has none, in one line."""

    index: int
    found: VideoFeatures | None
    error: str = ""


def strided_features(
    model: torch.nn.Module,
    paths: Sequence[str | os.PathLike],
    device: torch.device,
    clip: ClipSpec,
    *,
    stride: float,
    batch_size: int,
    workers: int,
    sample_timeout: float,
    mixed5c: bool = False,
) -> Iterator[Outcome]:
    """Compute the features of windows every `stride` seconds of each video.

    Yields an Outcome per video, as soon as it is done. A video is decoded in one pass, GROUP_SIZE
    windows at a time, and batches continue from one video to the next. Memory, except for the
    features, does not depend on the length of the videos. The model needs to be in evaluation mode.
    """
    work = {}  # index -> the VideoFeatures so far, with a list of features
    submitted = deque()  # (index, first window) of the groups that are being decoded
    failed = deque()
    probes = sample_batches(
        Durations(paths),
        ([index] for index in range(len(paths))),
        workers=min(1, workers),
        timeout=sample_timeout,
        prefetch=8,
    )

    def submit_groups():
        for index, item in enumerate(probes):
            if error := item["errors"][0]:
                failed.append(Outcome(index, None, describe_error(error, paths[index])))
                continue
            starts = strided_starts(item["seconds"].item(), clip, stride)
            work[index] = VideoFeatures(starts, [], [])
            for first in range(0, len(starts), GROUP_SIZE):
                if index not in work:
                    break  # it failed in the meantime
                submitted.append((index, first))
                yield [(index, starts[first : first + GROUP_SIZE])]

    groups = sample_batches(
        WindowGroups(paths, clip), submit_groups(), workers=workers, timeout=sample_timeout
    )

    def decode_windows():
        for item in groups:
            index, first = submitted.popleft()
            if index not in work:
                continue
            if error := item["errors"][0]:
                del work[index]
                failed.append(Outcome(index, None, describe_error(error, paths[index])))
                continue
            video = work[index]
            clips = item["video"][0, : len(video.starts) - first]
            video.black.extend(k for k, window in enumerate(clips, first) if not window.any())
            yield index, clips

    with contextlib.closing(probes), contextlib.closing(groups):
        for index, feature in window_features(
            model, decode_windows(), device, batch_size=batch_size, mixed5c=mixed5c
        ):
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
                done = work.pop(index)
                yield Outcome(index, done._replace(features=np.stack(done.features)))
        yield from failed


def track_progress(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """Pass the outcomes on, and show how many of the `total` videos are done and the time left."""
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
