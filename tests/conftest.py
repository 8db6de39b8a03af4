"""Fixtures that test modules share: the toy data, golden weights, shared clips, a browser."""

import json
import os
import shutil
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from s3dg import S3D
from tests.helpers import HERE, ROOT, SHARED, golden_weight, smallest_memory
from utils import log


@pytest.fixture(scope="session")
def golden_values():
    with np.load(HERE / "golden" / "model.npz") as values:
        return dict(values)


@pytest.fixture(scope="session")
def shared_videos():
    if not (SHARED / "videos").is_dir():
        pytest.skip("../shared/videos is not here")
    return SHARED / "videos"


@pytest.fixture(scope="session")
def shared_csv():
    if not (SHARED / "csv").is_dir():
        pytest.skip("../shared/csv is not here")
    return SHARED / "csv"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The toy data set with few training videos and short evaluation tables."""
    folder = tmp_path_factory.mktemp("toy")
    script = ROOT / "data" / "toy" / "prepare.py"
    subprocess.run(
        [sys.executable, script, "--out", folder, "--num_videos", "8"],
        check=True,
        capture_output=True,
    )
    for table, every in (("validation_youcook", 4), ("msrvtt_test", 4), ("hmdb51", 3)):
        header, *rows = (folder / f"{table}.csv").read_text().splitlines(keepends=True)
        (folder / f"{table}.csv").write_text("".join([header, *rows[::every]]))
    videos = folder / "crosstask_release" / "videos.csv"
    videos.write_text("".join(videos.read_text().splitlines(keepends=True)[:6]))
    sentences = json.loads((folder / "htm_align.json").read_text())
    short = list(sentences.items())[2::2]
    (folder / "htm_align.json").write_text(json.dumps(dict(short)))
    return folder


@pytest.fixture(scope="session")
def weights(toy, tmp_path_factory):
    """A checkpoint of golden weights: untrained, but with the activations of a trained network.

    With PyTorch's initial weights, an S3D embeds all videos alike up to the last bits of a float.
    """
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    state = S3D(word2vec_path=toy / "word2vec.pth").state_dict()
    torch.save({name: golden_weight(name, v.shape).to(v.dtype) for name, v in state.items()}, path)
    return path


@pytest.fixture
def ffmpeg_in_path(tmp_path, monkeypatch):
    """A function that puts a shell script into PATH as the ffmpeg program.

    The script prints the version of the real program if asked to, unless `version` is false;
    otherwise it runs the given commands, in which {real} is the real program.
    """
    folder = tmp_path / "bin"

    def put(commands, version=True):
        real = imageio_ffmpeg.get_ffmpeg_exe()
        limit = smallest_memory(real) if "{limit}" in commands else None
        delegate = f'case "$*" in -version) exec {real} -version;; esac\n' if version else ""
        folder.mkdir(exist_ok=True)
        script = folder / "ffmpeg"
        script.write_text(f"#!/bin/sh\n{delegate}{commands.format(real=real, limit=limit)}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return put


@pytest.fixture
def milnce_log(caplog, monkeypatch):
    """pytest's caplog with the lines of the project's log, which it does not get otherwise."""
    monkeypatch.setattr(log, "propagate", True)
    return caplog


@pytest.fixture(scope="session")
def browser():
    """A selenium driver of headless Chromium, which cannot reach anything but this machine.

    Without Chromium or its driver, skips the test, or fails it with MILNCE_REQUIRE_CHROMIUM.
    """
    if not all(shutil.which(name) for name in ("chromium", "chromedriver")):
        why = "chromium and chromedriver are not installed"
        if os.environ.get("MILNCE_REQUIRE_CHROMIUM"):
            pytest.fail(why)
        pytest.skip(why)
    from scripts.screenshots import start_browser

    here = "EXCLUDE 127.0.0.1, EXCLUDE localhost"
    driver = start_browser(
        "--no-sandbox",  # Chromium's sandbox does not start as root
        "--window-size=1280,900",
        f"--host-resolver-rules=MAP * ~NOTFOUND, {here}",
        **{"goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}},
    )
    yield driver
    driver.quit()
