"""The released weights: through torch.hub, and in every script."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import hubconf
from annotations.msrvtt import COLUMNS
from s3dg import VOCABULARY_ROWS
from tests.helpers import ROOT, golden_json, golden_weight, make_video, write_csv

CLONE = ROOT
WORDS = ["cut", "the", "tomato"]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with s3d_howto100m.pth and s3d_dict.npy, of the released files' keys and shapes."""
    folder = tmp_path_factory.mktemp("released")
    shapes = golden_json("state_dict")["state_dict"]["space_to_depth"]
    state = {name: golden_weight(name, shape).float() for name, shape in shapes}
    state = {n: v.long() if n.endswith("batches_tracked") else v for n, v in state.items()}
    torch.save(state, folder / "s3d_howto100m.pth")
    rows = len(state["text_module.word_embd.weight"])
    assert rows == VOCABULARY_ROWS
    words = WORDS + [f"word{number}" for number in range(len(WORDS), rows - 1)]
    np.save(folder / "s3d_dict.npy", np.array(words))
    return folder


def load(weights, dictionary):
    return torch.hub.load(
        str(CLONE), "s3d_howto100m", source="local", weights=weights, dictionary=dictionary
    )


def test_the_documented_command_runs_as_printed(released, tmp_path):
    page = (CLONE / "docs" / "features.md").read_text().replace("\\\n", "")
    [command] = re.findall(r"^    (python -c .*torch\.hub.*)$", page, re.MULTILINE)
    for name in ("hubconf.py", "s3dg.py"):  # all that it needs of the clone
        shutil.copy(CLONE / name, tmp_path)
    for file in released.iterdir():
        (tmp_path / file.name).symlink_to(file)
    program, *arguments = shlex.split(command)
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "torch.Size([1, 512]) torch.Size([1, 512])\n"


def test_the_readmes_quick_start_runs_as_printed(released, tmp_path):
    [code] = re.findall(r"^```python\n(.*?)^```$", (CLONE / "README.md").read_text(), re.M | re.S)
    for file in released.iterdir():
        (tmp_path / file.name).symlink_to(file)
    make_video(tmp_path / "video.mp4", seconds=4)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"score: -?\d\S*\n", done.stdout)


def test_the_hub_lists_the_one_model():
    hub = {name for name, value in vars(hubconf).items() if callable(value)}
    assert {name for name in hub if not name.startswith("_")} == {"s3d_howto100m"}


def test_the_released_format_and_ours_give_the_same_model(released, tmp_path):
    state = torch.load(released / "s3d_howto100m.pth", weights_only=True)
    ours = {"epoch": 1, "state_dict": {f"module.{name}": value for name, value in state.items()}}
    torch.save({**ours, "optimizer": {}, "scheduler": {}}, tmp_path / "epoch0001.pth.tar")
    words = released / "s3d_dict.npy"
    models = [
        load(f, words) for f in (released / "s3d_howto100m.pth", tmp_path / "epoch0001.pth.tar")
    ]
    assert not models[0].training and models[0].space_to_depth
    assert models[0].state_dict().keys() == state.keys()
    video = torch.rand(1, 3, 4, 32, 32)
    with torch.inference_mode():
        one, other = (model(video, mode="video") for model in models)
        text = models[0].text_module("Cut the tomato!", raw_text=True)
        ids = models[1].text_module(torch.tensor([[1, 2, 3] + [0] * 13]))
    assert torch.equal(one, other) and torch.equal(text, ids)


def test_a_program_may_have_modules_of_the_same_names_as_ours(released, monkeypatch):
    theirs = {name: types.ModuleType(name) for name in ("utils", "checkpoint", "args")}
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = load(released / "s3d_howto100m.pth", released / "s3d_dict.npy")
    assert model.fc.out_features == 512
    assert all(sys.modules[name] is module for name, module in theirs.items())


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("truncated", "s3d.pth is damaged"),
        ("a dict of something else", "s3d.pth holds no state dict .*lr"),
        ("another model", "s3d.pth has no weights of an S3D model: fc.weight is missing or"),
        ("a missing key", "s3d.pth does not fit the S3D model: it lacks fc.bias"),
        ("other words", "dict.npy has 3 words, but the word embedding has 66250 rows"),
        ("no words", "dict.npy is not a vocabulary"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(damage, named, released, tmp_path):
    weights, words = released / "s3d_howto100m.pth", released / "s3d_dict.npy"
    if "words" in damage:
        words = tmp_path / "dict.npy"
        np.save(words, np.array(WORDS) if damage == "other words" else np.zeros(66249))
    else:
        state = torch.load(weights, weights_only=True)
        del state["fc.bias"]
        contents = {
            "a dict of something else": {"lr": 0.1},
            "another model": torch.nn.Linear(2, 2).state_dict(),
        }
        weights = tmp_path / "s3d.pth"
        torch.save(contents.get(damage, state), weights)
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=named) as refused:
        load(weights, words)
    assert "\n" not in str(refused.value)


def test_an_absent_file_is_named(released, tmp_path):
    for files in (("absent", "s3d_dict.npy"), ("s3d_howto100m.pth", "absent")):
        with pytest.raises(FileNotFoundError, match="absent"):
            load(*(released / name for name in files))


@pytest.mark.parametrize("script", ["eval_msrvtt", "extract_features"])
def test_scripts_accept_the_released_files(script, released, tmp_path, monkeypatch, capsys):
    """The other evaluations build their model like these. test_main_distributed has trainings."""
    make_video(tmp_path / "video0.mp4", seconds=2)
    write_csv(tmp_path / "table.csv", COLUMNS, ("ret0", "msr0", "video0", "cut the tomato"))
    flags = [f"--pretrain_cnn_path={released}/s3d_howto100m.pth", "--num_thread_reader=0"]
    if script == "eval_msrvtt":
        flags += [f"--eval_video_root={tmp_path}", f"--eval_csv={tmp_path}/table.csv"]
        flags += [f"--token_to_word_path={released}/s3d_dict.npy", "--num_windows_test=1"]
    else:
        flags += [f"--video_path={tmp_path}", f"--feature_root={tmp_path}/out"]
    flags += ["--num_frames=4", "--video_size=32", "--verbose=0"]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    importlib.import_module(script).main()
    if script == "eval_msrvtt":
        printed = capsys.readouterr().out
        assert all(f"R{k}: 100.0% (1 of 1" in printed for k in (1, 5, 10))
    else:
        assert np.load(tmp_path / "out" / "video0.npy").shape == (2, 1024)
