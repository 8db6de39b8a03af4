"""The figure of trainings: which records it shows, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from loss import MILNCELoss
from scripts import plot_training
from tests.helpers import run_main
from training.log import append_record
from utils import append, run_script


def training(step, loss=2.5):
    rest = {"lr": 0.001, "batch_size": 8, "clips_per_second": 20.0, "data_wait": 0.25}
    return {"epoch": 1, "step": step, "loss": loss, **rest}


def validation(step, R10=0.5):
    return {"epoch": 1, "step": step, "R1": 0.1, "R5": 0.25, "R10": R10, "MR": 12.0}


@pytest.fixture
def write(tmp_path):
    def write(name, *records):
        path = tmp_path / name
        for record in records:
            append_record(path, record)
        return path

    return write


def test_a_run_is_read_by_steps(write):
    path = write("run.jsonl", training(1), training(2, 1.5), validation(2), training(3))
    steps, validated = plot_training.read_run(path)
    assert steps["loss"].to_dict() == {1: 2.5, 2: 1.5, 3: 2.5}
    assert validated["R10"].to_dict() == {2: 0.5} and validated["MR"].to_dict() == {2: 12.0}


def test_steps_that_a_resumed_run_repeats_replace_the_earlier_ones(write):
    before = [training(1), training(2), validation(2, 0.1), training(3), training(4, 9.0)]
    before += [validation(4, 0.1), training(5, 9.0)]
    after = [training(3, 1.0), training(4, 1.0), validation(4, 0.7)]
    steps, validated = plot_training.read_run(write("run.jsonl", *before, *after))
    assert steps["loss"].to_dict() == {1: 2.5, 2: 2.5, 3: 1.0, 4: 1.0}
    assert validated["R10"].to_dict() == {2: 0.1, 4: 0.7}


def test_a_run_resumed_before_a_validation_has_lost_it(write):
    path = write("run.jsonl", training(1), training(2), validation(2), training(2))
    assert plot_training.read_run(path)[1].empty


def test_losses_that_are_not_finite_leave_gaps_in_both_lines(write):
    losses = {step: math.nan if 50 <= step < 60 else 2.0 + step % 2 for step in range(1, 101)}
    path = write("run.jsonl", *(training(step, loss) for step, loss in losses.items()))
    figure = plot_training.draw({"run": plot_training.read_run(path)})
    faint, smooth, _ = figure.axes[0].get_lines()
    assert faint.get_alpha() < 1
    for line in (faint, smooth):
        assert np.isnan(line.get_ydata())[49:59].all() and np.isnan(line.get_ydata()).sum() == 10
    assert np.nanstd(smooth.get_ydata()) < 0.5 * np.nanstd(faint.get_ydata())


def test_partial_and_foreign_lines_are_skipped(write):
    path = write("run.jsonl", training(1))
    append(path, '{"epoch": 1, "step": 2, "lo\n3\n[]\n{"step": "4", "loss": 1}\n')
    append_record(path, training(5))
    assert list(plot_training.read_run(path)[0].index) == [1, 5]


def test_several_runs_share_the_panels_and_are_named(write):
    one = write("one.jsonl", training(1), training(2), validation(2))
    two = write("two.jsonl", training(1), training(3))
    runs = {path.stem: plot_training.read_run(path) for path in (one, two)}
    figure = plot_training.draw(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    panels = {panel.get_title("left"): panel for panel in figure.axes}
    assert list(panels) == [
        *("loss", "learning rate", "clips per second", "waiting for data (%)"),
        *("validation: recall (%)", "validation: median rank"),
    ]
    lines = panels["waiting for data (%)"].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[25, 25], [25, 25]]
    assert [list(line.get_xdata()) for line in lines] == [[1, 2], [1, 3]]
    recalls = [line.get_ydata()[0] for line in panels["validation: recall (%)"].get_lines()]
    assert recalls == [10, 25, 50]


@pytest.mark.parametrize("candidates", [1, 5])
def test_the_loss_of_chance_is_that_of_constant_embeddings(write, candidates):
    runs = {"run": plot_training.read_run(write("run.jsonl", training(1), training(2)))}
    chance = plot_training.draw(runs).axes[0].get_lines()[-1]
    loss = MILNCELoss()(torch.ones(8, 4), torch.ones(8 * candidates, 4))
    assert list(chance.get_xdata()) == [1, 2]
    assert list(chance.get_ydata()) == pytest.approx([loss.item()] * 2)


def test_a_log_without_batch_sizes_has_no_loss_of_chance(write):
    record = training(1)
    del record["batch_size"]
    figure = plot_training.draw({"run": plot_training.read_run(write("run.jsonl", record))})
    assert np.isnan(figure.axes[0].get_lines()[-1].get_ydata()).all()
    assert figure.axes[0].get_legend() is None


def test_no_legend_covers_a_curve(write):
    path = write("run.jsonl", *(training(s) for s in range(1, 9)), validation(8))
    run = plot_training.read_run(path)
    figure = plot_training.draw({f"{'long name ' * 4}{number}": run for number in range(5)})
    figure.canvas.draw()
    boxes = [panel.get_window_extent() for panel in figure.axes]
    titles = [panel._left_title.get_window_extent() for panel in figure.axes]
    inside = [panel.get_legend() for panel in figure.axes if panel.get_legend()]
    assert len(inside) == 2
    for legend in (*inside, *figure.legends):
        shown = legend.get_window_extent()
        assert not any(shown.overlaps(box) for box in (*boxes, *titles))
        assert shown.x0 >= 0 and shown.x1 <= figure.bbox.width


def test_the_picture_is_a_png_and_runs_of_one_name_are_told_apart(
    write, tmp_path, monkeypatch, capsys
):
    (tmp_path / "other").mkdir()
    paths = [write(name, training(1), training(2)) for name in ("run.jsonl", "other/run.jsonl")]
    out = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["plot_training.py", *map(str, paths), f"--out={out}"])
    run_script(plot_training.main)
    said = capsys.readouterr().out
    assert all(str(path) in said for path in paths)
    with Image.open(out) as image:
        image.load()
        assert image.format == "PNG" and image.width > 800


@pytest.mark.parametrize("content", [None, b"", b"\x00\xff\xfe", b"[1, 2]\n", b'{"step": 1}\n'])
def test_a_file_that_is_not_a_log_is_rejected(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_bytes(content)
    status, error = run_main(plot_training, monkeypatch, capsys, path, f"--out={tmp_path}/out.png")
    assert status == 2 and error.count("\n") == 1 and str(path) in error
    assert not (tmp_path / "out.png").exists()


def test_a_folder_is_rejected(tmp_path, monkeypatch, capsys):
    status, error = run_main(
        plot_training, monkeypatch, capsys, tmp_path, f"--out={tmp_path}/out.png"
    )
    assert status == 2 and error.count("\n") == 1 and str(tmp_path) in error


@pytest.mark.parametrize("out", ["absent/out.png", "."])
def test_an_unwritable_output_is_rejected(out, write, tmp_path, monkeypatch, capsys):
    path = write("run.jsonl", training(1))
    status, error = run_main(plot_training, monkeypatch, capsys, path, f"--out={tmp_path / out}")
    assert status == 2 and error.count("\n") == 1 and "--out" in error


def test_a_missing_argument_is_rejected(monkeypatch, capsys):
    status, error = run_main(plot_training, monkeypatch, capsys)
    assert status == 2 and error.count("\n") == 1 and "RUN.jsonl" in error
