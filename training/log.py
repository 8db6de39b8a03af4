"""The logs of a training: text and a progress bar, JSON, TensorBoard, and the bad samples."""

import contextlib
import csv
import datetime
import io
import json
import math
import threading
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from distributed.process import RankContext
from training.checkpoint import Progress
from utils import append, lines_above, log, one_line
from video_loader import QUARANTINE


class ThroughputMeter:
    """Measure the clips, the time and the waits for data from one log line to the next.

    On a CPU, a wait is the host's time from start_wait to end_wait. On a GPU it is the GPU's idle
    time, from the end of its earlier work to the arrival of the batch.
    """

    def __init__(self, device: torch.device, began: float | None = None, steps: int = 0):
        self.device = device
        self.since = time.perf_counter()
        self.began = began or self.since  # start of the epoch's first meter in this process
        self.steps = steps  # since `began`
        self.clips = 0
        self.batch_size = 0  # clips of a step, of all processes
        self.starts, self.ends = [], []  # of the waits: seconds, or events of the GPU

    def restart(self) -> "ThroughputMeter":
        """Return the meter for the next log line."""
        return ThroughputMeter(self.device, self.began, self.steps)

    def start_wait(self) -> None:
        if self.device.type == "cuda":
            self.starts.append(torch.cuda.Event(enable_timing=True))
            self.starts[-1].record()
        else:
            self.starts.append(time.perf_counter())

    def end_wait(self) -> torch.cuda.Event | None:
        """End the wait on the host. On a GPU, return the event to record at the batch's arrival."""
        if self.device.type == "cuda":
            self.ends.append(torch.cuda.Event(enable_timing=True))
            return self.ends[-1]
        self.ends.append(time.perf_counter())
        return None

    def count_step(self, clips: int) -> None:
        self.clips += clips
        self.batch_size = clips
        self.steps += 1

    def list_waits(self) -> list[int]:
        """Return the wait of each step, in microseconds. A GPU must have finished the steps."""
        waits = zip(self.starts, self.ends, strict=True)
        if self.device.type == "cuda":
            return [round(1e3 * start.elapsed_time(end)) for start, end in waits]
        return [round(1e6 * (end - start)) for start, end in waits]


class MetricLogger:
    """Log a training as text and, on rank 0, to a .jsonl file, TensorBoard and a progress bar.

    records: the .jsonl file. first_step: the step at which this process starts; TensorBoard drops
    later ones, which an interrupted run may have logged. tensorboard: the folder of the event
    files, or None. show_bar: whether to show a bar at a terminal.
    """

    def __init__(
        self,
        records: Path,
        *,
        rank: int = 0,
        device: torch.device,
        first_step: int = 0,
        tensorboard: Path | None = None,
        show_bar: bool = True,
    ):
        self.records, self.rank, self.device = records, rank, device
        self.hide_bar = True if rank > 0 or not show_bar else None  # None: unless at a terminal
        # By default the bars of all processes share a semaphore. A spawned rank would leak it,
        # because it exits without Python's clean-up.
        tqdm.set_lock(threading.RLock())
        self.bar = tqdm(disable=True)
        self.events = None
        if tensorboard and rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and optional

            with self.ignore_write_errors():
                self.events = SummaryWriter(tensorboard, purge_step=first_step + 1)

    @contextlib.contextmanager
    def show_epoch(self, epoch: int, done: int, num_steps: int):
        """Show the bar of an epoch of num_steps steps, of which `done` are done."""
        bar = tqdm(
            desc=f"epoch {epoch}",
            total=num_steps,
            initial=done,
            unit="step",
            leave=False,  # the log lines remain
            dynamic_ncols=True,
            disable=self.hide_bar,
        )
        with bar, lines_above(bar):
            self.bar = bar
            yield

    def log_training(
        self,
        progress: Progress,
        meter: ThroughputMeter,
        waited: float,
        loss: float,
        lr: float,
        total_steps: int,
    ) -> None:
        """Log the steps since the last line. `loss` is a number, so the device has finished them.

        waited: seconds of waiting for data, in each step those of the rank that waited longest.
        """
        now = time.perf_counter()
        elapsed = now - meter.since
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": loss,
            "lr": lr,
            "batch_size": meter.batch_size,
            "clips_per_second": meter.clips / elapsed,
            "data_wait": waited / elapsed,
            "seconds_left": (now - meter.began) / meter.steps * (total_steps - progress.step),
            "bad_samples": progress.bad_samples,
            "skipped_steps": progress.skipped_steps,
        }
        line = (
            "epoch {epoch}, step {step}: loss {loss:.4f}, lr {lr:.3g}, {clips_per_second:.1f} "
            "clips/s, {data_wait:.0%} of the time waiting for data, {left} left, bad samples: "
            "{bad_samples}"
        )
        if self.device.type == "cuda":
            record["gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            line += ", {gpu_gib:.1f} GiB of GPU memory"
        left = datetime.timedelta(seconds=round(record["seconds_left"]))
        log.info(line.format(**record, left=left))
        postfix = {"loss": f"{loss:.4f}", "clips/s": f"{record['clips_per_second']:.1f}"}
        self.bar.set_postfix(postfix, refresh=False)
        self.write("training", record)

    def log_validation(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Log the retrieval metrics after an epoch."""
        log.info("epoch %d, YouCook2: %s", progress.epoch, metrics)
        self.write("validation", {"epoch": progress.epoch, "step": progress.step, **metrics})

    def write(self, kind: str, record: dict[str, float]) -> None:
        if self.rank > 0:
            return
        append_record(self.records, record)
        if self.events:
            with self.ignore_write_errors():
                for name, value in record.items():
                    if name != "step":
                        self.events.add_scalar(f"{kind}/{name}", value, record["step"])
                self.events.flush()  # a killed run loses nothing that was logged

    def close(self) -> None:
        if self.events:
            with self.ignore_write_errors():
                self.events.close()

    @contextlib.contextmanager
    def ignore_write_errors(self):
        """Continue without TensorBoard after an error: a full disk must not end a training.

        An error of the writer's thread is raised by the next call, and no call works after it.
        """
        try:
            yield
        except Exception as error:  # its type depends on the file system
            log.error("continuing without TensorBoard, could not write: %s", one_line(error))
            self.events = None


class BadSamples:
    """The list of videos that could not be read, a CSV file (path, reason), each video once."""

    def __init__(self, path: Path, context: RankContext):
        self.path, self.context = path, context
        self.found = []  # (video_path, reason) since the last call of write, by this rank
        self.unlisted = False  # whether any rank has found some since
        listed = {}
        if context.rank == 0 and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            rows = [next(csv.reader([line]), []) for line in lines]
            listed = {row[0]: row[1] for row in rows if len(row) == 2}  # no incomplete line
        listed = context.broadcast(listed)
        self.listed = set(listed)
        # training_batches skips these, and adds to them.
        self.quarantined = {v for v, why in listed.items() if why.startswith(QUARANTINE)}

    def add(self, found: Iterable[tuple[str, str]], any_rank: bool) -> None:
        """Record the videos that this rank has found, and whether any rank has found some."""
        self.found.extend(found)
        self.unlisted |= any_rank

    def write(self) -> None:
        """Append the videos that any rank has found since the last call. All ranks must call it."""
        if not self.unlisted:
            return
        rows = {}
        for video, reason in chain.from_iterable(self.context.gather(self.found)):
            if reason.startswith(QUARANTINE):
                self.quarantined.add(video)
            if video not in self.listed:
                rows.setdefault(video, one_line(reason))
        self.found, self.unlisted = [], False
        if self.context.rank == 0 and rows:
            text = io.StringIO(newline="")
            head = [] if self.path.exists() else [("path", "reason")]
            csv.writer(text, lineterminator="\n").writerows([*head, *rows.items()])
            if append(self.path, text.getvalue()):
                self.listed.update(rows)


def append_record(path: Path, record: dict[str, float]) -> None:
    """Append a record as a line of JSON. A number that is not finite becomes null."""
    record = {name: value if math.isfinite(value) else None for name, value in record.items()}
    append(path, json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict]:
    """Read the records of append_record. Incomplete lines are skipped."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
