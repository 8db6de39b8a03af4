"""The README's pictures: what they need, and that both pages are on them."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation.report import retrieval_data, write_page
from evaluation.results import Results
from retrieval_loader import Pair
from scripts import screenshots
from tests.helpers import make_video, run_main


@pytest.fixture
def evaluations(tmp_path, toy, weights):
    """Write what the pictures need of the results of evaluate_all.py."""
    folder = tmp_path / "demo.evaluations"
    (folder / "youcook").mkdir(parents=True)
    pairs = [Pair(tmp_path / "a.mp4", 0.0, 1.0, f"make the ball spin {k}") for k in range(4)]
    data = retrieval_data(pairs, tmp_path, [b""] * 4, np.eye(4))
    write_page(folder / "youcook", "YouCook2", Results({"R1": 1.0}), [], data)
    make_video(tmp_path / "crosstask/1/a.mp4", 2)
    flags = (
        f"--pretrain_cnn_path={weights} --token_to_word_path={toy}/dict.npy --num_frames=4 "
        f"--video_size=32 --crosstask_root={tmp_path}/crosstask"
    )
    content = {"command": f"python evaluate_all.py {flags}", "evaluations": {}}
    (folder / "results.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_both_pages_are_taken_at_one_width(browser, evaluations, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screenshots, "ROWS", 0.2)  # of the five columns: the only moment
    out = tmp_path / "images"
    arguments = (evaluations, f"--out={out}", "--text=red ball")
    assert run_main(screenshots, monkeypatch, capsys, *arguments) == (0, "")
    for name in ("report", "search"):
        path = out / f"{name}.png"
        assert path.stat().st_size < screenshots.MAX_BYTES
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.width == 1000 and picture.height > 200
            lightness = np.asarray(picture.convert("L"))
        assert lightness.mean() > 128 and lightness.std() > 5  # light, and not empty


def test_a_picture_of_many_colors_is_made_small(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    whole = len(screenshots.compress(picture))
    monkeypatch.setattr(screenshots, "MAX_BYTES", 30_000)
    assert len(screenshots.compress(picture)) <= 30_000 < whole


def test_a_missing_browser_or_result_is_one_line(evaluations, tmp_path, monkeypatch, capsys):
    status, error = run_main(screenshots, monkeypatch, capsys, tmp_path, f"--out={tmp_path}")
    assert status == 2 and "results.json" in error and error.count("\n") == 1
    monkeypatch.setenv("PATH", str(tmp_path))
    status, error = run_main(screenshots, monkeypatch, capsys, evaluations, f"--out={tmp_path}")
    assert status == 2 and "chromium, chromedriver" in error and error.count("\n") == 1
