"""The page of recipes: each of its commands and pieces of Python is run, and does what it says.

They are run as they are printed, in a folder that has the files they name. Flags that make them
cheap are appended.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from args import FLAGS, get_search_args
from s3dg import load_model, read_weights
from tests.helpers import ROOT, golden_json, golden_weight, make_video, use_search_server
from video_decoder import ffmpeg_program

PAGE = ROOT / "docs" / "recipes.md"
PAGE_WORDS = 1000
TINY = ["--num_frames=4", "--video_size=32"]
ONE_WORKER = ["--num_thread_reader=1"]
TRAINING = [*ONE_WORKER, "--batch_size=8", "--epochs=1", "--warmup_steps=2", "--n_display=1"]


class Recipe(NamedTuple):
    """A part of the page: its question, its text and its code in the order of the page."""

    question: str
    text: str
    code: list[tuple[str, str]]  # "python" or "command", and the code


def read_recipes(page):
    """Split a page into recipes, at its headings."""
    found = []
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        code = []
        for block in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$|^(?: {4}.*\n)+", part, re.MULTILINE):
            if block[2] is not None:
                code.append((block[1], block[2]))
            else:  # one command per line that the line before does not continue
                lines = re.sub(r"\\\n", "", block[0]).splitlines()
                code += [("command", line.strip()) for line in lines]
        found.append(Recipe(part.partition("\n")[0], part, code))
    return found


RECIPES = read_recipes(PAGE.read_text())


class Workspace:
    """A folder with the files that a recipe names, and what running its code there has left."""

    def __init__(self, folder, recipe, capsys):
        self.folder, self.recipe, self.capsys = folder, recipe, capsys
        self.names = {}  # of its Python

    def run(self, *cheap):
        """Run all code of the recipe; return what each piece prints.

        cheap: flags to append to commands that embed videos.
        """
        assert self.recipe.code
        return [
            self.run_python(code) if kind == "python" else self.run_command(kind, code, cheap)
            for kind, code in self.recipe.code
        ]

    def run_python(self, code):
        self.capsys.readouterr()
        exec(compile(code, str(PAGE), "exec"), self.names)
        return self.capsys.readouterr().out

    def run_command(self, kind, line, cheap):
        program, *words = shlex.split(line)
        assert kind == "command" and program in ("python", "ffmpeg"), f"no test can run {line}"
        if program == "ffmpeg":
            command = [ffmpeg_program(), "-v", "error", *words]
        else:
            command = [sys.executable, str(ROOT / words[0]), *words[1:]]
            if words[1] == "serve":
                line, _, moments = use_search_server(*words[2:], text="star")
                assert b'"thumbnail"' in moments
                return line
            if words[1] != "query":
                command += cheap
        options = {"capture_output": True, "text": True, "timeout": 600}
        done = subprocess.run(command, **options, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        return done.stdout


def check_flags(script, *words):
    """Fail if a script does not have a flag, or ignores it, as it does those of other scripts."""
    if script == "search.py":
        get_search_args("", list(words))
        return
    flags = (flag for group in FLAGS.values() for flag in group)
    used = {name for flag in flags if Path(script).stem in flag.scripts for name in flag.names}
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= used, f"{script} does not use {given - used}"


@pytest.fixture
def workspace(toy, weights, recipe, tmp_path, monkeypatch, capsys):
    for name, target in {
        "data": toy,
        "HOWTO100M": toy / "videos",
        "CAPTIONS": toy / "captions",
        "YOUCOOK2": toy / "youcook",
        "s3d_howto100m.pth": weights,
        "s3d_dict.npy": toy / "dict.npy",
    }.items():
        (tmp_path / name).symlink_to(target)
    make_video(tmp_path / "video.mp4", 6)
    make_video(tmp_path / "VIDEOS/a.mp4", 3)
    make_video(tmp_path / "VIDEOS/sub/b.mkv", 1)
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path, recipe, capsys)


# --- the recipes --------------------------------------------------------------------------------


def log_records(workspace, name):
    return [json.loads(line) for line in (workspace.folder / f"log/{name}.jsonl").open()]


def first_log_line(workspace, name):
    return (workspace.folder / f"log/{name}.txt").read_text().partition("\n")[0]


def train_without_slurm(workspace):
    workspace.run(*TINY, *TRAINING)
    assert "started by python" in first_log_line(workspace, "first")
    assert [record["step"] for record in log_records(workspace, "first")] == [1]
    saved = read_weights(workspace.folder / "checkpoint/first/epoch0001.pth.tar")
    assert saved["epoch"] == 1


def train_with_a_small_batch(workspace):
    workspace.run(*TINY, *TRAINING, "--batch_size=2", "--epochs=2")
    # 8 batches of 2
    assert first_log_line(workspace, "small").endswith("8 videos, 1 steps of 16 clips")
    (step,) = log_records(workspace, "small")
    assert math.isfinite(step["loss"])


def compare_numbers(workspace):
    (shown,) = workspace.run(*TINY, *ONE_WORKER)
    metrics = json.loads((workspace.folder / "youcook.json").read_text())
    assert {"R10", "MR", "num_missing", "intervals", "weights_checksum"} < metrics.keys()
    assert "--num_windows_test 10" in metrics["command"]
    assert f"{100 * metrics['R10']:.1f}" in shown


def preprocess_clips(workspace):
    shown, _ = workspace.run()
    assert f"prints `{shown.strip()}`" in workspace.recipe.text
    pixels = np.fromfile(workspace.folder / "clip.rgb", np.uint8)
    clip = workspace.names["clip"]
    expected = torch.from_numpy(pixels).view(16, 224, 224, 3).permute(3, 0, 1, 2) / 255
    assert torch.equal(clip, expected)
    assert not torch.equal(clip[:, 0], clip[:, 15])  # a clip that moves


def extract_features(workspace):
    workspace.run(*ONE_WORKER)  # with the frames and the size of the page
    out = workspace.folder / "OUT"
    assert np.load(out / "a.npy").shape == (2, 1024)
    assert np.load(out / "sub/b.npy").shape == (1, 1024)
    sidecar = json.loads((out / "a.json").read_text())
    assert sidecar["times"] == [[0, 2], [1, 3]] and sidecar["frames"] == [32, 32]
    assert sidecar["settings"]["video_size"] == 256


def fine_tune(workspace):
    given = {
        name: golden_weight(name, shape).to(torch.float32 if shape else torch.int64)
        for name, shape in golden_json("torchvision_s3d")
    }
    torch.save(given, workspace.folder / "s3d.pth")
    smallest = ["--num_frames=12", "--video_size=48"]  # that torchvision's network takes
    workspace.run(*TRAINING, *smallest)
    # A warm-up starts at rate 0, so that one step leaves the weights that were given.
    assert [record["lr"] for record in log_records(workspace, "kinetics")] == [0]
    model = load_model(workspace.folder / "checkpoint/kinetics/epoch0001.pth.tar")
    assert model.torchvision and model.joint_space
    assert torch.equal(model.conv_2b.conv1.weight, given["features.2.0.weight"])


def use_the_model(workspace):
    (shown,) = workspace.run()
    scores = json.loads(shown)
    assert len(set(scores)) == 2 and all(map(math.isfinite, scores))
    ((_, code),) = workspace.recipe.code
    assert len(code.split("\n")) - code.count("\n\n") - 1 == 5


def search_videos(workspace):
    _, moments, _ = workspace.run(*TINY, *ONE_WORKER)
    rows = re.findall(r"^ *(\S+) +\S+-\S+ +(\S+)$", moments, re.MULTILINE)
    scores = [float(score) for score, _ in rows]
    assert scores == sorted(scores, reverse=True)
    videos = workspace.folder / "VIDEOS"
    assert {path for _, path in rows} == {f"{videos}/a.mp4", f"{videos}/sub/b.mkv"}


CHECKS = {
    "How do I train without SLURM?": train_without_slurm,
    "How do I train with a small batch?": train_with_a_small_batch,
    "Why do my numbers differ?": compare_numbers,
    "How are clips preprocessed?": preprocess_clips,
    "How do I extract features as the authors did?": extract_features,
    "How do I fine-tune from Kinetics?": fine_tune,
    "How do I use the model in five lines?": use_the_model,
    "How do I search my own videos?": search_videos,
}
each_recipe = pytest.mark.parametrize(
    "recipe", [pytest.param(recipe, id=recipe.question) for recipe in RECIPES]
)


@pytest.mark.slow
@each_recipe
def test_a_recipe_does_what_it_says(recipe, workspace):
    assert recipe.question in CHECKS, "a recipe without a test"
    CHECKS[recipe.question](workspace)


# --- the page -----------------------------------------------------------------------------------


def test_every_recipe_has_a_test_and_is_on_the_page():
    assert [recipe.question for recipe in RECIPES] == list(CHECKS)


@each_recipe
def test_a_recipe_links_to_the_details(recipe):
    assert re.search(r"\]\([^)]*\.md(#[^)]*)?\)", recipe.text)


@each_recipe
def test_the_flags_of_a_recipe_exist(recipe):
    existing = {name for group in FLAGS.values() for flag in group for name in flag.names}
    assert set(re.findall(r"`(--\w+)[^`]*`", recipe.text)) <= existing
    for _, code in recipe.code:
        if code.startswith("python "):
            check_flags(*shlex.split(code)[1:])


def test_the_page_is_short():
    words = len(PAGE.read_text().split())
    assert words <= PAGE_WORDS, f"docs/recipes.md has {words} words; link to other pages"


def test_code_of_a_page_is_found():
    commands = "    x --y \\\n        z\n    w\n"
    (recipe,) = read_recipes(f"# A\n\n    a\n\n## B?\n\n{commands}\n```python\nv\n```\n")
    assert recipe.question == "B?"
    assert [(kind, code.split()) for kind, code in recipe.code] == [
        ("command", ["x", "--y", "z"]),
        ("command", ["w"]),
        ("python", ["v"]),
    ]
