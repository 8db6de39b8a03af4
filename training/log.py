"""What a training says of itself: lines and a bar for people, JSON and TensorBoard, bad samples."""

import contextlib
import csv
import datetime
import io
import json
import math
import threading
import time
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from utils import append, lines_above, log, one_line
from video_loader import QUARANTINE


def log_path(args, kind):
    """<log_root>/<checkpoint_dir>.txt, .jsonl, ..; a run without a name of its own is `train`."""
    return Path(args.log_root, f"{args.checkpoint_dir or 'train'}.{kind}")


class ThroughputMeter:
    """Counts clips and time from one log line to the next."""

    def __init__(self, began=None, steps=0):
        self.since = time.perf_counter()
        self.began = began or self.since  # of the epoch's first window in this process
        self.steps = steps  # since then
        self.clips, self.waited = 0, 0.0

    def next(self):
        return ThroughputMeter(self.began, self.steps)

    @contextlib.contextmanager
    def waiting(self):
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def count(self, clips):
        self.clips += clips
        self.steps += 1


class MetricLogger:
    """Says how the training stands: in the log, and on rank 0 to the .jsonl, to TensorBoard
    (--tensorboard) and, where stderr is a terminal, by a bar of the epoch's steps.

    step: at which this process starts. What TensorBoard has of later ones, from a run that was
    killed and is resumed before them, it is told to forget.
    """

    def __init__(self, args, process, step):
        self.process = process
        self.records = log_path(args, "jsonl")
        self.hidden = True if process.rank > 0 or not args.verbose else None  # None: no terminal
        # By default bars of all processes share a semaphore, which a rank that is spawned would
        # leave behind (see distributed.end_with).
        tqdm.set_lock(threading.RLock())
        self.bar = tqdm(disable=True)
        self.events = None
        if args.tensorboard and process.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # seconds; not all have the package

            with self.ignore_write_errors():
                folder = log_path(args, "tensorboard")
                self.events = SummaryWriter(folder, purge_step=step + 1)

    @contextlib.contextmanager
    def epoch(self, job):
        """Shows the bar of the epoch that is to be trained, or gone on with."""
        epoch, step = job.progress.epoch, job.progress.step
        first = job.steps_before(epoch)
        bar = tqdm(
            desc=f"epoch {epoch + 1}",
            total=job.steps_before(epoch + 1) - first,
            initial=step - first,
            unit="step",
            leave=False,  # the log has its lines
            dynamic_ncols=True,
            disable=self.hidden,
        )
        with bar, lines_above(bar):
            self.bar = bar
            yield

    def show(self, job, window, loss, lr):
        """How the training stands; `loss` is a number, so the device has done the steps."""
        progress, now = job.progress, time.perf_counter()
        elapsed = now - window.since
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": loss,
            "lr": lr,
            "clips_per_second": window.clips / elapsed,
            "data_wait": window.waited / elapsed,
            "seconds_left": (now - window.began) / window.steps * (job.total_steps - progress.step),
            "bad_samples": progress.bad_samples,
            "skipped_steps": progress.skipped_steps,
        }
        line = (
            "epoch {epoch}, step {step}: loss {loss:.4f}, lr {lr:.3g}, {clips_per_second:.1f} "
            "clips/s, {data_wait:.0%} of the time waiting for data, {left} left, {bad_samples} "
            "bad samples"
        )
        if self.process.device.type == "cuda":
            record["gpu_gib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**30
            line += ", {gpu_gib:.1f} GiB of GPU memory"
        left = datetime.timedelta(seconds=round(record["seconds_left"]))
        log.info(line.format(**record, left=left))
        shown = {"loss": f"{loss:.4f}", "clips/s": f"{record['clips_per_second']:.1f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.write("training", record)

    def show_validation(self, progress, figures):
        """What evaluate_retrieval found after an epoch."""
        log.info("epoch %d, YouCook2: %s", progress.epoch, figures)
        record = {"epoch": progress.epoch, "step": progress.step, **figures}
        self.write("validation", record)

    def write(self, kind, record):
        if self.process.rank > 0:
            return
        append_record(self.records, record)
        if self.events:
            with self.ignore_write_errors():
                for name, value in record.items():
                    if name != "step":
                        self.events.add_scalar(f"{kind}/{name}", value, record["step"])
                self.events.flush()  # what a killed run has said stays said

    def close(self):
        if self.events:
            with self.ignore_write_errors():
                self.events.close()

    @contextlib.contextmanager
    def ignore_write_errors(self):
        """A full disk is no reason to end a training. (The writer's thread raises what it met from
        the call that comes next, and is of no use after it.)
        """
        try:
            yield
        except Exception as error:  # each file system that it can write to has its own
            log.error("going on without TensorBoard, could not write: %s", one_line(error))
            self.events = None


class BadSamples:
    """The list of what could not be read, <log_root>/<checkpoint_dir>.bad.csv, each video once."""

    def __init__(self, path, process):
        self.path, self.process = path, process
        self.found = []  # (video_path, reason) since the last call of write, by this rank
        listed = {}
        if process.rank == 0 and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
            rows = [next(csv.reader([line]), []) for line in lines]
            listed = {row[0]: row[1] for row in rows if len(row) == 2}  # not half a line
        listed = process.broadcast(listed)
        self.listed = set(listed)
        # Passed over by training_batches, which adds to them.
        self.quarantined = {v for v, why in listed.items() if why.startswith(QUARANTINE)}

    def write(self):
        """Adds what any rank has found since to the list. To be called by all ranks."""
        rows = {}
        for video, reason in chain.from_iterable(self.process.gather(self.found)):
            if reason.startswith(QUARANTINE):
                self.quarantined.add(video)
            if video not in self.listed:
                rows.setdefault(video, one_line(reason))
        self.found = []
        if self.process.rank == 0 and rows:
            text = io.StringIO(newline="")
            head = [] if self.path.exists() else [("path", "reason")]
            csv.writer(text, lineterminator="\n").writerows([*head, *rows.items()])
            if append(self.path, text.getvalue()):
                self.listed.update(rows)


def append_record(path, record):
    """Adds one line; a number that JSON does not know, such as a diverged loss, becomes null."""
    record = {name: value if math.isfinite(value) else None for name, value in record.items()}
    append(path, json.dumps(record) + "\n")


def read_records(path):
    """The records of append_record; a line that was not written to its end is passed over."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
