"""The `pyav` backend: call FFmpeg's libraries in process."""

import bisect
import contextlib
import errno
import itertools
import math
from collections.abc import Collection, Iterable, Iterator
from fractions import Fraction

import av
import numpy as np

from video_decoder.filters import CropFilters, FrameConverter
from video_decoder.limits import CONTAINERS, MAX_BYTES, MAX_PIXELS, DecodeError, FilePath
from video_decoder.shards import find_source
from video_decoder.timing import (
    US_PER_S,
    FpsFilter,
    Span,
    rescale,
    sync_to_constant_rate,
    to_output_frames,
    window_length,
)

MAX_PACKET_BYTES = 64 << 20  # of a file, which the fast path keeps in memory at once
# Formats whose packets carry the timestamp of their frame and can be skipped.
FAST_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
FAST_CODECS = ("h264", "hevc")
AVFMT_TS_DISCONT = 0x0200
AVFMT_SEEK_TO_PTS = 0x4000000
AV_CODEC_FLAG_UNALIGNED = 1

TimedFrame = tuple[int | None, int, av.VideoFrame | None]  # pts, duration, frame


class FastPathUnavailable(Exception):
    """Raised for a file that needs the slow path."""


@contextlib.contextmanager
def open_video(path: FilePath) -> Iterator[av.VideoStream]:
    """Open a file and yield its first video stream, with the decoder set up.

    Raises DecodeError if it is not a video file or has no stream that can be decoded.
    """
    source = find_source(path)
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": source.protocols,
        "fflags": "-genpts",  # PyAV sets genpts by default, the ffmpeg program does not
        "max_pixels": str(MAX_PIXELS),
    }
    try:
        container = av.open(source.url, options=options, metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EINVAL:  # from the whitelist
            reason = "not in a supported video format, whatever its extension"
        raise DecodeError(f"{path}: {reason}") from None
    with container:
        if not container.streams.video:
            raise DecodeError(f"{path}: no video stream")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise DecodeError(f"{path}: no decoder for its video stream")
        context.thread_count = 1  # workers decode in parallel; skipping frames needs one thread
        context.flags |= AV_CODEC_FLAG_UNALIGNED  # crop exactly as the stream states, like ffmpeg
        context.options = {"max_pixels": str(MAX_PIXELS)}
        yield stream


def seek(stream: av.VideoStream, start: int | None) -> int:
    """Seek to `start` (us) as `ffmpeg -ss` does; None is no -ss.

    Returns the offset (us) that moves `start` to time 0.
    """
    container = stream.container
    target = (start or 0) + (container.start_time or 0)
    flags = container.format.flags
    for other in container.streams:
        other.discard = av.stream.Discard.default  # FFmpeg chooses its stream by it
    if start is not None:
        reordered = any(
            other.codec_context and getattr(other.codec_context, "has_b_frames", False)
            for other in container.streams.video
        )
        early = 0 if flags & AVFMT_SEEK_TO_PTS or not reordered else 3 * US_PER_S // 23
        with contextlib.suppress(av.error.FFmpegError):  # ffmpeg continues if it fails
            container.seek(target - early)
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    if flags & AVFMT_TS_DISCONT and None not in (container.start_time, stream.start_time):
        return -max(target, rescale(stream.start_time, US_PER_S * stream.time_base))
    return -target


def demux(stream: av.VideoStream) -> Iterator[av.Packet]:
    """Yield the stream's packets up to the end of the file or, like ffmpeg, to a read error."""
    # PyAV raises IndexError at the end if a stream was found only after the header.
    with contextlib.suppress(av.error.FFmpegError, IndexError):
        for packet in stream.container.demux(stream):
            if packet.size:
                yield packet


def read_packets(stream: av.VideoStream, offset: int) -> Iterator[av.Packet]:
    """Yield the stream's packets with timestamps shifted by `offset` (us) and corrected.

    The corrections are ffmpeg's. In formats with timestamp discontinuities (MPEG-TS, MPEG-PS),
    jumps of more than 10 s are removed. In others, timestamps more than 30 hours from the expected
    one are dropped.
    """
    us_per_unit = US_PER_S * stream.time_base
    units_per_us = 1 / us_per_unit
    may_jump = stream.container.format.flags & AVFMT_TS_DISCONT
    rate = stream.average_rate
    frame_us = rescale(US_PER_S, 1 / rate) if rate else 0
    offset = rescale(offset, units_per_us)
    dts_us = next_us = None
    for packet in demux(stream):
        pts, dts = packet.pts, packet.dts
        if pts is not None:
            pts += offset
        if dts is not None:
            dts += offset
        if dts is not None and may_jump:
            now = rescale(dts, us_per_unit)
            delta = now - (next_us or 0)  # the first packet is expected at START
            if abs(delta) > 10 * US_PER_S or (dts_us is not None and now + 100_000 < dts_us):
                shift = rescale(delta, units_per_us)
                offset -= shift
                dts -= shift
                pts = None if pts is None else pts - shift
        elif dts is not None and next_us is not None:
            limit = 30 * 3600 * US_PER_S
            if abs(rescale(dts, us_per_unit) - next_us) > limit:
                dts = None
            if pts is not None and abs(rescale(pts, us_per_unit) - next_us) > limit:
                pts = None
        if next_us is None:
            delay = stream.codec_context.reorder_depth * frame_us
            next_us = (rescale(pts, us_per_unit) if pts is not None else 0) - delay
        if dts is not None:
            next_us = rescale(dts, us_per_unit)
        dts_us = next_us
        next_us += rescale(packet.duration, us_per_unit) if packet.duration else frame_us
        packet.pts, packet.dts = pts, dts
        yield packet


def decode_packets(
    packets: Iterable[av.Packet], context: av.VideoCodecContext
) -> Iterator[av.VideoFrame]:
    """Yield the frames in presentation order. Skips damaged packets, as ffmpeg does."""
    for packet in itertools.chain(packets, [None]):
        try:
            yield from context.decode(packet)
        except av.error.FFmpegError:
            continue


def estimate_duration(
    duration: int, pts: int, last_pts: int | None, last_duration: int, stream: av.VideoStream
) -> int:
    """Return a frame's duration as ffmpeg estimates it (video_duration_estimate).

    last_pts, last_duration: those of the frame before it (None, 0 for the first frame).
    """
    gap = pts - last_pts if last_pts is not None else -1
    if duration > 0 and not (duration == 1 and gap > 2):
        return duration
    if gap > 0 or duration > 0:
        return gap if gap > 0 else duration
    rate = stream.codec_context.framerate or stream.average_rate
    if rate:
        last_duration = rescale(1, 1 / (rate * stream.time_base))
    return max(last_duration, 1)


def decode_timed_frames(
    packets: Iterable[av.Packet], stream: av.VideoStream
) -> Iterator[TimedFrame]:
    """Yield (pts, duration, frame) as ffmpeg's decoder thread does, in the stream's time base.

    The last item is (end of the last frame, 0, None); its pts is None if there was no frame.
    """
    faulty_pts = faulty_dts = 0
    last_guess_pts = last_guess_dts = -math.inf
    last_pts = None
    estimate = 0
    for frame in decode_packets(packets, stream.codec_context):
        # libavcodec's choice between a frame's pts and dts (best_effort_timestamp).
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
            pts = 0 if last_pts is None else last_pts + estimate
        estimate = estimate_duration(frame.duration, pts, last_pts, estimate, stream)
        last_pts = pts
        yield pts, frame.duration, frame
    yield (None if last_pts is None else last_pts + estimate), 0, None


def decode_windows_pyav(
    path: FilePath, starts: list[int], fps: Fraction, filters: CropFilters, clips: np.ndarray
) -> list[int]:
    """Fill clips [N, 3, frames, size, size]; return how many frames each window displays.

    starts: microseconds. clips: all zero on entry; frames past the end of the video stay zero.

    The fast path takes the timestamps from the packets and skips packets that no window needs. It
    requires H.264 or H.265 in MP4 or Matroska, and a different timestamp for each packet. The slow
    path decodes every frame from the keyframe on and takes the timestamps from the frames. It
    handles everything else (AVI, MPEG-TS, MPEG-4 part 2, VP9, AV1, ...), and starts over if the
    fast path finds damage, interlacing or a displayed frame that the decoder does not return. Both
    convert only the displayed frames.
    """
    with open_video(path) as stream:
        container, codec = stream.container.format.name, stream.codec_context.name
        if container in FAST_CONTAINERS and codec in FAST_CODECS:
            try:
                return run_fast_path(path, stream, starts, fps, filters, clips)
            except FastPathUnavailable:
                clips[:] = 0
    return run_slow_path(path, starts, fps, filters, clips)


def run_fast_path(
    path: FilePath,
    stream: av.VideoStream,
    starts: list[int],
    fps: Fraction,
    filters: CropFilters,
    clips: np.ndarray,
) -> list[int]:
    """Decode all windows in one pass, using the timestamps of the packets.

    Raises FastPathUnavailable if the file needs the slow path; some clips may be filled by then.
    """
    spans, segments = plan_windows(stream, starts, fps, clips.shape[2])
    destinations = {}  # pts -> where its frame is displayed
    for window, (pts, first, end) in spans:
        destinations.setdefault(pts, []).append(clips[window, :, first:end])
    converter = FrameConverter(path, filters)
    for packets in segments:
        for frame in decode_displayed(packets, destinations, stream.codec_context):
            picture = converter.convert(frame)
            for destination in destinations.pop(frame.pts):
                copy_picture(picture, destination)
    if destinations:
        raise FastPathUnavailable
    return count_frames(spans, len(starts))


def plan_windows(
    stream: av.VideoStream, starts: list[int], fps: Fraction, num_frames: int
) -> tuple[list[tuple[int, Span]], list[list[av.Packet]]]:
    """Plan which frames the windows display, and read the packets that they need.

    Returns (window, span) pairs, in which the span's frame is a pts, and segments: lists of packets
    in decoding order, each starting at a keyframe.
    """
    units_per_us = 1 / (US_PER_S * stream.time_base)
    ticks_per_unit = stream.time_base * fps
    reader = SegmentReader(stream)
    spans = []
    for window in sorted(range(len(starts)), key=starts.__getitem__):
        offset = rescale(-starts[window] - (stream.container.start_time or 0), units_per_us)
        reader.move_to(starts[window], -offset)
        # The first pts that rounds to a tick past the clip's last.
        limit = math.ceil((num_frames - Fraction(1, 2)) / ticks_per_unit) - offset
        count, planned = 0, []
        while not planned or planned[-1].end < num_frames:
            # At most 16 packets with later frames can precede a packet. A clip within a long gap
            # may need more packets, because the gap's length in ticks is not known in advance.
            count = 2 * count + 17
            reader.read_past(limit, count)
            planned = plan_window(reader, offset, num_frames, ticks_per_unit)
            if reader.at_end:
                break
        spans += [(window, span) for span in planned]
    return spans, [list(segment.values()) for segment in reader.segments]


class SegmentReader:
    """Read packets into segments: dicts pts -> packet, each starting at a keyframe.

    Raises FastPathUnavailable on damage, or if a seek could lead to other frames.
    """

    def __init__(self, stream: av.VideoStream):
        self.stream = stream
        self.segments: list[dict[int, av.Packet]] = []
        self.at_end = False
        self.overlaps = False  # a seek led back into the last segment
        self.num_bytes = 0

    def move_to(self, start: int, pts: int) -> None:
        """Seek to `start` (us; `pts` in the stream's units) unless the last segment covers it."""
        if self.segments and self.covers(pts):
            return
        seek(self.stream, start)
        self.packets = self.stream.container.demux(self.stream)
        packet = self.read_packet()
        if packet is None or not packet.is_keyframe:
            raise FastPathUnavailable
        # At a second seek, the demuxer may know more keyframes than in a newly opened file. This
        # makes no difference if the seek leads to an IDR picture.
        if self.segments and not is_idr(packet, self.stream.codec_context):
            raise FastPathUnavailable
        self.overlaps = bool(self.segments) and packet.pts in self.segments[-1]
        if not self.overlaps:
            self.segments.append({packet.pts: packet})
        self.at_end = False

    def covers(self, pts: int) -> bool:
        """Return whether decoding on from the last segment gives the frames of a seek to pts."""
        segment = self.segments[-1]
        if not self.at_end and pts > max(segment):
            return False
        keyframes = [packet for packet in list(segment.values())[1:] if packet.is_keyframe]
        keyframes = [packet for packet in keyframes if packet.pts <= pts]
        return not keyframes or is_idr(keyframes[-1], self.stream.codec_context)

    def read_past(self, limit: int, count: int) -> None:
        """Read until `count` packets of the segment have pts >= limit, or the file ends."""
        segment = self.segments[-1]
        found = sum(pts >= limit for pts in segment)
        while found < count and not self.at_end:
            packet = self.read_packet()
            if packet is None:
                self.at_end = True
                return
            known = packet.pts in segment
            self.overlaps = self.overlaps and known
            if self.overlaps:
                continue
            if known:
                raise FastPathUnavailable
            segment[packet.pts] = packet
            found += packet.pts >= limit
            self.num_bytes += packet.size
            if self.num_bytes > MAX_PACKET_BYTES:
                raise FastPathUnavailable

    def read_packet(self) -> av.Packet | None:
        """Return the next packet, or None at the end of the file."""
        try:
            packet = next(self.packets)
        except (StopIteration, av.error.FFmpegError):
            raise FastPathUnavailable from None
        if not packet.size and packet.dts is None:
            return None
        if not packet.size or packet.pts is None or packet.is_corrupt:
            raise FastPathUnavailable
        return packet


def plan_window(
    reader: SegmentReader, offset: int, num_frames: int, ticks_per_unit: Fraction
) -> list[Span]:
    """Return the spans of the window that starts at pts -offset; each span's frame is a pts."""
    segment = reader.segments[-1]
    times = sorted(pts for pts, packet in segment.items() if not packet.is_discard)
    times = times[bisect.bisect_left(times, -offset) :]
    if times and times[0] < next(iter(segment)):
        raise FastPathUnavailable  # presented before the keyframe: it may not be decodable
    fps_filter, spans = FpsFilter(num_frames), []
    for pts in times:
        span = fps_filter.push(rescale(pts + offset, ticks_per_unit), pts)
        if span:
            spans.append(span)
            if span.end == num_frames:
                return spans
    if reader.at_end and times:
        pts, last_pts = times[-1], times[-2] if len(times) > 1 else None
        length = estimate_duration(segment[pts].duration or 0, pts, last_pts, 0, reader.stream)
        span = fps_filter.push(rescale(pts + length + offset, ticks_per_unit), None)
        spans += [span] if span else []
    return spans


def decode_displayed(
    packets: list[av.Packet], displayed: Collection[int], context: av.VideoCodecContext
) -> Iterator[av.VideoFrame]:
    """Decode the frames of a segment whose pts is in `displayed`."""
    # Frames that no other frame refers to can be skipped. H.265 marks them only within a temporal
    # layer.
    can_skip = context.name == "h264" or all(
        parse_slice(packet, context)[1] == 1 for packet in packets
    )
    needed, group, end = [], [], 0
    for packet in packets:
        if packet.is_keyframe and is_idr(packet, context):
            needed += group[:end]
            group, end = [], 0
        group.append(packet)
        if packet.pts in displayed:
            end = len(group)
    needed += group[:end]
    try:
        for packet in [*needed, None]:
            if packet is not None:
                skip = can_skip and packet.pts not in displayed
                context.skip_frame = "NONREF" if skip else "DEFAULT"
            for frame in context.decode(packet):
                if frame.is_corrupt or frame.interlaced_frame:
                    raise FastPathUnavailable
                if frame.pts in displayed:
                    yield frame
        depth = context.reorder_depth
        context.flush_buffers()  # for the next segment; this may reset the depth
        context.reorder_depth = depth
    except av.error.FFmpegError:
        raise FastPathUnavailable from None


def is_idr(packet: av.Packet, context: av.VideoCodecContext) -> bool:
    """Return whether a packet is an IDR picture: no later picture refers to an earlier one."""
    return parse_slice(packet, context)[0] in ((5,) if context.name == "h264" else (19, 20))


def parse_slice(packet: av.Packet, context: av.VideoCodecContext) -> tuple[int, int]:
    """Return the NAL unit type of a packet's first slice, and in H.265 its temporal id plus 1.

    Returns (0, 0) if there is no slice, or if the packet's layout is not that of MP4 and Matroska.
    """
    h264 = context.name == "h264"
    extradata = context.extradata or b""
    if len(extradata) < (7 if h264 else 23) or extradata[0] != 1:
        return 0, 0
    prefix = 1 + (extradata[4 if h264 else 21] & 3)
    data, at = memoryview(packet), 0
    while at + prefix + 2 <= len(data):
        nal_type = data[at + prefix] & 31 if h264 else data[at + prefix] >> 1 & 63
        if 1 <= nal_type <= 5 if h264 else nal_type < 32:
            return nal_type, data[at + prefix + 1] & 7
        at += prefix + int.from_bytes(data[at : at + prefix], "big")
    return 0, 0


def run_slow_path(
    path: FilePath, starts: list[int], fps: Fraction, filters: CropFilters, clips: np.ndarray
) -> list[int]:
    """Decode every frame from the keyframe on; windows with the same first packet share a pass."""
    converter = FrameConverter(path, filters)
    passes, spans = {}, []
    with open_video(path) as stream:
        # If timestamps may jump (MPEG-TS, MPEG-PS), the windows' clocks could diverge.
        may_share = len(starts) > 1 and not stream.container.format.flags & AVFMT_TS_DISCONT
    for window, start in enumerate(starts):
        packet_id = find_first_packet(path, start) if may_share else None
        passes.setdefault(packet_id or window, []).append(window)
    for windows in passes.values():
        with open_video(path) as stream:
            delays = {window: starts[window] - starts[windows[0]] for window in windows}
            offset = seek(stream, starts[windows[0]])
            for window, span in run_pass(stream, offset, delays, fps, clips.shape[2]):
                picture = converter.convert(span.frame)
                copy_picture(picture, clips[window, :, span.first : span.end])
                spans.append((window, span._replace(frame=None)))
    return count_frames(spans, len(starts))


def count_frames(spans: Iterable[tuple[int, Span]], windows: int) -> list[int]:
    """Return how many frames each window displays, given the (window, span) pairs of all."""
    counts = [0] * windows
    for window, span in spans:
        counts[window] = max(counts[window], span.end)
    return counts


def run_pass(
    stream: av.VideoStream, offset: int, delays: dict[int, int], fps: Fraction, num_frames: int
) -> Iterator[tuple[int, Span]]:
    """Decode from the current position and yield (window, span) pairs.

    offset: as returned by `seek`. delays: window -> its start, relative to the start of the seek.
    Both are in microseconds.
    """
    units_per_us = 1 / (US_PER_S * stream.time_base)
    ticks_per_unit = stream.time_base * fps
    longest = rescale(window_length(num_frames, fps), units_per_us)
    base = rescale(offset, units_per_us)
    shifts = {w: rescale(offset - delay, units_per_us) - base for w, delay in delays.items()}
    fps_filters = {window: FpsFilter(num_frames) for window in delays}
    begins = {}
    for pts, _, frame in decode_timed_frames(read_packets(stream, offset), stream):
        if pts is None:
            return  # no frame at all
        for window, fps_filter in list(fps_filters.items()):
            time = pts + shifts[window]
            if frame is not None and time < 0:
                continue
            past = time - begins.setdefault(window, time) >= longest
            span = fps_filter.push(rescale(time, ticks_per_unit), None if past else frame)
            if span:
                yield window, span
            if past or (span and span.end == num_frames):
                del fps_filters[window]
        if not fps_filters:
            return


def find_first_packet(path: FilePath, start: int) -> tuple | None:
    """Return the pts, dts and position of the packet that a seek to `start` (us) leads to.

    Windows with the same first packet also share all later ones. Returns None if the packet cannot
    be identified.
    """
    with open_video(path) as stream:
        seek(stream, start)
        packet = next(demux(stream), None)
        if packet is None or packet.dts is None:
            return None
        return packet.pts, packet.dts, packet.pos


def copy_picture(picture: np.ndarray, frames: np.ndarray) -> None:
    """Copy a picture [height, width, 3] to each of frames [3, n, height, width]."""
    for channel in range(3):  # three copies of a plane are faster than one with its axes moved
        frames[channel] = picture[:, :, channel]


def decode_file(stream: av.VideoStream) -> Iterator[TimedFrame]:
    """Yield all frames of a file as decode_timed_frames does."""
    return decode_timed_frames(read_packets(stream, seek(stream, None)), stream)


def decode_whole_pyav(path: FilePath, filters: CropFilters, size: int) -> list[np.ndarray]:
    """Return the pictures of the whole file, uint8 [size, size, 3] each."""
    with open_video(path) as stream:
        rate = stream.guessed_rate or Fraction(25)
        frames_per_unit = stream.time_base * rate
        usual_duration = rescale(1, 1 / frames_per_unit)
        frames = (
            (
                to_output_frames(pts, stream.time_base, rate),
                float((duration or usual_duration) * frames_per_unit),
                frame,
            )
            for pts, duration, frame in decode_file(stream)
            if frame is not None
        )
        converter, pictures = FrameConverter(path, filters), []
        for frame, copies in sync_to_constant_rate(frames):
            picture = converter.convert(frame)
            if (len(pictures) + copies) * 3 * size * size > MAX_BYTES:
                raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
            pictures += [picture] * copies
        return pictures


def check_decodable(path: FilePath) -> None:
    """Raise DecodeError unless the file gives at least one frame, read from its start."""
    with open_video(path) as stream:
        _, _, frame = next(decode_file(stream))
        if frame is None:
            raise DecodeError(f"{path}: no frame can be decoded")
