"""Abort a hung run and report the rank responsible."""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import NamedTuple

import torch.distributed as dist

from utils import log


class Heartbeat(NamedTuple):
    """The report of a rank to the others, every few seconds."""

    beats: int  # heartbeats so far
    progress: int  # stages entered and samples done so far
    stages: int  # stages entered so far
    rank: str  # and host, for messages
    stage: str
    line: str  # of the program, at which the main thread is
    in_collective: bool  # whether that is inside a collective operation


class Seen(NamedTuple):
    """The last heartbeat of a rank, and when its counts last rose, by this process's clock."""

    heartbeat: Heartbeat
    beat_at: float
    progress_at: float


class Watchdog:
    """Report the stage of this rank, and end the process if no rank makes progress.

    Every rank enters the same stages in the same order: a hung rank is the one that has entered the
    fewest, a dead one sends no heartbeats. The ranks communicate through the store of the
    rendezvous, which works even if the process group hangs.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: float):
        """timeout: seconds without progress of any rank after which this process ends."""
        self.store, self.rank, self.timeout = store, rank, timeout
        self.keys = [f"watchdog/{other}" for other in range(world_size)]
        self.interval = min(timeout / 10, max(5, world_size / 20))
        self.beats, self.stages, self.samples = 0, 0, 0
        self.stage = "the start"
        self.host = socket.gethostname()
        self.seen: dict[int, Seen] = {}  # by rank
        self.store_answered_at = time.monotonic()
        self.awake_since = self.store_answered_at  # when this process was last suspended, if ever
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=loop, daemon=True)
            for loop in (self.watch_ranks, self.watch_store)
        ]
        self.send_heartbeat()

    def start(self) -> None:
        """Begin to watch, once every rank has made its watchdog."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join(self.interval)  # takes longer only if the store is gone

    def enter_stage(self, stage: str) -> None:
        """Record that the main thread has reached a stage. Messages contain its name."""
        self.stage = stage
        self.stages += 1

    def on_sample(self) -> None:
        """Record that a sample is done, which is progress within a long stage."""
        self.samples += 1

    def send_heartbeat(self) -> None:
        self.beats += 1
        heartbeat = Heartbeat(
            self.beats,
            self.stages + self.samples,
            self.stages,
            f"rank {self.rank} ({self.host})",
            self.stage,
            *locate_main_thread(),
        )
        self.store.set(self.keys[self.rank], json.dumps(heartbeat))

    def read_heartbeats(self) -> None:
        now = time.monotonic()
        for rank, text in enumerate(self.store.multi_get(self.keys)):
            new = Heartbeat(*json.loads(text))
            old, beat_at, progress_at = self.seen.get(rank, (new, now, now))
            self.seen[rank] = Seen(
                new,
                now if new.beats != old.beats else beat_at,
                now if new.progress != old.progress else progress_at,
            )

    def watch_ranks(self) -> None:
        while not self.stopped.wait(self.interval):
            try:
                self.send_heartbeat()
                self.read_heartbeats()
            except Exception:  # of many types; watch_store limits how long it may last
                continue
            now = self.store_answered_at = time.monotonic()
            idle = now - max(self.awake_since, *(seen.progress_at for seen in self.seen.values()))
            if idle > self.timeout:
                self.end_process(f"no rank made progress for {idle:.0f} s: {self.diagnose()}")

    def watch_store(self) -> None:
        """End the process if the store does not respond: calls to it hang if rank 0 is frozen."""
        last = time.monotonic()
        while not self.stopped.wait(self.interval):
            now = time.monotonic()
            if now - last > 3 * self.interval:  # the whole job was suspended, as SLURM can do
                self.awake_since = now
            last = now
            if now - max(self.store_answered_at, self.awake_since) > self.timeout:
                self.end_process(f"rank 0 has not responded for {self.timeout:g} s")

    def diagnose(self) -> str:
        """Describe the ranks that the others wait for."""
        if dead := self.dead_ranks():
            return dead
        heartbeats = [seen.heartbeat for seen in self.seen.values()]
        fewest = min(heartbeat.stages for heartbeat in heartbeats)
        behind = [heartbeat for heartbeat in heartbeats if heartbeat.stages == fewest]
        # A rank in a collective operation waits for the others: it is not the one responsible.
        behind = [heartbeat for heartbeat in behind if not heartbeat.in_collective] or behind
        if len(behind) == len(heartbeats) > 1:
            return f"all ranks are at {self.stage}"
        return "; ".join(f"{b.rank} is at {b.stage}, {b.line}" for b in behind)

    def dead_ranks(self) -> str:
        """Describe the ranks whose heartbeats have stopped; "" if there are none."""
        now = time.monotonic()
        return "; ".join(
            f"{seen.heartbeat.rank}, last seen at {seen.heartbeat.stage}, no longer responds"
            for seen in self.seen.values()
            if now - seen.beat_at > 2.5 * self.interval
        )

    def find_dead_ranks(self) -> str:
        """Wait a few intervals, after a failed collective operation, and describe dead ranks."""
        try:
            for _ in range(4):
                time.sleep(self.interval)
                self.read_heartbeats()
        except Exception:
            return "rank 0 no longer responds"
        return self.dead_ranks()

    def end_process(self, reason: str) -> None:
        log.error("stopping: %s", reason)
        print(f"error: rank {self.rank}: {reason}; its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        with contextlib.suppress(Exception):
            logging.shutdown()
        if self.rank == 0:  # it may hold the store, without which the others would blame this rank
            time.sleep(2 * self.interval)
        os._exit(1)  # the data workers end with it


def locate_main_thread() -> tuple[str, bool]:
    """Return the fields `line` and `in_collective` of this process's Heartbeat."""
    code = sys._current_frames()[threading.main_thread().ident]
    path = code.f_code.co_filename
    waits = (
        "torch/distributed/" in path
        or path.endswith("torch/nn/parallel/distributed.py")
        or code.f_code.co_name == "wait_for_result"  # of RankContext
    )
    return f"{os.path.basename(path)}:{code.f_lineno}", waits
