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

from distributed.device import PRECISIONS, check_compiler, inference_amp
from distributed.workers import describe_error, sample_batches
from s3dg import fuse_for_inference, load_model, to_unit_range
from utils import check_clip_size, check_file, input_error, lines_above, log
from video_decoder import DecodeError, decode_clips, probe_duration

# Windows that are decoded at once: what a worker holds, however long the video. Each group opens
# the file anew and decodes from the keyframe before it, so fewer would cost time.
CHUNK = 16
LOG_EVERY = 60  # seconds, where there is no terminal for a progress bar


def clip_batches(items, batch_size):
    """Windows of successive videos in batches: (owners, uint8 [batch_size or fewer, 3, T, H, W]).

    items: (owner, windows [W, 3, T, H, W]) pairs. At most batch_size windows are held, and what one
    video has over, so memory does not grow with the number of windows.
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
def window_features(model, items, device, *, batch_size, mixed5c=False):
    """Features of windows, as they are ready: yields (owner, float array [512 or 1024]).

    items: see clip_batches. The model is to be in evaluation mode.
    """
    for owners, clips in clip_batches(items, batch_size):
        output = model(to_unit_range(clips.to(device)), None, mode="video", mixed5c=mixed5c)
        yield from zip(owners, output.float().cpu().numpy(), strict=True)


def video_features(
    model,
    dataset,
    device,
    *,
    batch_size,
    workers,
    sample_timeout,
    mixed5c=False,
    rank=0,
    world_size=1,
    gather=lambda share: [share],
    on_windows=lambda index, windows: None,
    on_video=lambda: False,
):
    """Features of each video's windows: a dict from index to float array [W, 512 or 1024].

    Videos that cannot be decoded are named in the log and have no entry. With several ranks each
    takes every world_size-th video, and all of them get the whole, by gather, which lists what
    the ranks give it. on_windows gets the index and the windows, uint8 [W, 3, T, H, W], of each
    video that this rank has decoded. on_video is called after each video; where it says True on any
    rank, the evaluation is broken off, and None returned.
    """
    share = range(rank, len(dataset), world_size)
    videos = sample_batches(
        dataset,
        ([index] for index in share),
        workers=workers,
        timeout=sample_timeout,
    )

    def decoded():
        # No bar where there is no terminal: a log is not for it, and may be on a full disk.
        hidden = True if rank > 0 else None
        bar = tqdm(share, desc=type(dataset).__name__, unit="video", disable=hidden)
        with bar, lines_above(bar):
            for index, video in zip(bar, videos, strict=True):
                if error := video["errors"][0]:
                    reason = describe_error(error, dataset.path(index))
                    log.warning("left out of the evaluation: %s", reason)
                else:
                    windows = video["video"][0]
                    on_windows(index, windows)
                    yield index, windows
                nonlocal stopped
                stopped = on_video()
                if stopped:
                    return

    was_training = model.training
    model.eval()
    features, stopped = {}, False
    with contextlib.closing(videos):
        windows = window_features(model, decoded(), device, batch_size=batch_size, mixed5c=mixed5c)
        for owner, feature in windows:
            features.setdefault(owner, []).append(feature)
    model.train(was_training)
    features = {owner: np.stack(windows) for owner, windows in features.items()}
    shares = gather(None if stopped else features)
    if None in shares:
        return None
    return dict(sorted(item for share in shares for item in share.items()))


def inference_model(args, device, weights="pretrain_cnn_path"):
    """The model of --pretrain_cnn_path, or of another flag, as the evaluations use it."""
    if args.compile:
        with input_error("--compile"):
            check_compiler()
    check_file(getattr(args, weights), weights)
    with input_error(f"--{weights}"):
        model = load_model(getattr(args, weights))
    check_clip_size(args, model)
    if args.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model = fuse_for_inference(model.to(device), PRECISIONS[inference_amp(args.amp)])
    if args.compile:
        model.compile()
    return model


def strided_starts(duration, *, num_frames, fps, stride):
    """Where the windows of a video of `duration` seconds start: a list of seconds, at least [0.0].

    To the microsecond, as video files count: sums of floats would lose a window that just fits.
    """
    step = max(1, round(stride * 1e6))
    free = round(duration * 1e6) - round(num_frames / fps * 1e6)
    return [k * step / 1e6 for k in range(max(0, free) // step + 1)]


class Durations(Dataset):
    """How long videos are: items "seconds", float64 [], or "error" with one line."""

    item_spec = {"seconds": ((), torch.float64)}  # noqa: RUF012

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
        self.item_spec = {"video": ((CHUNK, 3, num_frames, size, size), torch.uint8)}

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
        prefetch=8,
    )

    def keys():
        for index, item in enumerate(probes):
            if error := item["errors"][0]:
                failed.append((index, describe_error(error, paths[index])))
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
                failed.append((index, describe_error(error, paths[index])))
                continue
            video = work[index]
            clips = item["video"][0, : len(video.starts) - first]
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
