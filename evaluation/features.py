"""Compute features of an evaluation's windows, and of windows along whole videos.

The windows of strided_features have clip.num_frames frames of the centre square at clip.fps, as in
the evaluations. There are two kinds:

- StridedWindows start at k * stride seconds, k = 0, 1, ... A video has those that end by its end,
  and at least the first. The rest of the video is skipped, because the feature of a partly filled
  window would also describe the padding.
- SecondWindows are centred on the middle of each second. Near the ends of the video they are
  shifted so that they stay inside it.

A video shorter than a window has its last frame repeated. (In training such a clip ends in black
frames.)
"""

import contextlib
import datetime
import math
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
from s3dg import (
    S3D,
    Tokenizer,
    fuse_for_inference,
    input_format,
    load_model,
    to_unit_range,
)
from utils import lines_above, log
from video_decoder import ClipSpec, DecodeError, decode_windows, probe_duration

# Windows that a worker decodes at once. Each group opens the file again and decodes from the
# keyframe before it, so larger groups take less time and more memory.
GROUP_SIZE = 16
LOG_EVERY = 60  # seconds between progress lines, without a terminal for a progress bar


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
    ValueError if torch.compile does not work on this machine.
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

    items: (owner, windows [W, 3, T, H, W]) pairs. Memory holds the windows of one batch and of one
    item at most.
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

    items: see clip_batches. The model must be in evaluation mode.
    """
    form = input_format(model)
    for owners, clips in clip_batches(items, batch_size):
        video = to_unit_range(clips.to(device), *form)
        output = model(video, None, mode="video", mixed5c=mixed5c)
        yield from zip(owners, output.float().cpu().numpy(), strict=True)


@torch.inference_mode()
def embed_texts(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device,
    batch_size: int = 256,
) -> np.ndarray:
    """Embed texts: float32 [len(texts), 512]. The model must be in evaluation mode."""
    tokens = torch.stack([tokenizer(text) for text in texts])
    embeddings = [model(None, part.to(device), mode="text") for part in tokens.split(batch_size)]
    return torch.cat(embeddings).float().cpu().numpy()


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

    Videos that cannot be decoded are logged and have no entry. Each rank takes every world_size-th
    video. The model must be in evaluation mode.

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
                    log.warning("skipped in the evaluation: %s", reason)
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


# --- windows along whole videos -----------------------------------------------------------------


def clip_settings(clip: ClipSpec) -> dict[str, object]:
    """Return the arguments of feature_file.feature_settings that describe a clip."""
    return {
        "num_frames": clip.num_frames,
        "video_size": clip.size,
        "fps": clip.fps,
        "decoder": clip.decoder,
    }


class StridedWindows(NamedTuple):
    """Windows of `clip` that start every `stride` seconds."""

    clip: ClipSpec
    stride: float

    def starts(self, duration: float) -> list[float]:
        """Return the start times, in seconds, of the windows of a video of `duration` seconds.

        Computes in microseconds, as video files do: sums of floats would miss a window that just
        fits.
        """
        step = max(1, round(self.stride * 1e6))
        free = round(duration * 1e6) - round(self.clip.seconds * 1e6)
        return [k * step / 1e6 for k in range(max(0, free) // step + 1)]

    @property
    def settings(self) -> dict[str, object]:
        """The arguments of feature_file.feature_settings that describe the windows."""
        return {**clip_settings(self.clip), "stride": self.stride}


def second_starts(duration: float, *, num_frames: int, fps: float) -> list[float]:
    """Return the start times, in seconds, of the windows centred on each second of a video.

    There are max(1, floor(duration)), each of num_frames / fps seconds. Those near an end are
    shifted into the video. Computes in microseconds, see StridedWindows.starts.
    """
    window = round(num_frames / fps * 1e6)
    free = max(0, round(duration * 1e6) - window)
    starts = (second * 1_000_000 + 500_000 - window // 2 for second in range(math.floor(duration)))
    return [min(max(0, start), free) / 1e6 for start in starts] or [0.0]


class SecondWindows(NamedTuple):
    """Windows of `clip` around the middle of each second."""

    clip: ClipSpec

    def starts(self, duration: float) -> list[float]:
        """Return the start times, in seconds, of the windows of a video of `duration` seconds."""
        return second_starts(duration, num_frames=self.clip.num_frames, fps=self.clip.fps)

    @property
    def settings(self) -> dict[str, object]:
        """The arguments of feature_file.feature_settings that describe the windows."""
        return clip_settings(self.clip)


Windows = StridedWindows | SecondWindows


class Durations(Dataset):
    """The durations of videos: items "seconds", float64 [], or "error" with one line."""

    item_spec = {"seconds": ((), torch.float64)}  # noqa: RUF012

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = paths

    def __getitem__(self, index: int) -> dict:
        try:
            return {"seconds": torch.tensor(probe_duration(self.paths[index]), dtype=torch.float64)}
        except DecodeError as error:
            return {"error": str(error)}


class WindowGroups(Dataset):
    """Windows of videos. A key is (index of the video, starts of at most GROUP_SIZE windows).

    An item: "video" uint8 [GROUP_SIZE, 3, T, H, W] and "frames" int64 [GROUP_SIZE], of which the
    first len(starts) are filled, see decode_windows; or "error" with one line.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], clip: ClipSpec):
        self.paths, self.clip = paths, clip
        self.item_spec = {
            "video": ((GROUP_SIZE, *clip.shape), torch.uint8),
            "frames": ((GROUP_SIZE,), torch.int64),
        }

    def __getitem__(self, key: tuple[int, list[float]]) -> dict:
        index, starts = key
        try:
            clips, frames = decode_windows(self.paths[index], starts, self.clip)
        except DecodeError as error:
            return {"error": str(error)}
        free = GROUP_SIZE - len(clips)
        rest = clips.new_zeros(free, *clips.shape[1:])
        return {
            "video": torch.cat([clips, rest]) if free else clips,
            "frames": torch.tensor(frames + [0] * free),
        }


class VideoFeatures(NamedTuple):
    """The features of a video's W windows."""

    starts: list[float]  # seconds
    ends: list[float]  # where the window ends, or the video if that is earlier
    frames: list[int]  # frames of each window that the video has; the rest repeats the last one
    features: np.ndarray  # float32 [W, 512 or 1024]
    black: list[int]  # windows in which every pixel is black, as when nothing can be decoded


class Outcome(NamedTuple):
    """The result for a video: its features, or None and the reason in one line."""

    index: int
    found: VideoFeatures | None
    error: str = ""


class VideosInWork:
    """The videos of strided_features that are being decoded and embedded."""

    def __init__(self, paths: Sequence[str | os.PathLike], windows: Windows):
        self.paths, self.windows = paths, windows
        self.videos: dict[int, VideoFeatures] = {}  # by index; features is None before the first
        self.submitted = deque()  # (index, first window) of the groups that are being decoded
        self.failed: deque[Outcome] = deque()

    def fail(self, index: int, error: str) -> None:
        self.videos.pop(index, None)
        self.failed.append(Outcome(index, None, describe_error(error, self.paths[index])))

    def submit_groups(self, probes: Iterable[dict]) -> Iterator[list]:
        """Yield keys of WindowGroups, one per batch. probes: the videos' Durations, in order."""
        for index, probe in enumerate(probes):
            if error := probe["errors"][0]:
                self.fail(index, error)
                continue
            duration = probe["seconds"].item()
            starts, seconds = self.windows.starts(duration), self.windows.clip.seconds
            ends = [round(min(start + seconds, duration), 6) for start in starts]
            self.videos[index] = VideoFeatures(starts, ends, [], None, [])
            for first in range(0, len(starts), GROUP_SIZE):
                if index not in self.videos:
                    break  # an earlier group of this video has failed
                self.submitted.append((index, first))
                yield [(index, starts[first : first + GROUP_SIZE])]

    def take_windows(self, groups: Iterable[dict]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, windows [W, 3, T, H, W]) of each group that was submitted."""
        for group in groups:
            index, first = self.submitted.popleft()
            if index not in self.videos:
                continue
            if error := group["errors"][0]:
                self.fail(index, error)
                continue
            video = self.videos[index]
            clips = group["video"][0, : len(video.starts) - first]
            video.frames.extend(group["frames"][0, : len(clips)].tolist())
            video.black.extend(k for k, window in enumerate(clips, first) if not window.any())
            yield index, clips

    def collect(self, features: Iterable[tuple[int, np.ndarray]]) -> Iterator[Outcome]:
        """Yield an Outcome per video. features: (index, feature) of each window, in order."""
        for index, feature in features:
            while self.failed:
                yield self.failed.popleft()
            if index not in self.videos:
                continue
            video = self.videos[index]
            if video.features is None:
                # One array per video. Many small ones between the freed batches of clips would
                # fragment the heap, so that memory would grow with the length of the video.
                empty = np.empty((len(video.starts), *feature.shape), feature.dtype)
                video = self.videos[index] = video._replace(features=empty)
                filled = 0
            video.features[filled] = feature
            filled += 1
            if filled == len(video.starts):
                if video.black:
                    counts = len(video.black), len(video.starts)
                    log.warning("%s: black windows: %d of %d", self.paths[index], *counts)
                yield Outcome(index, self.videos.pop(index))
        yield from self.failed


def strided_features(
    model: torch.nn.Module,
    paths: Sequence[str | os.PathLike],
    device: torch.device,
    windows: Windows,
    *,
    batch_size: int,
    workers: int,
    sample_timeout: float,
    mixed5c: bool = False,
) -> Iterator[Outcome]:
    """Compute the features of the windows of each video.

    Yields an Outcome per video, as soon as it is done. A video is decoded in one pass, GROUP_SIZE
    windows at a time, and batches continue from one video to the next. Memory, except for the
    features, does not depend on the length of the videos. The model must be in evaluation mode.
    """
    work = VideosInWork(paths, windows)
    probes = sample_batches(
        Durations(paths),
        ([index] for index in range(len(paths))),
        workers=min(1, workers),
        timeout=sample_timeout,
        prefetch=8,
    )
    groups = sample_batches(
        WindowGroups(paths, windows.clip),
        work.submit_groups(probes),
        workers=workers,
        timeout=sample_timeout,
    )
    with contextlib.closing(probes), contextlib.closing(groups):
        clips = work.take_windows(groups)
        yield from work.collect(
            window_features(model, clips, device, batch_size=batch_size, mixed5c=mixed5c)
        )


def track_progress(outcomes: Iterable[Outcome], total: int) -> Iterator[Outcome]:
    """Yield the outcomes, and show the number of videos done, of `total`, and the time left."""
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
