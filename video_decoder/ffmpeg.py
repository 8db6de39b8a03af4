"""The `ffmpeg` backend: run the program, one process per window."""

import functools
import os
import shutil
import subprocess
import tempfile
from fractions import Fraction

import numpy as np

from utils import die_with_parent
from video_decoder.filters import CropFilters, Filter
from video_decoder.limits import CONTAINERS, MAX_BYTES, MAX_PIXELS, DecodeError, FilePath
from video_decoder.pyav import copy_picture, open_video
from video_decoder.shards import find_source
from video_decoder.timing import window_length

VERSION_TIMEOUT = 60  # seconds for `ffmpeg -version`: a network file system may be slow at first


def ffmpeg_program() -> str:
    """Return the path of the ffmpeg program in PATH, or else in the package imageio-ffmpeg.

    Raises ImportError or RuntimeError if there is none.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
    return program


def check_program() -> None:
    """Run the program once to check that it works.

    Raises DecodeError if it cannot be run or is not ffmpeg.
    """
    try:
        program = ffmpeg_program()
    except (ImportError, RuntimeError):
        raise DecodeError(
            "there is no ffmpeg program in PATH, nor in the package imageio-ffmpeg"
        ) from None
    try:
        result = subprocess.run(
            [program, "-version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=VERSION_TIMEOUT,
        )
    except OSError as error:
        raise DecodeError(f"cannot run {program}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise DecodeError(f"{program} did not print its version in {VERSION_TIMEOUT} s") from None
    if result.returncode:
        raise DecodeError(f"{program} {describe_failure(result.returncode, result.stderr)}")
    if not result.stdout.startswith(b"ffmpeg version"):
        raise DecodeError(f"{program} did not print its version: it is not ffmpeg")


def read_pixels(
    path: FilePath, rate: list[Filter], filters: CropFilters, limit: int, **seek: str
) -> bytes:
    """Run the command on a file and return the first `limit` bytes of its output.

    rate: the filters for the frame rate. seek: input options (ss, t).
    """
    import ffmpeg

    with open_video(path) as stream:  # both backends reject the same files
        demuxer = stream.container.format.name.split(",")[0]
    opened = find_source(path)
    chains = [filters.chain]
    if filters.enlarge:
        chains.append([filters.enlarge, *filters.chain])
    for chain in chains:
        source = ffmpeg.input(
            opened.url,
            format=demuxer,
            format_whitelist=CONTAINERS,
            protocol_whitelist=opened.protocols,
            max_pixels=MAX_PIXELS,
            threads=1,  # the pixels of a damaged file must not depend on the number of cores
            **seek,
        )
        video = source["v"]
        for name, options in [*rate, *chain]:
            video = video.filter(name, **options)
        output = video.output("pipe:", format="rawvideo", pix_fmt="rgb24")
        command = output.compile(ffmpeg_program())
        # Keep the frames of a damaged file that can be decoded, however few. By default the
        # program exits with 69 if more than two thirds of the packets are damaged.
        tolerant = ["-max_error_rate", "1"]
        command[1:1] = ["-v", "error", "-nostdin", "-filter_complex_threads", "1", *tolerant]
        pixels, status, messages = run_program(path, command, limit)
        if b"Invalid too big or non positive size" not in messages:
            break  # no frame was smaller than the crop
    if status:
        raise DecodeError(f"{path}: the ffmpeg program {describe_failure(status, messages)}")
    if b"Cannot allocate memory" in messages:  # it may drop the frames and exit with 0
        raise DecodeError(f"{path}: the ffmpeg program ran out of memory")
    return pixels


def run_program(path: FilePath, command: list[str], limit: int) -> tuple[bytes, int, bytes]:
    """Run a command; return the first `limit` bytes of its output, its status and its messages.

    After `limit` bytes the program is killed and the status is 0. The program does not outlive
    this process. Raises DecodeError, naming `path`, if the program cannot be started.
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
        errors.seek(max(len(messages), size - 4096))  # the end, for the last line
        return pixels, status if len(pixels) < limit else 0, messages + errors.read()


def describe_failure(status: int, messages: bytes) -> str:
    """Describe how a program failed, with the last line of its messages."""
    how = f"crashed (signal {-status})" if status < 0 else f"exited with status {status}"
    lines = messages.decode("utf-8", "replace").split("\n")
    last = next((line for line in map(quote_line, reversed(lines)) if line), "no message")
    return f"{how}: {last}"


def quote_line(text: str) -> str:
    """Remove control characters from a line of output, and cut it to 200 characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 200 else f"{text[:197]}..."


def decode_windows_ffmpeg(
    path: FilePath, starts: list[int], fps: Fraction, filters: CropFilters, clips: np.ndarray
) -> list[int]:
    """Fill clips [N, 3, frames, size, size]; return how many frames each window displays.

    starts: microseconds. clips: all zero on entry; frames past the end of the video stay zero.
    """
    num_frames, size = clips.shape[2:4]
    # trim only stops the command early: damaged timestamps could require a million repeats.
    rate = [("fps", {"fps": str(fps)}), ("trim", {"end_frame": str(num_frames)})]
    counts = []
    for start, clip in zip(starts, clips, strict=True):
        seek = {"ss": f"{start}us", "t": f"{window_length(num_frames, fps)}us"}
        pictures = split_pictures(path, read_pixels(path, rate, filters, clip.size, **seek), size)
        for number, picture in enumerate(pictures):
            copy_picture(picture, clip[:, number : number + 1])
        counts.append(len(pictures))
    return counts


def decode_whole_ffmpeg(path: FilePath, filters: CropFilters, size: int) -> np.ndarray:
    """Return the pictures of the whole file, uint8 [frames, size, size, 3]."""
    pixels = read_pixels(path, [], filters, MAX_BYTES + 1)
    if len(pixels) > MAX_BYTES:
        raise DecodeError(f"{path}: more frames than fit in {MAX_BYTES >> 20} MiB")
    return split_pictures(path, pixels, size)


def split_pictures(path: FilePath, pixels: bytes, size: int) -> np.ndarray:
    """Split the program's output into pictures, uint8 [frames, size, size, 3]."""
    if len(pixels) % (3 * size * size):
        raise DecodeError(f"{path}: the ffmpeg program stopped in the middle of a frame")
    return np.frombuffer(pixels, np.uint8).reshape(-1, size, size, 3)
