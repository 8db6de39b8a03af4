import os
import stat
import subprocess
import sys

import pytest
import torch

from args import check_output, check_packages
from distributed import device
from distributed.device import check_compiler, pick_device
from s3dg import to_unit_range
from tests.helpers import ROOT, golden_json
from training.optimizer import lr_multiplier
from utils import InputError, atomic_write, run_script


@pytest.mark.parametrize("case", golden_json("misc")["schedule"])
def test_schedule_matches_the_golden_multipliers(case):
    for step, expected in case["multiplier"].items():
        value = lr_multiplier(int(step), case["warmup_steps"], case["total_steps"])
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_input_error_is_one_line_and_status_2(capsys):
    def main():
        raise InputError("--flag: wrong")

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --flag: wrong\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="full"), atomic_write(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_gpu_is_rejected():
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device cpu"):
        pick_device("cuda")


def test_auto_rejects_a_gpu_that_pytorch_cannot_use(monkeypatch, tmp_path):
    """For example with an old driver. The user would not want to train on the CPU instead."""
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "GPU_DEVICE_FILES", [str(tmp_path)])
    with pytest.raises(ValueError, match=f"there is a GPU .{tmp_path}.*use --device cpu"):
        pick_device("auto")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=3"):
        pick_device("auto")
    for hidden in ("", "-1", "NoDevFiles"):  # the last is how SLURM hides them
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert pick_device("auto").type == pick_device("cpu").type == "cpu"
    monkeypatch.setattr("torch.version.cuda", None)  # a build for the CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pick_device("auto").type == "cpu"


def test_bytes_become_floats_in_the_unit_range():
    clips = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(clips, torch.tensor([0, 0.2, 1.0]))


def test_compiling_without_a_compiler_is_rejected(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="compiler"):
        check_compiler()


def test_an_output_that_cannot_be_written_is_rejected_before_the_work(tmp_path):
    with pytest.raises(InputError, match="--metrics_json"):
        check_output(str(tmp_path / "absent" / "out.json"), "metrics_json")
    with pytest.raises(InputError, match="--out"):  # such as an unset shell variable
        check_output("", "out")
    check_output(str(tmp_path / "out.json"), "out")


def test_a_link_is_written_through_and_a_device_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"whole")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"whole"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"), atomic_write(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_two_writers_of_a_file_leave_it_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write(b"one")
        second.write(b"another")
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "code, error",
    [
        ("import s3dg, loss, hubconf", None),
        ("import utils", "needs Linux"),
        ("import video_decoder", "needs Linux"),
    ],
)
def test_on_another_system_the_model_loads_and_the_rest_needs_linux(code, error):
    command = [sys.executable, "-c", f"import torch, sys; sys.platform = 'darwin'; {code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1:]
    assert not last if error is None else "ImportError" in last[0] and error in last[0]


def test_missing_optional_packages_are_named():
    check_packages("--flag", "torch")
    with pytest.raises(InputError, match=r"^--flag: .* pip install no_such_a no_such_b$"):
        check_packages("--flag", "no_such_a", "torch", "no_such_b")
