"""Decode clips of video files to uint8 tensors; the only package that uses FFmpeg.

Two backends give the same pixels, those of the command

    ffmpeg -ss START -t SECONDS -i FILE -filter_complex "[0:v]fps=..,crop=..,scale=..,hflip[o]"
           -map "[o]" -f rawvideo -pix_fmt rgb24 -

`ffmpeg` runs it, one process per window. `pyav` runs FFmpeg's libraries in process. It repeats
the command's timestamp arithmetic, so it knows which frames are displayed before it converts them.

Decoding has no time limit of its own: the data workers have one. If a worker is killed, its
ffmpeg process is killed too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch

from s3dg import to_unit_range
from video_decoder.ffmpeg import (
    check_program,
    decode_whole_ffmpeg,
    decode_windows_ffmpeg,
    ffmpeg_program,
)
from video_decoder.filters import crop_filters
from video_decoder.limits import CONTAINERS, EXTENSIONS, MAX_PIXELS, DecodeError, FilePath
from video_decoder.pyav import (
    check_decodable,
    copy_picture,
    decode_whole_pyav,
    decode_windows_pyav,
    open_video,
)
from video_decoder.shards import (
    MemberFile,
    Source,
    find_source,
    find_video,
    is_shard,
    locate,
    video_exists,
    walk_files,
)

__all__ = [
    "BACKENDS",
    "CONTAINERS",
    "EXTENSIONS",
    "MAX_PIXELS",
    "ClipSpec",
    "DecodeError",
    "MemberFile",
    "Source",
    "check_backend",
    "decode_clip",
    "decode_clips",
    "decode_frames",
    "decode_windows",
    "ffmpeg_program",
    "find_source",
    "find_video",
    "is_shard",
    "locate",
    "preprocess",
    "probe_duration",
    "probe_size",
    "video_exists",
    "walk_files",
]

BACKENDS = ("pyav", "ffmpeg")


@dataclass(frozen=True)
class ClipSpec:
    """The shape and frame rate of clips, and the backend that decodes them.

    num_frames: frames per clip. size: height and width in pixels. fps: frames per second.
    """

    num_frames: int = 16
    size: int = 224
    fps: float | Fraction = 5
    decoder: str = "pyav"

    @property
    def seconds(self) -> float:
        """Return the length of a clip in seconds."""
        return self.num_frames / self.fps

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return the shape of a clip's tensor, uint8 [3, num_frames, size, size]."""
        return 3, self.num_frames, self.size, self.size

    @property
    def options(self) -> dict:
        """Return the keyword arguments of decode_clip and decode_clips."""
        return {
            "fps": self.fps,
            "num_frames": self.num_frames,
            "size": self.size,
            "backend": self.decoder,
        }


def decode_clip(
    path: FilePath,
    start: float,
    *,
    fps: float | Fraction,
    num_frames: int,
    size: int,
    crop_only: bool = False,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    backend: str = "pyav",
) -> torch.Tensor:
    """Decode one clip: `num_frames` frames at `fps` per second, from `start` (seconds).

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
    path: FilePath,
    starts: Iterable[float],
    *,
    fps: float | Fraction,
    num_frames: int,
    size: int,
    crop_only: bool = False,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    backend: str = "pyav",
) -> torch.Tensor:
    """Decode several windows of one file: uint8 [len(starts), 3, num_frames, size, size].

    starts: seconds, at least 0, truncated to microseconds. fps: frames per second.
    crop_only: crop size x size pixels of the unscaled frame; otherwise scale the largest square.
    crop: position of the crop (left, top), from 0 to 1; (0.5, 0.5) is the centre.
    flip: mirror left to right.

    Frames are rotated upright first, if the file has a rotation tag. With crop_only, a frame
    smaller than the crop is enlarged until its short side is `size`. An odd `size` is exact (the
    crop filter's `exact` option); by default, FFmpeg would round it down. Frames past the end of
    the video are black. If there are several video streams, the first is decoded.

    docs/decoding.md lists the files on which the backends differ.

    Raises DecodeError if the file cannot be opened as a local video file or has no decodable
    frame, or if the ffmpeg program fails; ValueError for arguments out of range.
    """
    return _decode(path, starts, ClipSpec(num_frames, size, fps, backend), crop_only, crop, flip)[0]


def preprocess(path: FilePath, start: float = 0, clip: ClipSpec = ClipSpec()) -> torch.Tensor:
    """Decode one clip to the model's input, float32 [3, num_frames, size, size] in [0, 1].

    As in the evaluations, the central square of each frame is scaled. start: seconds. Raises the
    errors of decode_clips.
    """
    return to_unit_range(decode_clip(path, start, **clip.options))


def decode_windows(
    path: FilePath, starts: Iterable[float], clip: ClipSpec
) -> tuple[torch.Tensor, list[int]]:
    """Decode windows like decode_clips, but pad them with their last frame instead of black ones.

    Returns uint8 [len(starts), 3, num_frames, size, size] and the number of frames before the
    padding of each window. A window past the end has none, and is black.
    """
    clips, counts = _decode(path, starts, clip)
    for window, count in zip(clips, counts, strict=True):
        if 0 < count < clip.num_frames:
            window[:, count:] = window[:, count - 1 : count]
    return clips, counts


def _decode(
    path: FilePath,
    starts: Iterable[float],
    clip: ClipSpec,
    crop_only: bool = False,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
) -> tuple[torch.Tensor, list[int]]:
    """Implement decode_clips; also return the number of frames that each window has."""
    num_frames, size, fps = clip.num_frames, clip.size, clip.fps
    _check_backend_name(clip.decoder)
    starts = [_to_microseconds(start) for start in starts]
    if not 0 < fps < math.inf or num_frames < 1 or size < 1:
        raise ValueError(f"fps {fps}, num_frames {num_frames} and size {size} must be positive")
    fps = Fraction(fps).limit_denominator(100000)
    filters = crop_filters(size, crop_only, crop, flip)
    out = np.zeros((len(starts), *clip.shape), np.uint8)
    decode = decode_windows_pyav if clip.decoder == "pyav" else decode_windows_ffmpeg
    counts = decode(path, starts, fps, filters, out)
    if 0 in counts:
        check_decodable(path)
    return torch.from_numpy(out), counts


def decode_frames(
    path: FilePath,
    *,
    size: int,
    crop_only: bool = False,
    crop: tuple[float, float] = (0.5, 0.5),
    backend: str = "pyav",
) -> torch.Tensor:
    """Decode the whole file at its own frame rate: uint8 [3, frames, size, size].

    Without -ss, -t and the fps filter, the command still makes the frame rate constant: it repeats
    and drops frames as the timestamps require. Arguments and errors are those of decode_clips.
    """
    _check_backend_name(backend)
    filters = crop_filters(size, crop_only, crop, False)
    decode = decode_whole_pyav if backend == "pyav" else decode_whole_ffmpeg
    pictures = decode(path, filters, size)
    if not len(pictures):
        check_decodable(path)
    out = np.empty((3, len(pictures), size, size), np.uint8)
    for number, picture in enumerate(pictures):
        copy_picture(picture, out[:, number : number + 1])
    return torch.from_numpy(out)


def probe_duration(path: FilePath) -> float:
    """Return the duration of a video file in seconds, as stated by its container.

    Raises DecodeError if it is not a video file or the duration is not known.
    """
    with open_video(path) as stream:
        duration = stream.container.duration
    if duration is None or duration < 0:
        raise DecodeError(f"{path}: the duration is not known")
    return duration / 1e6


def probe_size(path: FilePath) -> tuple[int, int]:
    """Return the width and height of a video's frames, in pixels, before they are rotated upright.

    Raises DecodeError if it is not a video file.
    """
    with open_video(path) as stream:
        return stream.codec_context.width, stream.codec_context.height


def check_backend(backend: str) -> None:
    """Run a backend's program once, to find a broken one before the work starts.

    Raises DecodeError (one line) if the program cannot be run or is not ffmpeg. `pyav` has no
    program.
    """
    _check_backend_name(backend)
    if backend == "ffmpeg":
        check_program()


def _check_backend_name(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown decoder backend {backend!r}; choose one of {', '.join(BACKENDS)}"
        )


def _to_microseconds(start: float) -> int:
    """Convert seconds to microseconds. Raises ValueError if they are out of range."""
    start = float(start)
    if not 0 <= start < 1e9:
        raise ValueError(f"start {start} must be a number of seconds, at least 0")
    return int(Decimal(repr(start)) * 1000000)  # truncated, as ffmpeg parses -ss
