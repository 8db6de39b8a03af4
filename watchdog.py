"""Ends a process of a run that no rank of the run gets any further with, and says which rank."""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import threading
import time

from utils import log


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
        self.passed, self.place, self.beats = 0, "the start", 0
        self.host = socket.gethostname()
        self.seen = {}  # rank -> (its last report, when its beats rose, when its places rose)
        self.ended = threading.Event()
        self.report()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self):
        """To be called when every rank has made its own."""
        self.thread.start()

    def at(self, place):
        """The main thread has come to this place, named for a message."""
        self.place = place
        self.passed += 1

    def stop(self):
        self.ended.set()
        self.thread.join()

    def report(self):
        self.beats += 1
        where = f"{self.beats}\n{self.passed}\n{self.host}\n{self.place}"
        self.store.set(self.keys[self.rank], where)

    def look(self):
        """Reads where all ranks are."""
        now = time.monotonic()
        for rank, text in enumerate(self.store.multi_get(self.keys)):
            beats, passed, host, place = text.decode().split("\n")
            report = (int(beats), int(passed), host, place)
            before, beat, rose = self.seen.get(rank, (None, now, now))
            if before and report[0] != before[0]:
                beat = now
            if before and report[1] != before[1]:
                rose = now
            self.seen[rank] = (report, beat, rose)

    def watch(self):
        answered = time.monotonic()
        while not self.ended.wait(self.interval):
            try:
                self.report()
                self.look()
                answered = time.monotonic()
            except Exception:  # the store has as many ways to fail as it has backends
                if time.monotonic() - answered > 3 * self.interval:
                    self.end_process("rank 0 no longer answers")
                continue
            quiet = time.monotonic() - max(rose for _, _, rose in self.seen.values())
            if quiet > self.timeout:
                self.end_process(f"no rank got any further for {quiet:.0f} s: {self.culprit()}")

    def silent(self):
        """The ranks that report nothing any more, as a message, or ''."""
        now = time.monotonic()
        gone = [
            f"rank {rank} ({host}, last seen at {place})"
            for rank, ((_, _, host, place), beat, _) in self.seen.items()
            if now - beat > 2.5 * self.interval
        ]
        return f"{', '.join(gone)} no longer answers" if gone else ""

    def culprit(self):
        if silent := self.silent():
            return silent
        fewest = min(passed for (_, passed, _, _), _, _ in self.seen.values())
        behind = [
            f"rank {rank} ({host}) is at {place}"
            for rank, ((_, passed, host, place), _, _) in self.seen.items()
            if passed == fewest
        ]
        if len(behind) == len(self.keys) > 1:
            return f"all ranks are at {self.place} (their own messages say where in it)"
        return ", ".join(behind)

    def blame(self):
        """Which ranks are gone, once a collective operation has failed; takes a few intervals."""
        try:
            for _ in range(4):
                time.sleep(self.interval)
                self.look()
        except Exception:
            return "rank 0 no longer answers"
        return self.silent()

    def end_process(self, why):
        log.error("stopping: %s", why)
        print(f"error: rank {self.rank}: {why}; where this rank is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()
        with contextlib.suppress(Exception):
            logging.shutdown()
        os._exit(1)  # the data workers go with it
