"""What the ffmpeg command does with timestamps, in integers."""

import math
from fractions import Fraction

import numpy as np

# The most copies FFmpeg makes of one frame to fill a gap in time; beyond that it drops the frame.
MAX_REPEATS = 30 * 3600 * 30


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


def exact_time(pts, time_base, rate):
    """A timestamp in output frames, with the fractional bits and the nudge of fftools."""
    bits = min(max(29 - (rate.numerator.bit_length() - 1), 0), 16)
    step = time_base * rate * (1 << bits)
    when = rescale(pts, step.numerator, step.denominator) / (1 << bits)
    if when != round(when):
        when += math.copysign(1 / (1 << 17), when)
    return when


def window_length(num_frames, fps):
    """The -t of the command, in microseconds."""
    return round((num_frames / fps + Fraction(1, 10)) * 1000000)
