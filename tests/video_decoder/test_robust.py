"""Damaged and hostile files give frames or one error, in bounded time and memory."""

import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import psutil
import pytest
import torch

from tests.helpers import FAILURES, ROOT, await_gone
from tests.video_decoder.samples import VIDEOS, run_ffmpeg
from video_decoder import (
    BACKENDS,
    DecodeError,
    check_backend,
    decode_clip,
    decode_frames,
    ffmpeg,
    pyav,
)

SOURCES = [
    "h264_bpyramid.mp4",
    "h264_opengop.mkv",
    "edit_list.mp4",
    "h264.ts",
    "h265.mp4",
    "packed_b.avi",
    "mpeg2.mpg",
    "vp9.webm",
    "av1.mkv",
    "sound_first.mp4",
]
if VIDEOS.is_dir():
    SOURCES += ["h265_video.mp4", "video_90.mov", "corrupted.mp4"]


def damage(data, rng):
    """Return a damaged copy of a file's bytes: truncated, without its head, or with changes."""
    data, length = bytearray(data), len(data)
    kind = rng.choice(["short", "headless", "bits", "noise", "header", "zeros", "gap", "twice"])
    at, span = rng.randrange(length), rng.randrange(5000)
    if kind == "short":
        del data[at:]
    elif kind == "headless":
        del data[: rng.randrange(min(length, 4000))]
    elif kind == "bits":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(length)] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        for _ in range(length // 200):
            data[rng.randrange(length)] = rng.randrange(256)
    elif kind == "header":
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(length, 1500))] = rng.randrange(256)
    elif kind == "zeros":
        data[at : at + span] = bytes(len(data[at : at + span]))
    elif kind == "gap":
        del data[at : at + span]
    else:
        data[at:at] = data[at : at + span]
    return bytes(data)


def outcome(path, backend, whole):
    """Return the decoded tensor, or the message of the DecodeError."""
    began = time.monotonic()
    try:
        if whole:
            result = decode_frames(path, size=32, backend=backend)
        else:
            result = decode_clip(path, 1, fps=5, num_frames=8, size=32, backend=backend)
    except DecodeError as error:
        result = str(error)
        assert str(path) in result and "\n" not in result
    assert time.monotonic() - began < 130  # a bound, not a speed
    return result


def check_damage(make, folder, seed, count):
    """Damage `count` files, and check that the backends accept the same ones and decode them alike.

    How FFmpeg shows damage depends on its version, and PyAV's wheel has another version than the
    ffmpeg program. In H.264 this is rare, so nearly all H.264 results must be equal.
    """
    rng = random.Random(seed)
    refused, equal = 0, []
    for number in range(count):
        source = make(SOURCES[number % len(SOURCES)])
        path = folder / f"{seed}_{number}{source.suffix}"
        path.write_bytes(damage(source.read_bytes(), rng))
        whole = rng.random() < 0.3
        ours, theirs = (outcome(path, backend, whole) for backend in BACKENDS)
        assert isinstance(ours, str) == isinstance(theirs, str), (path, ours, theirs)
        if isinstance(ours, str):
            refused += 1
        elif source.name.startswith("h264"):
            equal.append(torch.equal(ours, theirs))
        path.unlink()
    assert sum(equal) >= 0.9 * len(equal) > 0, f"{sum(equal)} of {len(equal)} equal"
    return refused


def test_damaged_files_give_frames_or_one_error(video, tmp_path):
    refused = check_damage(video, tmp_path, 1, 26)
    assert 0 < refused < 26


@pytest.mark.slow
def test_five_hundred_damaged_files(video, tmp_path):
    refused = check_damage(video, tmp_path, 2, 500)
    assert 0 < refused < 500


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")


def run_alone(code, *arguments):
    """Run code in a new process and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout


def replace_bytes(path, old, new, folder, least=1):
    """Make a copy of a file with the bytes `old` replaced."""
    data = path.read_bytes()
    assert data.count(old) >= least
    copy = folder / f"hostile{path.suffix}"
    copy.write_bytes(data.replace(old, new))
    return copy


def hostile_frame_sizes(folder):
    """Yield files whose pictures claim to be 60000 pixels wide and high, or as many as fit."""
    pattern = ("-f", "lavfi", "-i", "testsrc2=size=64x48:duration=1")
    jpeg, vp8 = folder / "jpeg.avi", folder / "vp8.webm"
    run_ffmpeg(*pattern, "-c:v", "mjpeg", str(jpeg))
    run_ffmpeg(*pattern, "-c:v", "libvpx", "-g", "1", str(vp8))
    size = (60000).to_bytes(2, "big") * 2
    start = bytes.fromhex("ffc0001108")  # JPEG: the frame header, its length, 8 bits
    yield replace_bytes(jpeg, start + bytes([0, 48, 0, 64]), start + size, folder)
    start = bytes.fromhex("9d012a")  # VP8: the start code of a keyframe
    yield replace_bytes(vp8, start + bytes([64, 0, 48, 0]), start + b"\xff\x3f\xff\x3f", folder)


PEAK = """
import re, resource, sys
import video_decoder
for path in sys.argv[2:]:
    for decode, more in ((video_decoder.decode_frames, {}), (video_decoder.decode_clip, CLIP)):
        try:
            decode(path, *([0] if more else []), size=32, backend=sys.argv[1], **more)
            sys.exit(f"{path} was decoded")
        except video_decoder.DecodeError:
            pass
with open("/proc/self/status") as file:
    own = int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])
print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
""".replace("CLIP", "dict(fps=5, num_frames=8)")


@needs_proc
@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_frames_are_refused_without_allocating_them(tmp_path, backend):
    paths = []
    for number, path in enumerate(hostile_frame_sizes(tmp_path)):
        paths.append(path.rename(tmp_path / f"{number}{path.suffix}"))
    # KiB, torch and all; one 60000 x 60000 picture has 5.4 million.
    assert int(run_alone(PEAK, backend, *paths)) < 1_000_000


def hostile_clock(folder):
    """Make a file of 30 frames, a million per second, the last of them 20 minutes late."""
    path = folder / "clock.mp4"
    pattern = "testsrc2=size=64x48:rate=1000000:duration=0.00003"
    late = "setpts='if(eq(N,29),1.2e9,N)'"
    options = ["-vf", late, "-fps_mode", "passthrough", "-enc_time_base", "1/1000000"]
    options += ["-c:v", "libx264", "-video_track_timescale", "1000000"]
    run_ffmpeg("-f", "lavfi", "-i", pattern, *options, str(path))
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_frames_per_second_do_not_fill_the_memory(tmp_path, backend, monkeypatch):
    """A window is decoded; the whole file is refused or decoded within the limit."""
    monkeypatch.setattr(pyav, "MAX_BYTES", 64 << 20)
    monkeypatch.setattr(ffmpeg, "MAX_BYTES", 64 << 20)
    path = hostile_clock(tmp_path)
    clip = decode_clip(path, 0, fps=5, num_frames=16, size=32, backend=backend)
    assert clip.any()
    assert torch.equal(clip, clip[:, :1].expand_as(clip))  # one picture for twenty minutes
    whole = outcome(path, backend, True)
    assert isinstance(whole, str) or whole.shape[1] * 32 * 32 * 3 <= 64 << 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_file_too_large_for_memory_is_refused(video, backend, monkeypatch):
    path = video("h264_bpyramid.mp4")
    frames = decode_frames(path, size=32, backend=backend)
    monkeypatch.setattr(pyav, "MAX_BYTES", frames.numel() - 1)
    monkeypatch.setattr(ffmpeg, "MAX_BYTES", frames.numel() - 1)
    assert "more frames than" in outcome(path, backend, True)
    monkeypatch.setattr(pyav, "MAX_BYTES", frames.numel())
    monkeypatch.setattr(ffmpeg, "MAX_BYTES", frames.numel())
    assert torch.equal(outcome(path, backend, True), frames)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_has_no_time_limit_of_its_own(video, backend, monkeypatch):
    path = video("h264_bpyramid.mp4")
    clip = {"fps": 5, "num_frames": 8, "size": 32, "backend": backend}
    expected = decode_clip(path, 1, **clip), decode_frames(path, size=32, backend=backend)
    clock = itertools.count(step=1000)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(threading.Timer, "start", lambda timer: timer.function())
    assert torch.equal(decode_clip(path, 1, **clip), expected[0])
    assert torch.equal(decode_frames(path, size=32, backend=backend), expected[1])


DECODE = """
import sys
import video_decoder
video_decoder.decode_clip(sys.argv[1], 0, fps=5, num_frames=8, size=32, backend="ffmpeg")
"""


@needs_proc
def test_an_ffmpeg_process_ends_with_the_process_that_started_it(video, ffmpeg_in_path, tmp_path):
    path = video("h264_bpyramid.mp4")
    ffmpeg_in_path(f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 600")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", DECODE, str(path)], env=environment)
    try:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.01)
        program = int((tmp_path / "pid").read_text())
        assert psutil.Process(program).ppid() == parent.pid
    finally:
        parent.kill()
        parent.wait()
    await_gone(program)


def test_the_program_is_killed_once_it_has_written_enough(video, monkeypatch):
    """Otherwise a file with hostile timestamps would keep it writing."""
    path = video("h264_bpyramid.mp4")
    command = [sys.executable, "-c", "while True: print('x' * 1000)"]
    pixels, status, _ = ffmpeg.run_program(path, command, 5000)
    assert len(pixels) == 5000 and status == 0


def decode_in_child(path, queue):
    queue.put(decode_clip(path, 1, fps=5, num_frames=4, size=32).numpy())


def test_decoding_works_in_forked_workers(video):
    """As in a DataLoader: the parent has decoded before it forks."""
    path = video("h264_bpyramid.mp4")
    expected = decode_clip(path, 1, fps=5, num_frames=4, size=32)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=decode_in_child, args=(path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert all(torch.equal(torch.from_numpy(result), expected) for result in results)


LEAK = """
import sys, gc
import video_decoder

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

paths = sys.argv[3:]
sizes = []
for number in range(int(sys.argv[2])):
    path = paths[number % len(paths)]
    try:
        video_decoder.decode_clip(path, number % 4, fps=5, num_frames=8, size=64)
    except video_decoder.DecodeError:
        pass
    if number + 1 in (int(sys.argv[1]), int(sys.argv[2])):
        gc.collect()
        sizes.append(resident())
print(sizes[1] - sizes[0])
"""


def growth(warm, total, paths):
    """Return the bytes of resident memory gained between two clips' numbers, in a new process."""
    return int(run_alone(LEAK, warm, total, *paths))


LEAKY = ["h264_bpyramid.mp4", "packed_b.avi", "vp9.webm", "interlaced.mp4", "turned_90.mp4"]


@pytest.fixture
def leaky_files(video, tmp_path):
    """Return one file for each code path of the decoder, and one that is refused."""
    (tmp_path / "broken.mp4").write_bytes(video(LEAKY[0]).read_bytes()[:3000])
    return [*map(video, LEAKY), tmp_path / "broken.mp4"]


@needs_proc
@pytest.mark.slow
def test_memory_stays_level_over_five_thousand_clips(leaky_files):
    assert growth(500, 5000, leaky_files) < 20e6


@pytest.mark.parametrize(
    ("dies", "message"),
    [("head -c 1000 /dev/zero", "middle of a frame"), ("kill -SEGV $$", "signal 11")],
)
def test_an_ffmpeg_program_that_dies_is_an_error(video, tmp_path, monkeypatch, dies, message):
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{dies}\n")
    program.chmod(0o755)
    path = video("h264_bpyramid.mp4")
    monkeypatch.setattr(ffmpeg, "ffmpeg_program", lambda: str(program))
    for whole in (False, True):
        assert message in outcome(path, "ffmpeg", whole)


@pytest.mark.parametrize("whole", [False, True], ids=["clip", "frames"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_ffmpeg_program_that_fails_is_an_error(video, ffmpeg_in_path, failure, whole):
    commands, quoted = FAILURES[failure]
    path = video("h264_bpyramid.mp4")
    ffmpeg_in_path(commands)
    check_backend("ffmpeg")
    message = outcome(path, "ffmpeg", whole)
    assert message.startswith(f"{path}: ") and quoted in message


@pytest.mark.parametrize("whole", [False, True], ids=["clip", "frames"])
def test_frames_before_a_failure_are_not_taken_for_all(video, ffmpeg_in_path, whole):
    path = video("h264_bpyramid.mp4")
    ffmpeg_in_path("head -c 3072 /dev/zero; echo Killed >&2; exit 137")  # a frame of 32 x 32
    assert "status 137: Killed" in outcome(path, "ffmpeg", whole)


def test_a_program_that_loses_frames_for_lack_of_memory_is_an_error(video, ffmpeg_in_path):
    path = video("h264_bpyramid.mp4")
    ffmpeg_in_path("echo 'Error submitting packet: Cannot allocate memory' >&2")
    assert "ran out of memory" in outcome(path, "ffmpeg", False)


def test_the_quoted_message_is_one_short_line(video, ffmpeg_in_path):
    path = video("h264_bpyramid.mp4")
    ffmpeg_in_path("printf 'a\\033[31m\\tb\\n\\n' >&2; exit 3")
    assert outcome(path, "ffmpeg", False).endswith("status 3: a [31m b")
    ffmpeg_in_path("head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2; exit 3")
    assert outcome(path, "ffmpeg", False).endswith("status 3: last")
    ffmpeg_in_path("head -c 3000 /dev/zero | tr '\\0' x >&2; exit 3")
    assert len(outcome(path, "ffmpeg", False)) < len(str(path)) + 300


def test_a_mostly_damaged_file_gives_the_frames_that_can_be_decoded(video, tmp_path):
    """The program's default limit, an error above two thirds of damaged packets, is off."""
    source = video("h264_bpyramid.mp4")
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        spans = [(packet.pos, packet.size) for packet in packets[1:]]
    data = bytearray(source.read_bytes())
    for position, size in spans:
        data[position + 4 : position + size] = b"\xff" * (size - 4)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    frames = outcome(path, "ffmpeg", True)
    assert not isinstance(frames, str) and frames.any()


def test_check_backend_accepts_a_working_program_and_pyav_without_one(ffmpeg_in_path):
    ffmpeg_in_path("exit 1")
    check_backend("ffmpeg")
    ffmpeg_in_path("exit 1", version=False)
    check_backend("pyav")
    with pytest.raises(ValueError, match="unknown decoder backend 'gstreamer'"):
        check_backend("gstreamer")


@pytest.mark.parametrize(
    ("commands", "named"),
    [
        ("echo 'no libx264' >&2; exit 127", "exited with status 127: no libx264"),
        ("exit 1", "exited with status 1: no message"),
        ("exit 255", "exited with status 255: no message"),
        ("kill -SEGV $$", "crashed .signal 11.: no message"),
        ("exit 0", "did not print its version"),
        ("echo 'a wrapper'", "did not print its version"),
        ("exec sleep 60", "did not print its version in 0.2 s"),
    ],
)
def test_check_backend_reports_a_program_that_does_not_work(
    ffmpeg_in_path, monkeypatch, commands, named
):
    if "sleep" in commands:
        monkeypatch.setattr(ffmpeg, "VERSION_TIMEOUT", 0.2)
    ffmpeg_in_path(commands, version=False)
    with pytest.raises(DecodeError, match=f"bin/ffmpeg {named}") as error:
        check_backend("ffmpeg")
    assert "\n" not in str(error.value)


def test_a_program_that_cannot_be_started_is_an_error(video, tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/absent/interpreter\n")
    program.chmod(0o755)
    monkeypatch.setattr(ffmpeg, "ffmpeg_program", lambda: str(program))
    path = video("h264_bpyramid.mp4")
    with pytest.raises(DecodeError, match=r"cannot run .*/ffmpeg: No such file"):
        check_backend("ffmpeg")
    assert "cannot run" in outcome(path, "ffmpeg", False)


def test_a_machine_without_the_program_is_an_error(monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(ffmpeg, "ffmpeg_program", absent)
    with pytest.raises(DecodeError, match="there is no ffmpeg program in PATH"):
        check_backend("ffmpeg")


def test_packets_between_distant_keyframes_are_not_kept_in_memory(video, monkeypatch, slow_paths):
    path = video("h264_bpyramid.mp4")
    expected = decode_clip(path, 1, fps=5, num_frames=8, size=32)
    monkeypatch.setattr(pyav, "MAX_PACKET_BYTES", 100)
    assert not slow_paths
    assert torch.equal(decode_clip(path, 1, fps=5, num_frames=8, size=32), expected)
    assert len(slow_paths) == 1
