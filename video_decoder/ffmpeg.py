"""Backend `ffmpeg`: the program, one process per window."""

import functools
import os
import shutil
import subprocess
import tempfile

import numpy as np

from utils import die_with_parent
from video_decoder.limits import CONTAINERS, MAX_BYTES, MAX_PIXELS, DecodeError
from video_decoder.pyav import open_container, put_picture, video_stream
from video_decoder.timing import window_length

TRIAL_SECONDS = 60  # for `ffmpeg -version`: a network file system may be slow at first


def ffmpeg_program():
    program = shutil.which("ffmpeg")
    if program is None:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    return program


def check_program() -> None:
    """Run the program once. Raises DecodeError if it cannot be run or is not ffmpeg."""
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
        raise DecodeError(f"{program} {describe_ending(trial.returncode, trial.stderr)}")
    if not trial.stdout.startswith(b"ffmpeg version"):
        raise DecodeError(f"{program} did not print its version: it is not ffmpeg")


def read_pixels(path, rate, filters, limit, **seek):
    """The first `limit` bytes of what the command writes."""
    import ffmpeg

    with open_container(path) as container:  # both backends refuse the same files
        video_stream(path, container)
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
        pixels, status, messages = run_program(path, command, limit)
        if b"Invalid too big or non positive size" not in messages:
            break  # otherwise frames were smaller than the crop
    if status:
        raise DecodeError(f"{path}: the ffmpeg program {describe_ending(status, messages)}")
    if b"Cannot allocate memory" in messages:  # it may drop the frames and exit with 0
        raise DecodeError(f"{path}: the ffmpeg program ran out of memory")
    return pixels


def run_program(path, command, limit):
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


def describe_ending(status, messages):
    """How a program ended that failed, and the last line of its messages (bytes)."""
    how = f"crashed (signal {-status})" if status < 0 else f"exited with status {status}"
    lines = messages.decode("utf-8", "replace").split("\n")
    last = next((line for line in map(quote_line, reversed(lines)) if line), "no message")
    return f"{how}: {last}"


def quote_line(text):
    """A program's message without control characters, not too long."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def decode_windows_ffmpeg(path, starts, fps, filters, clips):
    """Fill clips [N, 3, frames, size, size]; for each window, whether it shows any frame."""
    num_frames, size = clips.shape[2:4]
    # trim only ends the command early: a damaged clock could ask for a million repeats.
    rate = [("fps", {"fps": str(fps)}), ("trim", {"end_frame": num_frames})]
    shown = []
    for start, clip in zip(starts, clips, strict=True):
        seek = {"ss": f"{start}us", "t": f"{window_length(num_frames, fps)}us"}
        pixels = read_pixels(path, rate, filters, clip.size, **seek)
        frames = split_frames(path, pixels, size)
        for number, frame in enumerate(frames):
            put_picture(frame, clip[:, number : number + 1])
        shown.append(len(frames) > 0)
    return shown


def decode_whole_ffmpeg(path, filters, size):
    """The pictures of the whole file, [frames, size, size, 3]."""
    pixels = read_pixels(path, [], filters, MAX_BYTES + 1)
    if len(pixels) > MAX_BYTES:
        raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
    return split_frames(path, pixels, size)


def split_frames(path, pixels, size):
    """The bytes of whole pictures as an array [frames, size, size, 3]."""
    if len(pixels) % (3 * size * size):
        raise DecodeError(f"{path}: the ffmpeg program stopped in the middle of a frame")
    return np.frombuffer(pixels, np.uint8).reshape(-1, size, size, 3)
