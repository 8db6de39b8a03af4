"""Helpers that test modules share: golden values, toy flags, small videos, running scripts."""

import contextlib
import csv
import fcntl
import functools
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import threading
import time
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils import run_script
from video_decoder import ffmpeg_program

HERE = Path(__file__).parent
ROOT = HERE.parent
SHARED = HERE.parents[1] / "shared"  # real clips and annotation tables; absent in most clones


def golden_json(name):
    return json.loads((HERE / "golden" / f"{name}.json").read_text())


def golden_random(tag):
    """Make the generator of the golden values: RandomState, seeded with the CRC-32 of the tag."""
    return np.random.RandomState(zlib.crc32(tag.encode()))


def golden_weight(name, shape):
    """Make a tensor of the golden values' deterministic weights, float64."""
    n = golden_random(name).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        value = np.zeros(shape, dtype=np.int64)
    elif name.endswith("running_var"):
        value = 1 + 0.5 * np.abs(n)
    elif name.endswith("running_mean"):
        value = 0.1 * n
    elif ".bn" in name and name.endswith("weight"):
        value = 1.7 + 0.1 * n
    elif name.endswith("bias"):
        value = 0.02 * n
    elif name.endswith("word_embd.weight"):
        value = 0.1 * n
    else:
        value = n * np.sqrt(2 / np.prod(shape[1:]))
    return torch.as_tensor(np.asarray(value))


def toy_flags(toy):
    """Return flags that train on the toy data, at a size at which a step takes a moment."""
    return [
        f"--train_csv={toy}/howto100m_videos.csv",
        f"--video_path={toy}/videos",
        f"--caption_root={toy}/captions",
        f"--word2vec_path={toy}/word2vec.pth",
        f"--token_to_word_path={toy}/dict.npy",
        "--num_frames=4",
        "--video_size=32",
        "--crop_only=0",
        "--batch_size=4",
        "--warmup_steps=2",
        "--num_thread_reader=2",
        "--prefetch=12",
        "--n_display=1",
    ]


def run_python(script, *flags, cwd=None, timeout=300):
    """Run a script of the project as a user does; return the finished process."""
    return subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        check=True,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
    )


def run_main(script, monkeypatch, capsys, *arguments):
    """Run an imported script in this process; return its exit status and stderr."""
    monkeypatch.setattr("sys.argv", [Path(script.__file__).name, *map(str, arguments)])
    try:
        run_script(script.main)
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def use_search_server(*arguments, text, cwd=None):
    """Start `search.py serve` with these arguments, search for a text, and stop it by Ctrl-C.

    Return the line and the errors that it prints, and the moments that it responds with, as JSON.
    """
    command = [sys.executable, ROOT / "search.py", "serve", *arguments, "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, cwd=cwd)
    try:
        line = process.stdout.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+/", line)
        assert address, process.stderr.read()
        with urllib.request.urlopen(f"{address[0]}moments?text={text}") as response:
            moments = response.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        return line, process.stderr.read(), moments
    finally:
        process.kill()
        process.communicate()


def run_at_terminal(*command):
    """Run a command with a terminal for stdout and stderr; return what it sent to the terminal."""
    terminal, end = pty.openpty()
    rows_columns = struct.pack("HHHH", 24, 120, 0, 0)
    fcntl.ioctl(end, termios.TIOCSWINSZ, rows_columns)
    received = []

    def receive():
        with open(terminal, "rb", buffering=0) as file:
            while True:
                try:
                    received.append(file.read(1 << 16))
                except OSError:  # on Linux, the other end is closed
                    return

    reader = threading.Thread(target=receive)
    reader.start()
    try:
        subprocess.run(list(map(str, command)), check=True, stdout=end, stderr=end, timeout=300)
    finally:
        os.close(end)
        reader.join()
    return b"".join(received).decode()


def scalars(folder):
    """Return what TensorBoard shows for a folder of event files: {tag: {step: value}}."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    for tag, values in shown.items():
        assert len(values) == len(dict(values)), f"{tag} has a step twice: {values}"
    return {tag: dict(values) for tag, values in shown.items()}


def golden_frames(kind):
    """Return the rows of one kind in frames.json."""
    return [row for row in golden_json("frames") if row["kind"] == kind]


def frames_digest(video):
    """Return the digest of a clip uint8 [3, T, H, W] as in frames.json: SHA-256 of [T, H, W, 3]."""
    return hashlib.sha256(video.permute(1, 2, 3, 0).contiguous().numpy().tobytes()).hexdigest()


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def vtt_time(seconds):
    minutes, seconds = divmod(seconds, 60)
    return f"{int(minutes) // 60:02d}:{int(minutes) % 60:02d}:{seconds:06.3f}"


def rolling_vtt(lines):
    """Make WebVTT like YouTube's automatic captions: two rolling lines, timed words, 10 ms cues.

    lines: (start, end, text) of each spoken line, in seconds.
    """
    cues, before = [], " "
    for start, end, text in lines:
        first, *words = text.split(" ")
        step = (end - start) / (len(words) + 1)
        times = (vtt_time(start + step * number) for number in range(1, len(words) + 1))
        spoken = "".join(f"<{at}><c> {word}</c>" for at, word in zip(times, words, strict=True))
        cues.append((start, end - 0.01, f"{before}\n{first}{spoken}"))
        cues.append((end - 0.01, end, f"{text}\n "))
        before = text
    style = "align:start position:0%"
    blocks = (f"{vtt_time(a)} --> {vtt_time(b)} {style}\n{text}\n\n" for a, b, text in cues)
    return "WEBVTT\nKind: captions\nLanguage: en\n\n" + "".join(blocks)


def make_video(path, seconds, *options):
    """Make a small video with motion, 96x64 at 10 frames per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = ["-f", "lavfi", "-i", f"testsrc2=size=96x64:rate=10:duration={seconds}"]
    command = [ffmpeg_program(), "-v", "error", "-nostdin", "-y", *source]
    subprocess.run([*command, "-pix_fmt", "yuv420p", *options, str(path)], check=True)


def pack_folder(folder, shard, names=None):
    """Pack files of a folder, by default all, into a tar file under their names."""
    names = names or sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for name in names:
            tar.add(folder / name, str(name))
    return shard


def private_memory():
    """Return the bytes that this process has written to and shares with no other (Linux).

    Pages that are only read do not count. Those of a file are in memory once, whoever maps them,
    but look private until another process reads them.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_Dirty"))


def open_page(browser, address):
    """Load a page in the browser, and drop the log entries of earlier pages."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)


def page_errors(browser):
    """Return the errors in the browser's console since open_page or the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def requests_of(browser):
    """Return the addresses that were requested since open_page or the last call."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = (event["params"] for event in events if event["method"] == "Network.requestWillBeSent")
    return [params["request"]["url"] for params in sent]


LIBRARY = "error while loading shared libraries: libx264.so.164: cannot open shared object file"
# Failures of an ffmpeg program that still prints its version: (shell commands, text in the error)
FAILURES = {
    "status 127": (f"echo first >&2; echo '{LIBRARY}' >&2; exit 127", f"status 127: {LIBRARY}"),
    "status 1": ("echo 'Unknown encoder' >&2; exit 1", "status 1: Unknown encoder"),
    "status 255": ("exit 255", "status 255: no message"),
    "memory limit": ('ulimit -v {limit}; exec {real} "$@"', "the ffmpeg program "),
}


@functools.cache
def smallest_memory(program):
    """Return the smallest address space, in KiB, in which a program can print its version."""
    for limit in range(20_000, 2_000_000, 20_000):
        command = ["sh", "-c", f"ulimit -v {limit}; exec {program} -version"]
        if not subprocess.run(command, capture_output=True).returncode:
            return limit
    pytest.skip("address space cannot be limited here")


def await_gone(pid):
    """Wait until the process of an id has ended, or is a zombie that nobody reaps."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.01)


class Evil:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("this must not run",)


DETAILS = ["counts", "intervals", "command", "weights_checksum"]  # the last keys of a metrics file


def without_command(metrics):
    """Return a metrics file's content without the command, which may differ for equal results."""
    return {name: value for name, value in metrics.items() if name != "command"}
