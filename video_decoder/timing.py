"""The timestamp arithmetic of the ffmpeg command, in integers."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

US_PER_S = 1_000_000
# FFmpeg repeats a frame at most this often to fill a gap in time; beyond that it drops the frame.
MAX_REPEATS = 30 * 3600 * 30


def rescale(value: int, factor: Fraction) -> int:
    """Return value * factor, rounded to the nearest integer, halves away from zero."""
    product, denominator = value * factor.numerator, factor.denominator
    magnitude = (2 * abs(product) + denominator) // (2 * denominator)
    return magnitude if product >= 0 else -magnitude


class Span(NamedTuple):
    """The output frames first..end-1, which all display `frame`."""

    frame: Any
    first: int
    end: int


class FpsFilter:
    """FFmpeg's fps filter and the muxer's frame sync: which frame each output frame displays.

    Output frame n displays the last frame whose tick is at most n; those before the first frame
    display the first. A tick is a frame's time in output frames, rounded.
    """

    def __init__(self, num_frames: int):
        self.num_frames = num_frames
        self.frame = None  # displayed from output frame `first` on
        self.first = 0
        self.tick = 0

    def push(self, tick: int | None, frame: Any) -> Span | None:
        """Add the next frame in presentation order, and return the span that it completes.

        At the end, pass the tick at which the last frame ends (None: unknown) and the frame None.
        Spans are cut to the output frames 0..num_frames-1; an empty one is None.
        """
        span = None
        if self.frame is None:
            self.tick = tick
            if frame is not None and tick + 1 > MAX_REPEATS:
                frame = None  # the gap before it is too long to fill: never displayed
        elif tick is not None and tick > self.tick:
            span = Span(self.frame, self.first, min(tick, self.num_frames))
            self.first = self.tick = tick
        self.frame = frame
        return span if span and span.first < span.end else None


def sync_to_constant_rate(frames: Iterable[tuple[float, float, Any]]) -> Iterator[tuple[Any, int]]:
    """Apply the muxer's frame sync if no fps filter ran (CFR video sync of fftools).

    frames: (time, duration, frame), times in output frames. Yields (frame, copies): the output
    displays `frame` `copies` times in a row.
    """
    next_time, history, previous = 0, [0, 0, 0], None
    for time, duration, frame in frames:
        early = time - next_time
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
        next_time += copies
        previous = frame
    if previous is not None:
        yield previous, sorted(history)[1]


def to_output_frames(pts: int, time_base: Fraction, rate: Fraction) -> float:
    """Convert a timestamp to output frames, with the fractional bits and the nudge of fftools."""
    bits = min(max(29 - (rate.numerator.bit_length() - 1), 0), 16)
    time = rescale(pts, time_base * rate * (1 << bits)) / (1 << bits)
    if time != round(time):
        time += math.copysign(1 / (1 << 17), time)
    return time


def window_length(num_frames: int, fps: Fraction) -> int:
    """Return the value of the command's -t option, in microseconds."""
    return round((num_frames / fps + Fraction(1, 10)) * US_PER_S)
