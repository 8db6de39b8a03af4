"""Backend `pyav`: FFmpeg's libraries in process."""

import bisect
import contextlib
import itertools
import math
import os
from fractions import Fraction

import av

from video_decoder.filters import build_converter
from video_decoder.limits import CONTAINERS, MAX_BYTES, MAX_PIXELS, DecodeError
from video_decoder.timing import constant_rate_runs, exact_time, fps_runs, rescale, window_length

# The most that the fast path of decode_windows_pyav holds of a file at once: packets, in bytes.
MAX_HELD = 64 << 20
# Where packets are known to carry their frame's time, and to be skippable: see fast_path.
WITH_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
SKIPPABLE = ("h264", "hevc")
AVFMT_TS_DISCONT = 0x0200
AVFMT_SEEK_TO_PTS = 0x4000000


def open_container(path):
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


def video_stream(path, container):
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


def seek(container, stream, start):
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


def demux(container, stream):
    """The stream's packets up to the end of the file or, as ffmpeg has it, to a read error."""
    # IndexError: PyAV trips over streams that turn up after the header, once all is read.
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if packet.size:
                yield packet


def read_packets(container, stream, offset):
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
    for packet in demux(container, stream):
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


def decode_packets(packets, context):
    """The frames of packets in the decoder's order. A damaged packet is skipped, as ffmpeg does."""
    for packet in itertools.chain(packets, [None]):
        try:
            yield from context.decode(packet)
        except av.error.FFmpegError:
            continue


def frame_length(duration, pts, last, estimate, stream):
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


def timed_frames(packets, stream):
    """(pts, duration, frame) of a packet sequence, in the stream's time base, as ffmpeg's decoder
    thread gives them; finally (end of the last frame, 0, None)."""
    faulty_pts = faulty_dts = 0
    last_guess_pts = last_guess_dts = -math.inf
    last = None
    estimate = 0
    for frame in decode_packets(packets, stream.codec_context):
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
        estimate = frame_length(frame.duration, pts, last, estimate, stream)
        last = pts
        yield pts, frame.duration, frame
    yield (None if last is None else last + estimate), 0, None


def decode_windows_pyav(path, starts, fps, filters, clips):
    """Fill clips [N, 3, frames, size, size]; for each window, whether it shows any frame.

    Two ways. The short one knows from the packets' timestamps which frames are wanted and
    skips packets. It is taken by rule: H.264 or H.265 in MP4 or Matroska, every packet with a
    timestamp of its own, starting at a keyframe; and left, to start over the slow path, at the
    first sign of damage, interlacing or a wanted frame that does not come out. Everything else
    (AVI, MPEG-TS, MPEG-4 part 2, VP9, AV1, ...) goes the slow path: every frame from the keyframe
    on is decoded, and its time is taken after decoding. Both convert only the frames shown.
    """
    with open_container(path) as container:
        stream = video_stream(path, container)
        if stream.codec_context.name in SKIPPABLE and container.format.name in WITH_TIMES:
            shown = fast_path(path, container, stream, starts, fps, filters, clips)
            if shown is not None:
                return shown
            clips[:] = 0
    return slow_path(path, starts, fps, filters, clips)


def fast_path(path, container, stream, starts, fps, filters, clips):
    """Decode all windows in one pass, by the packets' times; None if the file is not fit for it."""
    num_frames = clips.shape[2]
    shown = [False] * len(starts)
    try:
        runs, segments = plan_windows(container, stream, starts, fps, num_frames)
        showings = {}  # pts -> the places that show it
        for window, pts, first, end in runs:
            shown[window] = True
            showings.setdefault(pts, []).append((window, first, end))
        convert = build_converter(path, filters)
        for packets in segments:
            for frame in decode_wanted(packets, showings, stream.codec_context):
                picture = convert(frame)
                for window, first, end in showings.pop(frame.pts):
                    put_picture(picture, clips[window, :, first:end])
    except FastPathUnavailable:
        return None
    return shown if not showings else None


class FastPathUnavailable(Exception):
    """The fast path does not apply to this file."""


def plan_windows(container, stream, starts, fps, num_frames):
    """What the windows show, and the packets it takes.

    Returns runs, (window, pts, first, end) as fps_runs gives them, and segments, lists of packets
    in decoding order, each starting at a keyframe."""
    units_per_us = (1000000 * stream.time_base).as_integer_ratio()[::-1]
    ticks_per_unit = (stream.time_base * fps).as_integer_ratio()
    context = stream.codec_context
    runs, segments, ended, held = [], [], False, 0
    for window in sorted(range(len(starts)), key=starts.__getitem__):
        offset = rescale(-starts[window] - (container.start_time or 0), *units_per_us)
        if not segments or not covers(segments[-1], -offset, ended, context):
            seek(container, stream, starts[window])
            source = container.demux(stream)
            packet = next_packet(source)
            if packet is None or not packet.is_keyframe:
                raise FastPathUnavailable
            catching_up = bool(segments) and packet.pts in segments[-1]
            # A second seek may know more keyframes than a fresh one; with these it is no matter.
            if segments and not starts_afresh(packet, context):
                raise FastPathUnavailable
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
                packet = next_packet(source)
                ended = packet is None
                if ended or (catching_up and packet.pts in segment):
                    continue
                catching_up = False
                if packet.pts in segment:
                    raise FastPathUnavailable
                segment[packet.pts] = packet
                after += packet.pts >= limit
                held += packet.size
                if held > MAX_HELD:
                    raise FastPathUnavailable
            showing = plan_showing(segment, offset, ended, num_frames, ticks_per_unit, stream)
            if ended:
                break
        runs += [(window, *run) for run in showing]
    return runs, [list(segment.values()) for segment in segments]


def plan_showing(segment, offset, ended, num_frames, ticks_per_unit, stream):
    """fps_runs over the packets (pts -> packet) from time -offset on; they may end the file."""
    times = sorted(pts for pts, packet in segment.items() if not packet.is_discard)
    times = times[bisect.bisect_left(times, -offset) :]
    if times and times[0] < next(iter(segment)):
        raise FastPathUnavailable  # shown before the keyframe: whether they come out is hard to say
    step, runs = fps_runs(num_frames), []
    for pts in times:
        run = step(rescale(pts + offset, *ticks_per_unit), pts)
        if run:
            runs.append(run)
            if run[-1] == num_frames:
                return runs
    if ended and times:
        last, before = times[-1], times[-2] if len(times) > 1 else None
        length = frame_length(segment[last].duration or 0, last, before, 0, stream)
        run = step(rescale(last + length + offset, *ticks_per_unit), None)
        runs += [run] if run else []
    return runs


def covers(segment, pts, ended, context):
    """Whether decoding this segment, or on from its end, gives what a seek to pts gives."""
    if not ended and pts > max(segment):
        return False
    keyframes = [packet for packet in list(segment.values())[1:] if packet.is_keyframe]
    keyframes = [packet for packet in keyframes if packet.pts <= pts]
    return not keyframes or starts_afresh(keyframes[-1], context)


def next_packet(source):
    """The next packet of a demuxer, None at the end of the file."""
    try:
        packet = next(source)
    except (StopIteration, av.error.FFmpegError):
        raise FastPathUnavailable from None
    if not packet.size and packet.dts is None:
        return None
    if not packet.size or packet.pts is None or packet.is_corrupt:
        raise FastPathUnavailable
    return packet


def decode_wanted(packets, wanted, context):
    """The frames of `packets` (from a keyframe on, in decoding order) whose pts is in `wanted`."""
    # Frames that no other refers to are skipped. In H.265 the mark only speaks of its own layer.
    skipping = context.name == "h264" or all(
        parse_slice(packet, context)[1] == 1 for packet in packets
    )
    needed, group, end = [], [], 0
    for packet in packets:
        if packet.is_keyframe and starts_afresh(packet, context):
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
                    raise FastPathUnavailable
                if frame.pts in wanted:
                    yield frame
        depth = context.reorder_depth
        context.flush_buffers()  # for the next segment; it may forget the depth
        context.reorder_depth = depth
    except av.error.FFmpegError:
        raise FastPathUnavailable from None


def starts_afresh(packet, context):
    """Whether nothing before this packet is referred to from it on (an IDR picture)."""
    return parse_slice(packet, context)[0] in ((5,) if context.name == "h264" else (19, 20))


def parse_slice(packet, context):
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


def slow_path(path, starts, fps, filters, clips):
    """Decode every frame from the keyframe on; windows from the same packet share a pass."""
    shown = [False] * len(starts)
    convert = build_converter(path, filters)
    passes = {}
    with open_container(path) as container:
        # Where timestamps may jump (MPEG-TS, MPEG-PS) the windows' clocks could part.
        may_share = len(starts) > 1 and not container.format.flags & AVFMT_TS_DISCONT
    for window, start in enumerate(starts):
        landing = find_landing(path, start) if may_share else None
        passes.setdefault(landing or window, []).append(window)
    for windows in passes.values():
        with open_container(path) as container:
            stream = video_stream(path, container)
            frames = run_pass(container, stream, starts, windows, fps, clips.shape[2])
            for window, frame, first, end in frames:
                if frame[1] is None:
                    frame[1] = convert(frame[0])
                put_picture(frame[1], clips[window, :, first:end])
                shown[window] = True
    return shown


def run_pass(container, stream, starts, windows, fps, num_frames):
    """One pass of the slow path: yields (window, [frame, None], first, end), the runs of fps_runs.
    A frame that several windows show comes in the same list each time."""
    units_per_us = (1000000 * stream.time_base).as_integer_ratio()[::-1]
    ticks_per_unit = (stream.time_base * fps).as_integer_ratio()
    longest = rescale(window_length(num_frames, fps), *units_per_us)
    offset = seek(container, stream, starts[windows[0]])
    base = rescale(offset, *units_per_us)
    delays = {window: starts[window] - starts[windows[0]] for window in windows}
    shifts = {window: rescale(offset - delays[window], *units_per_us) - base for window in windows}
    steps = {window: fps_runs(num_frames) for window in windows}
    begins = {}
    for pts, _, frame in timed_frames(read_packets(container, stream, offset), stream):
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


def find_landing(path, start):
    """The packet that a seek to `start` leads to: windows that share it share all that follow.
    None where it has no name to be told by."""
    with open_container(path) as container:
        stream = video_stream(path, container)
        seek(container, stream, start)
        packet = next(demux(container, stream), None)
        if packet is None or packet.dts is None:
            return None
        return packet.pts, packet.dts, packet.pos


def put_picture(picture, places):
    """Copy a picture [height, width, 3] to each of places [3, n, height, width]."""
    for channel in range(3):  # three copies of a plane are quicker than one with its axes moved
        places[channel] = picture[:, :, channel]


def decode_whole_pyav(path, filters, size):
    """The pictures of the whole file, [size, size, 3] each."""
    with open_container(path) as container:
        stream = video_stream(path, container)
        packets = read_packets(container, stream, seek(container, stream, None))
        rate = stream.guessed_rate or Fraction(25)
        usual = 1 / (rate * stream.time_base)

        def timed():
            for pts, duration, frame in timed_frames(packets, stream):
                if frame is not None:
                    length = duration or rescale(1, usual.numerator, usual.denominator)
                    length = float(length * stream.time_base * rate)
                    yield exact_time(pts, stream.time_base, rate), length, frame

        convert = build_converter(path, filters)
        pictures, last = [], None
        for frame, copies in constant_rate_runs(timed()):
            if frame is not last:
                picture, last = convert(frame), frame
            if (len(pictures) + copies) * 3 * size * size > MAX_BYTES:
                raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
            pictures += [picture] * copies
        return pictures


def check_decodable(path):
    """Raise DecodeError unless the file gives at least one frame, read from its start."""
    with open_container(path) as container:
        stream = video_stream(path, container)
        packets = read_packets(container, stream, seek(container, stream, None))
        for _, _, frame in timed_frames(packets, stream):
            if frame is None:
                raise DecodeError(f"{path}: no frame of it can be decoded")
            return
