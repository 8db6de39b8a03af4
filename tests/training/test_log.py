import csv
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import ROOT, run_at_terminal, scalars
from training import log as log_module
from training.checkpoint import Progress
from training.log import BadSamples, MetricLogger, ThroughputMeter, append_record, read_records
from utils import append


class Alone:
    """The only process of a run."""

    rank, device = 0, torch.device("cpu")

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


def listed(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_each_bad_video_is_listed_once_over_restarts(tmp_path):
    path = tmp_path / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.add(
        [("a.mp4", "absent"), ("b, c.mp4", 'says "no"\nand more'), ("a.mp4", "again")],
        any_rank=True,
    )
    bad.write()
    again = BadSamples(path, Alone())
    again.add([("a.mp4", "absent"), ("日本.mp4", "absent")], any_rank=True)
    again.write()
    expected = [("a.mp4", "absent"), ("b, c.mp4", 'says "no" and more'), ("日本.mp4", "absent")]
    assert listed(path) == expected


def test_quarantined_videos_are_read_back_and_shared_by_the_ranks(tmp_path):
    path = tmp_path / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.context = SimpleNamespace(
        rank=0, gather=lambda own: [own, [("b.mp4", "quarantined: it crashed")]]
    )
    bad.add([("a.mp4", "absent")], any_rank=True)
    bad.write()
    assert bad.quarantined == BadSamples(path, Alone()).quarantined == {"b.mp4"}


def test_a_failed_write_is_tried_again(tmp_path, milnce_log):
    path = tmp_path / "absent folder" / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.add([("a.mp4", "absent")], any_rank=True)
    bad.write()
    assert "could not write" in milnce_log.text
    path.parent.mkdir()
    bad.add([("a.mp4", "absent")], any_rank=True)  # found again
    bad.write()
    assert listed(path) == [("a.mp4", "absent")]


@pytest.mark.parametrize("half", ["a.mp4", '"a, b.mp4","no su', "a.mp4,"])
def test_half_a_line_of_a_killed_run_costs_that_line_only(tmp_path, half):
    path = tmp_path / "run.bad.csv"
    path.write_text(f"path,reason\nc.mp4,absent\n{half}")
    bad = BadSamples(path, Alone())
    assert "c.mp4" in bad.listed
    bad.add([("d.mp4", "absent")], any_rank=True)
    bad.write()
    assert "d.mp4" in BadSamples(path, Alone()).listed


def test_json_lines_survive_half_a_line_and_numbers_that_are_not_finite(tmp_path):
    path = tmp_path / "run.jsonl"
    assert read_records(path) == []
    append_record(path, {"loss": math.nan, "step": 1})
    append(path, '{"loss": 0')
    append_record(path, {"loss": 2.5, "step": 2})
    assert read_records(path) == [{"loss": None, "step": 1}, {"loss": 2.5, "step": 2}]


def log_epochs(folder, first, last, *, loss=2.5, validated=False, tensorboard=True, verbose=1):
    """Log a training of the epochs `first` to `last`, of ten steps each, with a line per step."""
    progress = Progress(epoch=first, step=10 * first)
    logger = MetricLogger(
        Path(folder, "run.jsonl"),
        device=torch.device("cpu"),
        first_step=progress.step,
        tensorboard=Path(folder, "run.tensorboard") if tensorboard else None,
        show_bar=bool(verbose),
    )
    for epoch in range(first, last):
        with logger.show_epoch(epoch + 1, 0, 10):
            meter = ThroughputMeter(torch.device("cpu"))
            for _ in range(10):
                progress.step += 1
                meter.count_step(4)
                logger.bar.update()
                logger.log_training(progress, meter, 0.0, loss, 0.001, total_steps=30)
        progress.epoch += 1
        if validated:
            logger.log_validation(progress, {"R1": 0.25, "MR": 7.0})
    logger.close()


class Event:
    """A mock of a GPU's timing event, which the GPU reaches at the millisecond `now`."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_on_a_gpu_a_step_waits_from_the_end_of_the_last_one_to_the_arrival_of_its_batch(
    monkeypatch,
):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    meter = ThroughputMeter(torch.device("cuda"))
    for done, arrived in ((0, 250), (900, 900), (1500, 1507.25)):
        Event.now = done
        meter.start_wait()
        arrival = meter.end_wait()
        Event.now = arrived
        arrival.record()
        meter.count_step(4)
    assert meter.list_waits() == [250_000, 0, 7250]
    assert meter.restart().list_waits() == []


def test_on_a_cpu_a_step_waits_as_long_as_the_host(monkeypatch):
    clock = iter([0.0, 1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: next(clock))
    meter = ThroughputMeter(torch.device("cpu"))
    for _ in range(2):
        meter.start_wait()
        assert meter.end_wait() is None
    assert meter.list_waits() == [2_500_000, 250_000]


def logging_command(folder, **flags):
    """Return a command that sets up the log as a training does, and logs an epoch."""
    setup = "from utils import setup_logging; setup_logging({}, {!r})".format(
        flags.get("verbose", 1), str(folder / "run.txt")
    )
    return [
        *(sys.executable, "-c"),
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{setup}\n"
        f"from tests.training.test_log import log_epochs\n"
        f"log_epochs({str(folder)!r}, 2, 3, tensorboard=False, **{flags!r})",
    ]


LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 3, step (\d+): loss 2\.5000, .*, bad samples: 0"


def test_at_a_terminal_a_bar_advances_below_whole_log_lines(tmp_path):
    sent = run_at_terminal(*logging_command(tmp_path))
    # A bar returns to the start of its line, and is blanked out before a log line.
    assert re.findall(rf"(?:^|\n|\r *\r){LINE}(?=\r\n)", sent) == [str(s) for s in range(21, 31)]
    bars = [part for part in re.split(r"[\r\n]+", sent) if part.startswith("epoch 3:")]
    assert "0/10" in bars[0] and "10/10" in bars[-1], bars
    assert re.search(r"step.*loss=2\.5000, clips/s=\d", bars[-1]), bars[-1]
    assert re.fullmatch(rf"({LINE}\n){{10}}", (tmp_path / "run.txt").read_text())


def test_without_a_terminal_there_are_only_plain_lines(tmp_path):
    run = subprocess.run(logging_command(tmp_path), check=True, capture_output=True, text=True)
    assert re.fullmatch(rf"({LINE}\n){{10}}", run.stdout) and run.stderr == ""


def test_without_verbose_there_is_no_bar(tmp_path):
    assert run_at_terminal(*logging_command(tmp_path, verbose=0)) == ""


def test_tensorboard_shows_the_records(tmp_path):
    log_epochs(tmp_path, 0, 2, validated=True)
    records = read_records(tmp_path / "run.jsonl")
    expected = {}
    for record in records:
        kind = "validation" if "R1" in record else "training"
        for name in record.keys() - {"step"}:
            expected.setdefault(f"{kind}/{name}", {})[record["step"]] = pytest.approx(record[name])
    assert scalars(tmp_path / "run.tensorboard") == expected
    assert expected["validation/R1"].keys() == {10, 20}
    assert expected["training/loss"].keys() == set(range(1, 21))


def test_after_a_resume_tensorboard_has_each_step_once_and_the_later_value(tmp_path):
    log_epochs(tmp_path, 0, 2, validated=True)
    log_epochs(tmp_path, 1, 3, loss=1.5)
    shown = scalars(tmp_path / "run.tensorboard")
    assert shown["training/loss"] == {s: 2.5 if s <= 10 else 1.5 for s in range(1, 31)}
    assert shown["validation/R1"].keys() == {10}  # the resumed run began after this one


def test_tensorboard_shows_a_nan_loss_as_nan(tmp_path):
    log_epochs(tmp_path, 0, 1, loss=math.nan)
    assert math.isnan(scalars(tmp_path / "run.tensorboard")["training/loss"][3])


def test_event_files_that_cannot_be_written_do_not_end_a_training(
    tmp_path, milnce_log, monkeypatch
):
    """The folder is removed during the training, and the thread that writes ends with an error."""
    monkeypatch.setattr(threading, "excepthook", lambda ended: None)
    folder, cpu = tmp_path / "run.tensorboard", torch.device("cpu")
    logger = MetricLogger(tmp_path / "run.jsonl", device=cpu, tensorboard=folder)
    for step in (1, 2, 3):
        logger.write("training", {"loss": 2.5, "step": step})
        if step == 1:
            shutil.rmtree(tmp_path / "run.tensorboard")
    logger.close()
    assert len(read_records(tmp_path / "run.jsonl")) == 3
    assert milnce_log.text.count("continuing without TensorBoard") == 1


def test_only_the_first_rank_writes(tmp_path):
    folder, cpu = tmp_path / "run.tensorboard", torch.device("cpu")
    logger = MetricLogger(tmp_path / "run.jsonl", rank=1, device=cpu, tensorboard=folder)
    logger.write("training", {"loss": 2.5, "step": 1})
    logger.close()
    assert not list(tmp_path.iterdir())
