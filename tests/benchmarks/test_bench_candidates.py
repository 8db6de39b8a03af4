"""The benchmark of candidate captions: every condition is trained and scored, once."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.helpers import ROOT, run_python
from utils import InputError

sys.path.insert(0, str(ROOT / "benchmarks"))
import candidates

TINY = ["--", "--batch_size=4", "--num_frames=4", "--video_size=32", "--warmup_steps=1"]


def metrics_of(*recalls):
    """Make the metrics of a run with these recalls at 1, 5 and 10, of 80 clips."""
    one = {**dict(zip(("R1", "R5", "R10"), recalls, strict=True)), "MR": 7.5, "num_videos": 80}
    return {"youcook": one, "msrvtt": one}


def test_a_table_has_mean_and_deviation_of_each_condition_and_a_row_of_chance():
    runs = {
        (0.0, 4): [metrics_of(0.02, 0.2, 0.3), metrics_of(0.04, 0.2, 0.5)],
        (1.0, 1): [metrics_of(0.1, 0.2, 0.3)],
    }
    assert list(candidates.table(runs, "msrvtt"))[2:] == [
        "| aligned | 4 | 3.0 ± 1.4 | 20.0 ± 0.0 | 40.0 ± 14.1 | 7.5 ± 0.0 |",
        "| displaced by 1 s | 1 | 10.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 | 7.5 ± 0.0 |",
        "| chance | | 1.2 | 6.2 | 12.5 | 40.5 |",
    ]


def test_captions_displaced_by_a_second_are_the_toy_sets_and_aligned_ones_are_not(toy, tmp_path):
    options = SimpleNamespace(toy=toy, out=tmp_path)
    captions = {
        drift: [
            path.read_text()
            for path in sorted(candidates.make_captions(options, drift).glob("*.csv"))
        ]
        for drift in (0.0, 1.0)
    }
    assert captions[1.0] == [path.read_text() for path in sorted((toy / "captions").glob("*.csv"))]
    assert len(captions[0.0]) == len(captions[1.0]) and captions[0.0] != captions[1.0]


def test_a_missing_toy_set_is_an_error(tmp_path):
    options = SimpleNamespace(toy=tmp_path / "toy", out=tmp_path / "out", flags=[], epochs=1)
    with pytest.raises(InputError, match=r"--toy: .* is not a toy data set"):
        candidates.check_settings(options)
    assert not options.out.exists()


@pytest.mark.slow
def test_every_condition_is_run_once_and_settings_are_not_mixed(toy, tmp_path):
    command = ["--out", tmp_path, "--toy", toy, "--seeds=1", "--epochs=1", "--candidates=4", *TINY]
    done = run_python("benchmarks/candidates.py", *command, timeout=900)
    names = ["k4_drift0_seed1", "k4_drift3_seed1"]
    assert re.findall(r"^(\w+_seed\d): \d+ s$", done.stderr, re.M) == names
    assert sorted(path.stem for path in (tmp_path / "log").glob("*.jsonl")) == sorted(names)
    assert not list((tmp_path / "checkpoint").iterdir())
    rows = json.loads((tmp_path / "candidates.json").read_text())
    assert [(row["drift"], row["candidates"]) for row in rows] == [(0, 4), (3, 4)]
    assert all(0 <= row["msrvtt"]["R10"] <= 1 for row in rows)
    for row, name in zip(rows, names, strict=True):
        kept = tmp_path / "log" / f"{name}.youcook.json"
        assert row["youcook"] == json.loads(kept.read_text())
    with Image.open(tmp_path / "candidates.png") as image:
        assert image.format == "PNG" and image.width > 400

    again = run_python("benchmarks/candidates.py", *command)
    assert again.stdout == done.stdout and "seed1" not in again.stderr
    script = ROOT / "benchmarks" / "candidates.py"
    others = [sys.executable, script, *command, "--lr=0.1"]
    refused = subprocess.run(list(map(str, others)), capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "--out" in refused.stderr
