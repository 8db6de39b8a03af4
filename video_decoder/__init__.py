"""Decode clips of video files to uint8 tensors; the only module that knows FFmpeg.

Two backends give the same pixels, those of the command

    ffmpeg -ss START -t SECONDS -i FILE -filter_complex "[0:v]fps=..,crop=..,scale=..,hflip[o]"
           -map "[o]" -f rawvideo -pix_fmt rgb24 -

`ffmpeg` runs it, one process per window. `pyav` runs FFmpeg's libraries in process and redoes in
plain arithmetic what the command does with timestamps, so that it knows which frames are wanted
before it converts them.

There is no time limit here. Data workers have one, and an ffmpeg process ends with the
worker that started it.
"""

import math
import os
import stat
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from video_decoder.ffmpeg import (
    check_program,
    decode_whole_ffmpeg,
    decode_windows_ffmpeg,
    ffmpeg_program,
)
from video_decoder.filters import crop_filters
from video_decoder.limits import CONTAINERS, EXTENSIONS, MAX_PIXELS, DecodeError
from video_decoder.pyav import (
    check_decodable,
    decode_whole_pyav,
    decode_windows_pyav,
    open_container,
    put_picture,
    video_stream,
)

__all__ = [
    "BACKENDS",
    "CONTAINERS",
    "EXTENSIONS",
    "MAX_PIXELS",
    "ClipSpec",
    "DecodeError",
    "check_backend",
    "decode_clip",
    "decode_clips",
    "decode_frames",
    "ffmpeg_program",
    "probe_duration",
]

BACKENDS = ("pyav", "ffmpeg")


@dataclass(frozen=True)
class ClipSpec:
    """What a clip is, and the backend that decodes it.

    num_frames: frames of a clip. size: its height and width in pixels. fps: frames per second.
    """

    num_frames: int = 16
    size: int = 224
    fps: int = 5
    decoder: str = "pyav"

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of a clip's tensor, uint8 [3, num_frames, size, size]."""
        return 3, self.num_frames, self.size, self.size

    @property
    def options(self) -> dict:
        """The keyword arguments of decode_clip and decode_clips."""
        return {
            "fps": self.fps,
            "num_frames": self.num_frames,
            "size": self.size,
            "backend": self.decoder,
        }


def decode_clip(
    path,
    start,
    *,
    fps,
    num_frames,
    size,
    crop_only=False,
    crop=(0.5, 0.5),
    flip=False,
    backend="pyav",
):
    """Decode the `num_frames` frames, `fps` per second, that follow `start` (seconds).

    Returns uint8 [3, num_frames, size, size]. See decode_clips.
    """
    return decode_clips(
        path,
        [start],
        fps=fps,
        num_frames=num_frames,
        size=size,
        crop_only=crop_only,
        crop=crop,
        flip=flip,
        backend=backend,
    )[0]


def decode_clips(
    path,
    starts,
    *,
    fps,
    num_frames,
    size,
    crop_only=False,
    crop=(0.5, 0.5),
    flip=False,
    backend="pyav",
):
    """Decode several windows of one file: uint8 [len(starts), 3, num_frames, size, size].

    starts: seconds, at least 0, taken to the microsecond. fps: int, float or Fraction.
    crop_only: a size x size crop of the frame as it is; otherwise the largest square, scaled.
    crop: the fraction of the free width and height left of and above the crop.
    flip: mirror left to right.

    The frame is turned upright first where the file says so. A frame smaller than a crop_only
    crop has its short side scaled up to `size` first. An odd `size` is cut exactly (crop's
    `exact`), where plain FFmpeg would round it down. Frames missing at the end are black; a
    window past the end is all black. Of several video streams the first is decoded.

    Two kinds of file on which `pyav` is known to differ from `ffmpeg`: those that the container
    crops (MP4's clap, Matroska's PixelCrop; ffmpeg 7.1 and later obey it, PyAV does not show it),
    and, from there on, those whose picture size changes midway.

    Raises DecodeError where the file cannot be opened as a local video file or gives no frame
    at all, or if the ffmpeg program fails; ValueError for arguments out of range.
    """
    _check_backend_name(backend)
    starts = [_microseconds(start) for start in starts]
    if not 0 < fps < math.inf or num_frames < 1 or size < 1:
        raise ValueError(f"fps {fps}, num_frames {num_frames} and size {size} must be positive")
    fps = Fraction(fps).limit_denominator(100000)
    filters = crop_filters(size, crop_only, crop, flip)
    _check_regular_file(path)
    out = np.zeros((len(starts), 3, num_frames, size, size), np.uint8)
    decode = decode_windows_pyav if backend == "pyav" else decode_windows_ffmpeg
    shown = decode(path, starts, fps, filters, out)
    if not all(shown):
        check_decodable(path)
    return torch.from_numpy(out)


def decode_frames(path, *, size, crop_only=False, crop=(0.5, 0.5), backend="pyav"):
    """Decode the whole file at its own frame rate: uint8 [3, frames, size, size].

    The frame rate is made constant as the command (without -ss, -t and fps) does: frames are
    repeated or dropped where the timestamps ask for it. Arguments and errors as decode_clips.
    """
    _check_backend_name(backend)
    filters = crop_filters(size, crop_only, crop, False)
    _check_regular_file(path)
    decode = decode_whole_pyav if backend == "pyav" else decode_whole_ffmpeg
    pictures = decode(path, filters, size)
    if not len(pictures):
        check_decodable(path)
    out = np.empty((3, len(pictures), size, size), np.uint8)
    for number, picture in enumerate(pictures):
        put_picture(picture, out[:, number : number + 1])
    return torch.from_numpy(out)


def probe_duration(path):
    """The duration of a video file in seconds (float), as its container states it."""
    _check_regular_file(path)
    with open_container(path) as container:
        video_stream(path, container)
        if container.duration is None or container.duration < 0:
            raise DecodeError(f"{path}: the duration is not known")
        return container.duration / 1e6


def check_backend(backend):
    """Run a backend's program once, so that a broken one is found before the work starts.

    Raises DecodeError, one line, if the program cannot be run or is not ffmpeg. `pyav` has none.
    """
    _check_backend_name(backend)
    if backend == "ffmpeg":
        check_program()


def _check_backend_name(backend):
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown decoder backend {backend!r}; choose one of {', '.join(BACKENDS)}"
        )


def _microseconds(start):
    start = float(start)
    if not 0 <= start < 1e9:
        raise ValueError(f"start {start} must be a number of seconds, at least 0")
    return int(Decimal(repr(start)) * 1000000)  # cut, not rounded, as ffmpeg reads -ss


def _check_regular_file(path):
    """Nothing but a regular file is handed to FFmpeg: no URL, folder, pipe or device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise DecodeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(mode):
        raise DecodeError(f"{path}: not a regular file")
