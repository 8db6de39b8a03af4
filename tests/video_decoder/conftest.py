"""Fixtures of the decoder's tests: the pinned ffmpeg program and the videos."""

import functools
import os

import imageio_ffmpeg
import pytest

from tests.video_decoder.samples import make_video
from video_decoder import pyav


@pytest.fixture(scope="session")
def program_folder(tmp_path_factory):
    """Return a folder whose `ffmpeg` is the program of the package imageio-ffmpeg."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return folder


@pytest.fixture(autouse=True)
def pinned_program(program_folder, monkeypatch):
    """Put that program first in PATH, because the bits depend on the version of FFmpeg.

    FFmpeg 5.1, for example, chooses a neighbouring frame in some Matroska files.
    """
    monkeypatch.setenv("PATH", f"{program_folder}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def video(tmp_path_factory):
    """Return a function from a name in FILES to the file, which is made on first use."""
    return functools.partial(make_video, folder=tmp_path_factory.mktemp("videos"))


@pytest.fixture
def slow_paths(monkeypatch):
    """Return a list that gets an entry for each run of the slow path."""
    runs, run_slow_path = [], pyav.run_slow_path

    def count(*args):
        runs.append(args)
        return run_slow_path(*args)

    monkeypatch.setattr(pyav, "run_slow_path", count)
    return runs
