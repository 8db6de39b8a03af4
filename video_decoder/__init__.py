"""Decode clips of video files to uint8 tensors; the only module that knows FFmpeg.

Two backends give the same pixels, those of the command

    ffmpeg -ss START -t SECONDS -i FILE -filter_complex "[0:v]fps=..,crop=..,scale=..,hflip[o]"
           -map "[o]" -f rawvideo -pix_fmt rgb24 -

`ffmpeg` runs it, one process per window. `pyav` runs FFmpeg's libraries in process and redoes in
plain arithmetic what the command does with timestamps, so that it knows which frames are wanted
before it converts them.

There is no time limit here. Data workers have one (workers.py), and an ffmpeg process ends with the
worker that started it.
"""

import bisect
import contextlib
import functools
import itertools
import math
import os
import shutil
import stat
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer

from utils import die_with_parent

BACKENDS = ("pyav", "ffmpeg")

# Demuxers of files that hold their own frames: no playlists, no image sequences, no devices.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
EXTENSIONS = {
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
# What a hostile header may make us allocate.
MAX_PIXELS = 8192 * 4608
MAX_BYTES = 1 << 30
TRIAL_SECONDS = 60  # for `ffmpeg -version`: a network file system may be slow at first
# The most copies FFmpeg makes of one frame to fill a gap in time; beyond that it drops the frame.
MAX_REPEATS = 30 * 3600 * 30

# The most that the short way of _pyav_windows holds of a file at once: packets, in bytes.
MAX_HELD = 64 << 20

# Where packets are known to carry their frame's time, and to be skippable (see _pyav_windows).
WITH_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
SKIPPABLE = ("h264", "hevc")

AVFMT_TS_DISCONT = 0x0200
AVFMT_SEEK_TO_PTS = 0x4000000


class DecodeError(Exception):
    """A file that cannot be decoded; one line that names the file and the reason."""


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
    filters = _crop_filters(size, crop_only, crop, flip)
    _check_regular_file(path)
    out = np.zeros((len(starts), 3, num_frames, size, size), np.uint8)
    decode = _pyav_windows if backend == "pyav" else _ffmpeg_windows
    shown = decode(path, starts, fps, filters, out)
    if not all(shown):
        _check_decodable(path)
    return torch.from_numpy(out)


def decode_frames(path, *, size, crop_only=False, crop=(0.5, 0.5), backend="pyav"):
    """Decode the whole file at its own frame rate: uint8 [3, frames, size, size].

    The frame rate is made constant as the command (without -ss, -t and fps) does: frames are
    repeated or dropped where the timestamps ask for it. Arguments and errors as decode_clips.
    """
    _check_backend_name(backend)
    filters = _crop_filters(size, crop_only, crop, False)
    _check_regular_file(path)
    decode = _pyav_whole if backend == "pyav" else _ffmpeg_whole
    pictures = decode(path, filters, size)
    if not len(pictures):
        _check_decodable(path)
    out = np.empty((3, len(pictures), size, size), np.uint8)
    for number, picture in enumerate(pictures):
        _put(picture, out[:, number : number + 1])
    return torch.from_numpy(out)


def probe_duration(path):
    """The duration of a video file in seconds (float), as its container states it."""
    _check_regular_file(path)
    with _open(path) as container:
        _video_stream(path, container)
        if container.duration is None or container.duration < 0:
            raise DecodeError(f"{path}: the duration is not known")
        return container.duration / 1e6


def check_backend(backend):
    """Run a backend's program once, so that a broken one is found before the work starts.

    Raises DecodeError, one line, if the program cannot be run or is not ffmpeg. `pyav` has none.
    """
    _check_backend_name(backend)
    if backend != "ffmpeg":
        return
    try:
        program = ffmpeg_program()
    except (ImportError, RuntimeError):
        raise DecodeError(
            "there is no ffmpeg program in PATH, nor one of the package imageio-ffmpeg"
        ) from None
    try:
        trial = subprocess.run(
            [program, "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TRIAL_SECONDS,
        )
    except OSError as error:
        raise DecodeError(f"cannot run {program}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise DecodeError(f"{program} did not print its version in {TRIAL_SECONDS} s") from None
    if trial.returncode:
        raise DecodeError(f"{program} {_ending(trial.returncode, trial.stderr)}")
    if not trial.stdout.startswith(b"ffmpeg version"):
        raise DecodeError(f"{program} did not print its version: it is not ffmpeg")


# --- arguments ------------------------------------------------------------------------------


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


def _crop_filters(size, crop_only, crop, flip):
    """The filters after fps, as (name, options) pairs. The first, which scales frames smaller
    than the crop, has a place only where it is needed: it changes how pixels are converted."""
    if size < 1:
        raise ValueError(f"size {size} must be positive")
    left, top = (float(fraction) for fraction in crop)
    if not (0 <= left <= 1 and 0 <= top <= 1):
        raise ValueError(f"crop {crop} must be two fractions from 0 to 1")
    if crop_only:
        enlarge = {
            "w": f"if(lte(iw,ih),{size},round(iw*{size}/ih))",
            "h": f"if(lte(iw,ih),round(ih*{size}/iw),{size})",
        }
        square = {"w": f"{size}", "h": f"{size}"}
        square |= {"x": f"(iw-{size})*{left!r}", "y": f"(ih-{size})*{top!r}"}
        if size % 2:
            square["exact"] = "1"
        filters = [("scale", enlarge), ("crop", square)]
    else:
        side = "min(iw,ih)"
        square = {"w": side, "h": side}
        square |= {"x": f"(iw-{side})*{left!r}", "y": f"(ih-{side})*{top!r}"}
        filters = [None, ("crop", square), ("scale", {"w": f"{size}", "h": f"{size}"})]
    return filters + [("hflip", {})] * bool(flip)


# --- timestamps: what the command does with them, in integers --------------------------------


def rescale(value, numerator, denominator):
    """value * numerator / denominator to the nearest integer, halves away from zero."""
    product = value * numerator
    magnitude = (2 * abs(product) + denominator) // (2 * denominator)
    return magnitude if product >= 0 else -magnitude


def fps_runs(num_frames):
    """The fps filter and the muxer's frame sync: which frame each output frame shows.

    Returns step(tick, frame), to be called with the frames in the order they are shown, where
    tick is a frame's time in output frames, rounded; and at the end with the tick at which the
    last frame ends (None: unknown) and the frame None. It returns None or (frame, first, end):
    output frames first..end-1 of 0..num_frames-1 show `frame`.
    Output frame n shows the last frame whose tick is at most n; those before the first, the first.
    """
    held = following = None
    first = 0

    def step(tick, frame):
        nonlocal held, following, first
        run = None
        if held is None:
            following = tick
            if frame is not None and tick + 1 > MAX_REPEATS:
                frame = None  # too long a gap to fill: never shown
        elif tick is not None and tick > following:
            run = held, first, min(tick, num_frames)
            first = following = tick
        held = frame
        return run if run and run[1] < run[2] else None

    return step


def constant_rate_runs(frames):
    """The muxer's frame sync where no fps filter ran (fftools' CFR video sync).

    frames: an iterable of (time, duration, frame), both in output frames (float). Yields
    (frame, copies): the output is `frame` so many times over.
    """
    following, history, previous = 0, [0, 0, 0], None
    for when, duration, frame in frames:
        early = when - following
        late = early + duration
        if early < 0 < late:
            early = 0.0
        copies, copies_of_previous = 1, 0
        if late < -1.1:
            copies = 0
        elif late > 1.1:
            copies = round(np.float32(late).item())
            if early > 1.1:
                copies_of_previous = round(np.float32(early - 0.6).item())
        history = [copies_of_previous, *history[:2]]
        if copies > MAX_REPEATS:
            copies = 0
        else:
            before = min(copies_of_previous, copies) if previous is not None else 0
            if before:
                yield previous, before
            if copies > before:
                yield frame, copies - before
        following += copies
        previous = frame
    if previous is not None:
        yield previous, sorted(history)[1]


def _exact_time(pts, time_base, rate):
    """A timestamp in output frames, with the fractional bits and the nudge of fftools."""
    bits = min(max(29 - (rate.numerator.bit_length() - 1), 0), 16)
    step = time_base * rate * (1 << bits)
    when = rescale(pts, step.numerator, step.denominator) / (1 << bits)
    if when != round(when):
        when += math.copysign(1 / (1 << 17), when)
    return when


# --- backend pyav -----------------------------------------------------------------------------


def _open(path):
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "file",
        "fflags": "-genpts",  # PyAV's default; the ffmpeg program does not ask for it
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        return av.open(f"file:{os.fspath(path)}", options=options, metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _video_stream(path, container):
    if not container.streams.video:
        raise DecodeError(f"{path}: no video stream")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise DecodeError(f"{path}: no decoder for its video stream")
    context.thread_count = 1  # workers decode in parallel; and skipping needs it
    context.flags |= 1  # crop exactly where the stream says, as the program does
    context.options = {"max_pixels": str(MAX_PIXELS)}
    return stream


def _seek(container, stream, start):
    """Seek as `ffmpeg -ss` does (None: no -ss); the offset (us) that puts START at time 0."""
    target = (start or 0) + (container.start_time or 0)
    flags = container.format.flags
    for other in container.streams:
        other.discard = av.stream.Discard.default  # which stream leads a seek depends on it
    if start is not None:
        reordered = any(
            other.codec_context and getattr(other.codec_context, "has_b_frames", False)
            for other in container.streams.video
        )
        early = 0 if flags & AVFMT_SEEK_TO_PTS or not reordered else 3 * 1000000 // 23
        with contextlib.suppress(av.error.FFmpegError):  # ffmpeg reads on from where it is
            container.seek(target - early)
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    if flags & AVFMT_TS_DISCONT and None not in (container.start_time, stream.start_time):
        first = rescale(stream.start_time * 1000000, *stream.time_base.as_integer_ratio())
        return -max(target, first)
    return -target


def _demux(container, stream):
    """The stream's packets up to the end of the file or, as ffmpeg has it, to a read error."""
    # IndexError: PyAV trips over streams that turn up after the header, once all is read.
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet


def _packets(container, stream, offset):
    """The stream's packets, their timestamps moved by `offset` (us) and mended as ffmpeg does:
    in formats whose clock may jump (MPEG-TS, MPEG-PS) jumps of over 10 s are closed; elsewhere
    timestamps over 30 hours away from the expected one are dropped."""
    numerator, denominator = stream.time_base.as_integer_ratio()
    per_tick = numerator * 1000000
    jumps = container.format.flags & AVFMT_TS_DISCONT
    rate = stream.average_rate
    step = rescale(1000000, rate.denominator, rate.numerator) if rate else 0
    offset = rescale(offset, denominator, per_tick)
    dts_us = next_us = None
    for packet in _demux(container, stream):
        pts, dts = packet.pts, packet.dts
        if pts is not None:
            pts += offset
        if dts is not None:
            dts += offset
        if dts is not None and jumps:
            now = rescale(dts, per_tick, denominator)
            delta = now - (next_us or 0)  # the first packet is held against START
            if abs(delta) > 10 * 1000000 or (dts_us is not None and now + 100000 < dts_us):
                shift = rescale(delta, denominator, per_tick)
                offset -= shift
                dts -= shift
                pts = None if pts is None else pts - shift
        elif dts is not None and next_us is not None:
            limit = 30 * 3600 * 1000000
            if abs(rescale(dts, per_tick, denominator) - next_us) > limit:
                dts = None
            if pts is not None and abs(rescale(pts, per_tick, denominator) - next_us) > limit:
                pts = None
        if next_us is None:
            delay = stream.codec_context.reorder_depth * step
            next_us = (rescale(pts, per_tick, denominator) if pts is not None else 0) - delay
        if dts is not None:
            next_us = rescale(dts, per_tick, denominator)
        dts_us = next_us
        next_us += rescale(packet.duration, per_tick, denominator) if packet.duration else step
        packet.pts, packet.dts = pts, dts
        yield packet


def _decoded(packets, context):
    """The frames of packets in the decoder's order. A damaged packet is skipped, as ffmpeg does."""
    for packet in itertools.chain(packets, [None]):
        try:
            yield from context.decode(packet)
        except av.error.FFmpegError:
            continue


def _frame_length(duration, pts, last, estimate, stream):
    """How long ffmpeg thinks a frame lasts (video_duration_estimate); only the last one's counts.

    last, estimate: the pts and length of the frame before it (None, 0: there is none)."""
    gap = pts - last if last is not None else -1
    if duration > 0 and not (duration == 1 and gap > 2):
        return duration
    if gap > 0 or duration > 0:
        return gap if gap > 0 else duration
    rate = stream.codec_context.framerate or stream.average_rate
    if rate:
        estimate = rescale(1, *(1 / (rate * stream.time_base)).as_integer_ratio())
    return max(estimate, 1)


def _timed_frames(packets, stream):
    """(pts, duration, frame) of a packet sequence, in the stream's time base, as ffmpeg's decoder
    thread gives them; finally (end of the last frame, 0, None)."""
    faulty_pts = faulty_dts = 0
    last_guess_pts = last_guess_dts = -math.inf
    last = None
    estimate = 0
    for frame in _decoded(packets, stream.codec_context):
        # libavcodec's guess between the two clocks of a frame (best_effort_timestamp).
        pts, dts = frame.pts, frame.dts
        if dts is not None:
            faulty_dts += dts <= last_guess_dts
            last_guess_dts = dts
        elif pts is not None:
            last_guess_dts = pts
        if pts is not None:
            faulty_pts += pts <= last_guess_pts
            last_guess_pts = pts
        elif dts is not None:
            last_guess_pts = dts
        if pts is None or (dts is not None and faulty_pts > faulty_dts):
            pts = dts
        if pts is None:
            pts = 0 if last is None else last + estimate
        estimate = _frame_length(frame.duration, pts, last, estimate, stream)
        last = pts
        yield pts, frame.duration, frame
    yield (None if last is None else last + estimate), 0, None


def _converter(path, filters):
    """A function from a decoded frame to an array [height, width, 3]: upright, cropped, scaled."""
    key = source = sink = graph = None

    def convert(frame):
        nonlocal key, source, sink, graph
        matrix = _display_matrix(frame)
        new_key = (frame.width, frame.height, frame.format.name, frame.colorspace)
        new_key += (frame.color_range, matrix)
        try:
            if new_key != key:
                graph, source, sink = _graph(frame, matrix, filters)
                key = new_key
            source.push(frame)
            picture = sink.pull()
        except av.error.FFmpegError as error:
            raise DecodeError(f"{path}: its frames cannot be converted: {error}") from None
        plane = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        return rows[:, : 3 * picture.width].reshape(picture.height, picture.width, 3)

    return convert


def _graph(frame, matrix, filters):
    """The filters of the command for frames like this one."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/1000",
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    turn = _upright_filters(matrix)
    enlarge, *others = filters
    if enlarge and min(frame.width, frame.height) < int(others[0][1]["w"]):
        others = [enlarge, *others]
    chain = [*turn, *others, ("format", {"pix_fmts": "rgb24"}), ("buffersink", {})]
    nodes = [source] + [graph.add(name, **options) for name, options in chain]
    graph.link_nodes(*nodes).configure()
    return graph, source, nodes[-1]


def _display_matrix(frame):
    """The nine integers of the file's rotation tag, or None."""
    # Not frame.side_data: the frame would keep it and, as it knows the frame, never be freed
    # before a garbage collection, pictures and all.
    side_data = SideDataContainer(frame)
    try:
        return struct.unpack("<9i", bytes(side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return None


def _upright_filters(matrix):
    """The filters ffmpeg puts first so that the picture stands upright (ffmpeg_filter.c)."""
    if matrix is None:
        return []
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return []
    angle = math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))
    angle = math.copysign(math.floor(abs(angle) + 0.5), angle)
    angle -= 360 * math.floor(angle / 360 + 0.9 / 360)
    if abs(angle - 90) < 1:
        return [("transpose", {"dir": "cclock_flip" if matrix[3] > 0 else "clock"})]
    if abs(angle - 180) < 1:
        return [("hflip", {})] * (matrix[0] < 0) + [("vflip", {})] * (matrix[4] < 0)
    if abs(angle - 270) < 1:
        return [("transpose", {"dir": "clock_flip" if matrix[3] < 0 else "cclock"})]
    if abs(angle) > 1:
        return [("rotate", {"angle": f"{angle:f}*PI/180"})]
    return [("vflip", {})] * (matrix[4] < 0)


def _pyav_windows(path, starts, fps, filters, clips):
    """Fill clips [N, 3, frames, size, size]; for each window, whether it shows any frame.

    Two ways. The short one knows from the packets' timestamps which frames are wanted and
    skips packets. It is taken by rule: H.264 or H.265 in MP4 or Matroska, every packet with a
    timestamp of its own, starting at a keyframe; and left, to start over the plain way, at the
    first sign of damage, interlacing or a wanted frame that does not come out. Everything else
    (AVI, MPEG-TS, MPEG-4 part 2, VP9, AV1, ...) goes the plain way: every frame from the keyframe
    on is decoded, and its time is taken after decoding. Both convert only the frames shown.
    """
    with _open(path) as container:
        stream = _video_stream(path, container)
        if stream.codec_context.name in SKIPPABLE and container.format.name in WITH_TIMES:
            shown = _windows_by_packets(path, container, stream, starts, fps, filters, clips)
            if shown is not None:
                return shown
            clips[:] = 0
    return _windows_by_frames(path, starts, fps, filters, clips)


def _windows_by_packets(path, container, stream, starts, fps, filters, clips):
    """The short way of _pyav_windows, in one pass for all windows; None where it ends early."""
    num_frames = clips.shape[2]
    shown = [False] * len(starts)
    try:
        runs, segments = _plan_windows(container, stream, starts, fps, num_frames)
        showings = {}  # pts -> the places that show it
        for window, pts, first, end in runs:
            shown[window] = True
            showings.setdefault(pts, []).append((window, first, end))
        convert = _converter(path, filters)
        for packets in segments:
            for frame in _wanted_frames(packets, showings, stream.codec_context):
                picture = convert(frame)
                for window, first, end in showings.pop(frame.pts):
                    _put(picture, clips[window, :, first:end])
    except _Surprise:
        return None
    return shown if not showings else None


class _Surprise(Exception):
    """The short way does not apply to this file."""


def _plan_windows(container, stream, starts, fps, num_frames):
    """What the windows show, and the packets it takes.

    Returns runs, (window, pts, first, end) as fps_runs gives them, and segments, lists of packets
    in decoding order, each starting at a keyframe."""
    units_per_us = (1000000 * stream.time_base).as_integer_ratio()[::-1]
    ticks_per_unit = (stream.time_base * fps).as_integer_ratio()
    context = stream.codec_context
    runs, segments, ended, held = [], [], False, 0
    for window in sorted(range(len(starts)), key=starts.__getitem__):
        offset = rescale(-starts[window] - (container.start_time or 0), *units_per_us)
        if not segments or not _covers(segments[-1], -offset, ended, context):
            _seek(container, stream, starts[window])
            source = container.demux(stream)
            packet = _next_packet(source)
            if packet is None or not packet.is_keyframe:
                raise _Surprise
            catching_up = bool(segments) and packet.pts in segments[-1]
            # A second seek may know more keyframes than a fresh one; with these it is no matter.
            if segments and not _refreshes(packet, context):
                raise _Surprise
            if not catching_up:
                segments.append({packet.pts: packet})
            ended = False
        segment = segments[-1]  # pts -> packet
        numerator, denominator = ticks_per_unit
        # The first pts that rounds to a tick past the clip's last.
        limit = -(-(2 * num_frames - 1) * denominator // (2 * numerator)) - offset
        spare, showing = 0, []
        while not showing or showing[-1][-1] < num_frames:
            # No packet follows more than 16 others whose frames are shown after its own. A clip
            # in a long gap may need more: the gap's length in ticks is not known before.
            spare = 2 * spare + 17
            after = sum(pts >= limit for pts in segment)
            while after < spare and not ended:
                packet = _next_packet(source)
                ended = packet is None
                if ended or (catching_up and packet.pts in segment):
                    continue
                catching_up = False
                if packet.pts in segment:
                    raise _Surprise
                segment[packet.pts] = packet
                after += packet.pts >= limit
                held += packet.size
                if held > MAX_HELD:
                    raise _Surprise
            showing = _show(segment, offset, ended, num_frames, ticks_per_unit, stream)
            if ended:
                break
        runs += [(window, *run) for run in showing]
    return runs, [list(segment.values()) for segment in segments]


def _show(segment, offset, ended, num_frames, ticks_per_unit, stream):
    """fps_runs over the packets (pts -> packet) from time -offset on; they may end the file."""
    times = sorted(pts for pts, packet in segment.items() if not packet.is_discard)
    times = times[bisect.bisect_left(times, -offset) :]
    if times and times[0] < next(iter(segment)):
        raise _Surprise  # shown before the keyframe: whether they come out is hard to say
    step, runs = fps_runs(num_frames), []
    for pts in times:
        run = step(rescale(pts + offset, *ticks_per_unit), pts)
        if run:
            runs.append(run)
            if run[-1] == num_frames:
                return runs
    if ended and times:
        last, before = times[-1], times[-2] if len(times) > 1 else None
        length = _frame_length(segment[last].duration or 0, last, before, 0, stream)
        run = step(rescale(last + length + offset, *ticks_per_unit), None)
        runs += [run] if run else []
    return runs


def _covers(segment, pts, ended, context):
    """Whether decoding this segment, or on from its end, gives what a seek to pts gives."""
    if not ended and pts > max(segment):
        return False
    keyframes = [packet for packet in list(segment.values())[1:] if packet.is_keyframe]
    keyframes = [packet for packet in keyframes if packet.pts <= pts]
    return not keyframes or _refreshes(keyframes[-1], context)


def _next_packet(source):
    """The next packet of a demuxer, None at the end of the file."""
    try:
        packet = next(source)
    except (StopIteration, av.error.FFmpegError):
        raise _Surprise from None
    if not packet.size and packet.dts is None:
        return None
    if not packet.size or packet.pts is None or packet.is_corrupt:
        raise _Surprise
    return packet


def _wanted_frames(packets, wanted, context):
    """The frames of `packets` (from a keyframe on, in decoding order) whose pts is in `wanted`."""
    # Frames that no other refers to are skipped. In H.265 the mark only speaks of its own layer.
    skipping = context.name == "h264" or all(_slice(packet, context)[1] == 1 for packet in packets)
    needed, group, end = [], [], 0
    for packet in packets:
        if packet.is_keyframe and _refreshes(packet, context):
            needed += group[:end]
            group, end = [], 0
        group.append(packet)
        if packet.pts in wanted:
            end = len(group)
    needed += group[:end]
    try:
        for packet in [*needed, None]:
            if packet is not None:
                skip = skipping and packet.pts not in wanted
                context.skip_frame = "NONREF" if skip else "DEFAULT"
            for frame in context.decode(packet):
                if frame.is_corrupt or frame.interlaced_frame:
                    raise _Surprise
                if frame.pts in wanted:
                    yield frame
        depth = context.reorder_depth
        context.flush_buffers()  # for the next segment; it may forget the depth
        context.reorder_depth = depth
    except av.error.FFmpegError:
        raise _Surprise from None


def _refreshes(packet, context):
    """Whether nothing before this packet is referred to from it on (an IDR picture)."""
    return _slice(packet, context)[0] in ((5,) if context.name == "h264" else (19, 20))


def _slice(packet, context):
    """The NAL unit type of a packet's first slice, and in H.265 its layer (temporal id plus 1).
    (0, 0) where there is none or the packet is not in the form MP4 and Matroska use."""
    h264 = context.name == "h264"
    extradata = context.extradata or b""
    if len(extradata) < (7 if h264 else 23) or extradata[0] != 1:
        return 0, 0
    prefix = 1 + (extradata[4 if h264 else 21] & 3)
    data, at = memoryview(packet), 0
    while at + prefix + 2 <= len(data):
        kind = data[at + prefix] & 31 if h264 else data[at + prefix] >> 1 & 63
        if 1 <= kind <= 5 if h264 else kind < 32:
            return kind, data[at + prefix + 1] & 7
        at += prefix + int.from_bytes(data[at : at + prefix], "big")
    return 0, 0


def _windows_by_frames(path, starts, fps, filters, clips):
    """The plain way of _pyav_windows: windows that start from the same packet share a pass."""
    shown = [False] * len(starts)
    convert = _converter(path, filters)
    passes = {}
    with _open(path) as container:
        # Where timestamps may jump (MPEG-TS, MPEG-PS) the windows' clocks could part.
        may_share = len(starts) > 1 and not container.format.flags & AVFMT_TS_DISCONT
    for window, start in enumerate(starts):
        landing = _landing(path, start) if may_share else None
        passes.setdefault(landing or window, []).append(window)
    for windows in passes.values():
        with _open(path) as container:
            stream = _video_stream(path, container)
            frames = _pass(container, stream, starts, windows, fps, clips.shape[2])
            for window, frame, first, end in frames:
                if frame[1] is None:
                    frame[1] = convert(frame[0])
                _put(frame[1], clips[window, :, first:end])
                shown[window] = True
    return shown


def _pass(container, stream, starts, windows, fps, num_frames):
    """One pass of the plain way: yields (window, [frame, None], first, end), the runs of fps_runs.
    A frame that several windows show comes in the same list each time."""
    units_per_us = (1000000 * stream.time_base).as_integer_ratio()[::-1]
    ticks_per_unit = (stream.time_base * fps).as_integer_ratio()
    longest = rescale(_window_length(num_frames, fps), *units_per_us)
    offset = _seek(container, stream, starts[windows[0]])
    base = rescale(offset, *units_per_us)
    delays = {window: starts[window] - starts[windows[0]] for window in windows}
    shifts = {window: rescale(offset - delays[window], *units_per_us) - base for window in windows}
    steps = {window: fps_runs(num_frames) for window in windows}
    begins = {}
    for pts, _, frame in _timed_frames(_packets(container, stream, offset), stream):
        holder = [frame, None] if frame else None
        for window, step in list(steps.items()):
            if pts is None:
                continue  # the end of no frame at all
            moved = pts + shifts[window]
            if frame and moved < 0:
                continue
            past = moved - begins.setdefault(window, moved) >= longest
            run = step(rescale(moved, *ticks_per_unit), None if past else holder)
            if run:
                yield window, *run
            if past or (run and run[-1] == num_frames):
                del steps[window]
        if not steps:
            return


def _landing(path, start):
    """The packet that a seek to `start` leads to: windows that share it share all that follow.
    None where it has no name to be told by."""
    with _open(path) as container:
        stream = _video_stream(path, container)
        _seek(container, stream, start)
        packet = next(_demux(container, stream), None)
        if packet is None or packet.dts is None:
            return None
        return packet.pts, packet.dts, packet.pos


def _window_length(num_frames, fps):
    """The -t of the command, in microseconds."""
    return round((num_frames / fps + Fraction(1, 10)) * 1000000)


def _put(picture, places):
    """Copy a picture [height, width, 3] to each of places [3, n, height, width]."""
    for channel in range(3):  # three copies of a plane are quicker than one with its axes moved
        places[channel] = picture[:, :, channel]


def _pyav_whole(path, filters, size):
    """The pictures of the whole file, [size, size, 3] each."""
    with _open(path) as container:
        stream = _video_stream(path, container)
        packets = _packets(container, stream, _seek(container, stream, None))
        rate = stream.guessed_rate or Fraction(25)
        usual = 1 / (rate * stream.time_base)

        def timed():
            for pts, duration, frame in _timed_frames(packets, stream):
                if frame is not None:
                    length = duration or rescale(1, usual.numerator, usual.denominator)
                    length = float(length * stream.time_base * rate)
                    yield _exact_time(pts, stream.time_base, rate), length, frame

        convert = _converter(path, filters)
        pictures, last = [], None
        for frame, copies in constant_rate_runs(timed()):
            if frame is not last:
                picture, last = convert(frame), frame
            if (len(pictures) + copies) * 3 * size * size > MAX_BYTES:
                raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
            pictures += [picture] * copies
        return pictures


def _check_decodable(path):
    """Raise DecodeError unless the file gives at least one frame, read from its start."""
    with _open(path) as container:
        stream = _video_stream(path, container)
        packets = _packets(container, stream, _seek(container, stream, None))
        for _, _, frame in _timed_frames(packets, stream):
            if frame is None:
                raise DecodeError(f"{path}: no frame of it can be decoded")
            return


# --- backend ffmpeg ---------------------------------------------------------------------------


def ffmpeg_program():
    program = shutil.which("ffmpeg")
    if program is None:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    return program


def _ffmpeg_pixels(path, rate, filters, limit, **seek):
    """The first `limit` bytes of what the command writes."""
    import ffmpeg

    with _open(path) as container:  # both backends refuse the same files
        _video_stream(path, container)
        demuxer = container.format.name.split(",")[0]
    for enlarge in (False, True) if filters[0] else (False,):
        source = ffmpeg.input(
            f"file:{os.fspath(path)}",
            format=demuxer,
            format_whitelist=CONTAINERS,
            protocol_whitelist="file",
            max_pixels=MAX_PIXELS,
            threads=1,  # what damage does to a picture must not depend on the number of cores
            **seek,
        )
        video = source["v"]
        for name, options in [*rate, *filters[not enlarge :]]:
            video = video.filter(name, **options)
        output = video.output("pipe:", format="rawvideo", pix_fmt="rgb24")
        command = output.compile(ffmpeg_program())
        # Of a damaged file the frames that can be decoded count, however few. By default the
        # program exits with 69 if more than two thirds of the packets cannot be decoded.
        tolerant = ["-max_error_rate", "1"]
        command[1:1] = ["-v", "error", "-nostdin", "-filter_complex_threads", "1", *tolerant]
        pixels, status, messages = _run(path, command, limit)
        if b"Invalid too big or non positive size" not in messages:
            break  # otherwise frames were smaller than the crop
    if status:
        raise DecodeError(f"{path}: the ffmpeg program {_ending(status, messages)}")
    if b"Cannot allocate memory" in messages:  # it may drop the frames and exit with 0
        raise DecodeError(f"{path}: the ffmpeg program ran out of memory")
    return pixels


def _run(path, command, limit):
    """Run a command: the first `limit` bytes it writes, its exit status and its messages.

    It is ended once it has written as many; the status is then 0. It does not outlive this process.
    """
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        except OSError as error:
            raise DecodeError(f"{path}: cannot run {command[0]}: {error.strerror}") from None
        try:
            pixels = process.stdout.read(limit)
            if len(pixels) < limit:
                process.wait()
        finally:
            process.stdout.close()
            process.kill()
            status = process.wait()
        size = errors.seek(0, os.SEEK_END)
        errors.seek(0)
        messages = errors.read(1 << 20)
        errors.seek(max(len(messages), size - 4096))  # the end, for its last line
        return pixels, status if len(pixels) < limit else 0, messages + errors.read()


def _ending(status, messages):
    """How a program ended that failed, and the last line of its messages (bytes)."""
    how = f"crashed (signal {-status})" if status < 0 else f"exited with status {status}"
    lines = messages.decode("utf-8", "replace").split("\n")
    last = next((line for line in map(_one_line, reversed(lines)) if line), "no message")
    return f"{how}: {last}"


def _one_line(text):
    """A program's message without control characters, not too long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def _ffmpeg_windows(path, starts, fps, filters, clips):
    """Fill clips [N, 3, frames, size, size]; for each window, whether it shows any frame."""
    num_frames, size = clips.shape[2:4]
    # trim only ends the command early: a damaged clock could ask for a million repeats.
    rate = [("fps", {"fps": str(fps)}), ("trim", {"end_frame": num_frames})]
    shown = []
    for start, clip in zip(starts, clips, strict=True):
        seek = {"ss": f"{start}us", "t": f"{_window_length(num_frames, fps)}us"}
        pixels = _ffmpeg_pixels(path, rate, filters, clip.size, **seek)
        frames = _as_frames(path, pixels, size)
        for number, frame in enumerate(frames):
            _put(frame, clip[:, number : number + 1])
        shown.append(len(frames) > 0)
    return shown


def _ffmpeg_whole(path, filters, size):
    """The pictures of the whole file, [frames, size, size, 3]."""
    pixels = _ffmpeg_pixels(path, [], filters, MAX_BYTES + 1)
    if len(pixels) > MAX_BYTES:
        raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
    return _as_frames(path, pixels, size)


def _as_frames(path, pixels, size):
    """The bytes of whole pictures as an array [frames, size, size, 3]."""
    if len(pixels) % (3 * size * size):
        raise DecodeError(f"{path}: the ffmpeg program stopped in the middle of a frame")
    return np.frombuffer(pixels, np.uint8).reshape(-1, size, size, 3)
