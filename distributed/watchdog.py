"""Ends a process of a run that no rank of the run gets any further with, and says which rank."""

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

from utils import log


class Heartbeat(NamedTuple):
    """What a rank tells the others every few seconds."""

    beats: int  # of its watchdog
    signs: int  # of life: places passed and samples done
    passed: int  # places
    rank: str
    place: str
    line: str  # of the program, that the main thread is at
    communicates: bool  # whether that is in a collective operation


def line_of_main_thread():
    """Heartbeat's line and communicates, of this process."""
    code = sys._current_frames()[threading.main_thread().ident]
    path = code.f_code.co_filename
    communicates = "torch/distributed/" in path or path.endswith("torch/nn/parallel/distributed.py")
    return f"{os.path.basename(path)}:{code.f_lineno}", communicates


class Watchdog:
    """Tells the other ranks where this one is, and watches whether any of them gets on.

    Every rank passes the same places in the same order: a hung rank is the one that has passed the
    fewest, a dead one is that whose watchdog is silent. They talk through the rendezvous's store,
    which works where the process group is stuck.
    """

    def __init__(self, store, rank, world_size, timeout):
        """timeout: seconds without progress of any rank after which this process ends."""
        self.store, self.rank, self.timeout = store, rank, timeout
        self.keys = [f"watchdog/{other}" for other in range(world_size)]
        self.interval = min(timeout / 10, max(5, world_size / 20))
        self.passed, self.place, self.samples, self.beats = 0, "the start", 0, 0
        self.host = socket.gethostname()
        self.seen = {}  # rank -> (its last report, when its beats rose, when its signs rose)
        self.answered = time.monotonic()  # when the store last did
        self.awake = self.answered  # since when this process was not suspended
        self.ended = threading.Event()
        self.threads = [
            threading.Thread(target=work, daemon=True) for work in (self.watch, self.guard)
        ]
        self.report()

    def start(self):
        """To be called when every rank has made its own."""
        for thread in self.threads:
            thread.start()

    def enter_stage(self, place):
        """The main thread has come to this place, named for a message."""
        self.place = place
        self.passed += 1

    def on_sample(self):
        """A sample is done: a sign of life at a place that may take long."""
        self.samples += 1

    def stop(self):
        self.ended.set()
        for thread in self.threads:
            if thread.is_alive():
                thread.join(self.interval)  # longer only in a call of a store that is gone

    def report(self):
        self.beats += 1
        name = f"rank {self.rank} ({self.host})"
        signs = self.passed + self.samples
        report = (self.beats, signs, self.passed, name, self.place, *line_of_main_thread())
        self.store.set(self.keys[self.rank], json.dumps(report))

    def look(self):
        """Reads where all ranks are."""
        now = time.monotonic()
        for rank, text in enumerate(self.store.multi_get(self.keys)):
            report = Heartbeat(*json.loads(text))
            before, beat, rose = self.seen.get(rank, (report, now, now))
            beat = now if report.beats != before.beats else beat
            rose = now if report.signs != before.signs else rose
            self.seen[rank] = (report, beat, rose)

    def watch(self):
        while not self.ended.wait(self.interval):
            try:
                self.report()
                self.look()
            except Exception:  # the store has as many ways to fail as it has backends
                continue  # which guard() counts
            self.answered = time.monotonic()
            quiet = time.monotonic() - max(self.awake, *(rose for *_, rose in self.seen.values()))
            if quiet > self.timeout:
                self.end_process(f"no rank got any further for {quiet:.0f} s: {self.diagnose()}")

    def guard(self):
        """Watches watch(): rank 0, which holds the store, may be frozen, and a call of it too."""
        last = time.monotonic()
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            if now - last > 3 * self.interval:  # the whole job was, as SLURM can do
                self.awake = now
            last = now
            if now - max(self.answered, self.awake) > self.timeout:
                self.end_process(f"rank 0 has not answered for {self.timeout:g} s")

    def dead_ranks(self):
        """The ranks that report nothing any more, as a message, or ''."""
        now = time.monotonic()
        gone = [
            f"{report.rank}, last seen at {report.place}, no longer answers"
            for report, beat, _ in self.seen.values()
            if now - beat > 2.5 * self.interval
        ]
        return "; ".join(gone)

    def diagnose(self):
        if dead := self.dead_ranks():
            return dead
        reports = [report for report, _, _ in self.seen.values()]
        fewest = min(report.passed for report in reports)
        behind = [report for report in reports if report.passed == fewest]
        # Where all wait for each other, the one to blame is none that waits.
        behind = [report for report in behind if not report.communicates] or behind
        if len(behind) == len(reports) > 1:
            return f"all ranks are at {self.place}"
        return "; ".join(f"{r.rank} is at {r.place}, {r.line}" for r in behind)

    def find_dead_ranks(self):
        """Which ranks are gone, once a collective operation has failed; takes a few intervals."""
        try:
            for _ in range(4):
                time.sleep(self.interval)
                self.look()
        except Exception:
            return "rank 0 no longer answers"
        return self.dead_ranks()

    def end_process(self, why):
        log.error("stopping: %s", why)
        print(f"error: rank {self.rank}: {why}; where this rank is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        with contextlib.suppress(Exception):
            logging.shutdown()
        if self.rank == 0:  # without the store the others would blame this rank
            time.sleep(2 * self.interval)
        os._exit(1)  # the data workers go with it
