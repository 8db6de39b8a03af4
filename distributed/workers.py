"""Processes that read samples, and a pool that outlives the samples that kill or hang them.

A data set says in `fields` what an item holds: {name: (shape, dtype)}. Items are written into
memory that all processes share, so that neither pixels nor file handles travel. torch's DataLoader
ends the run where a worker dies, and at any line of the main program; this is what it lacks.
"""

import gc
import math
import mmap
import multiprocessing
import signal
import time
import traceback
from collections import deque
from itertools import chain
from multiprocessing.connection import wait
from multiprocessing.util import Finalize

import torch

from utils import STOP_SIGNALS, die_with_parent

QUEUED = 500  # tasks that wait at a worker: few enough for a pipe, so that sending never blocks


class WorkerFailure(str):
    """An error that cost the worker: what the item did to it."""


def described(error, path):
    """An item's error as one line that names its file, as those of the decoder do."""
    return f"{path}: it {error}" if isinstance(error, WorkerFailure) else error


def sample_batches(
    dataset,
    batches,
    *,
    workers,
    timeout,
    prefetch=None,
    pin_memory=False,
    retry=lambda key, error: None,
    on_sample=lambda: None,
):
    """Yields, for each list of keys, the items as one dict of tensors [len(keys), ...].

    It also has "errors", a list with None or the item's error: its own, or a WorkerFailure where it
    crashed its worker or took more than `timeout` seconds. That costs this item only. retry(key,
    error) gives another key to take its place, or None to leave it at that; its tensors are then
    not filled. on_sample is called for every item that is done. `prefetch` batches are in work
    besides the one yielded, whose tensors are used again after the next one is asked for. Without
    workers all is done here, crashes included.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    size = len(first)  # of the largest batch: none that follows is larger
    if prefetch is None:
        prefetch = prefetch_depth(size, workers)
    ring = (prefetch + 1) * size if workers else size
    memory = {name: shared_tensor((ring, *s), t) for name, (s, t) in dataset.item_spec.items()}
    pool = Pool(dataset, memory, workers, timeout) if workers else SerialPool(dataset, memory)
    # Position n, counted over all keys, is written at n % ring: a batch lies in one piece.
    waiting = deque()  # batches in work: (first position, errors, positions that are not done)
    submitted = 0

    def submit(keys):
        nonlocal submitted
        for place, key in enumerate(keys):
            pool.submit((submitted + place) % ring, key)
        waiting.append([submitted % ring, [None] * len(keys), len(keys)])
        submitted += size

    try:
        while True:
            while len(waiting) <= prefetch * bool(workers) and (keys := next(batches, None)):
                submit(keys)
            if not waiting:
                return
            while waiting[0][2]:
                for slot, key, error in pool.finished():
                    on_sample()
                    other = retry(key, error) if error else None
                    if other is not None:
                        pool.submit(slot, other)
                        continue
                    batch = next(b for b in waiting if b[0] == slot - slot % size)
                    batch[1][slot % size] = error
                    batch[2] -= 1
            start, errors, _ = waiting.popleft()
            tensors = {name: t[start : start + len(errors)] for name, t in memory.items()}
            # A copy of the caller's own: the ring's memory is used again.
            tensors = {n: t.pin_memory() if pin_memory else t.clone() for n, t in tensors.items()}
            yield {**tensors, "errors": errors}
    finally:
        pool.close()


def prefetch_depth(size, workers):
    """How many batches to have in work: two items a worker, three batches where they are small."""
    return max(3, math.ceil(2 * workers / size)) if size > 1 else 2 * workers


def shared_tensor(shape, dtype):
    """A tensor that forked processes share. Unlike torch's own it needs no space in /dev/shm."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def read_item(dataset, key, memory, slot):
    """Reads an item into its slot. Returns its error or None."""
    item = dataset[key]
    if "error" in item:
        return item["error"]
    for name, tensor in memory.items():
        tensor[slot] = item[name]
    return None


class SerialPool:
    """The interface of Pool without a process."""

    def __init__(self, dataset, memory):
        self.dataset, self.memory = dataset, memory
        self.tasks = deque()

    def submit(self, slot, key):
        self.tasks.append((slot, key))

    def finished(self):
        slot, key = self.tasks.popleft()
        return [(slot, key, read_item(self.dataset, key, self.memory, slot))]

    def close(self):
        pass


class Pool:
    """Worker processes; each task costs at most `timeout` seconds and at most itself."""

    def __init__(self, dataset, memory, workers, timeout):
        self.dataset, self.memory, self.timeout = dataset, memory, timeout
        self.pending = deque()  # tasks (slot, key) that no worker has yet
        self.retried = set()  # tasks at which a worker was killed from outside
        self.workers = []
        # At the program's exit, multiprocessing would send what still runs a SIGTERM, which the
        # workers ignore, and wait for them.
        self.close = Finalize(self, end_workers, (self.workers,), exitpriority=0)
        for _ in range(workers):
            self.workers.append(Worker(dataset, memory))

    def submit(self, slot, key):
        self.pending.append((slot, key))
        self.hand_out()

    def hand_out(self):
        while self.pending:
            worker = min(self.workers, key=lambda worker: len(worker.tasks))
            if len(worker.tasks) == QUEUED or not worker.send(self.pending[0]):
                return
            self.pending.popleft()

    def finished(self):
        """Waits for something to happen. Returns what is done: a list of (slot, key, error)."""
        now = time.monotonic()
        late = min((w.since + self.timeout for w in self.workers if w.tasks), default=math.inf)
        channels = [end for w in self.workers for end in (w.results, w.process.sentinel)]
        wait(channels, None if late == math.inf else max(0, late - now))
        done = []
        for place, worker in enumerate(self.workers):
            alive = worker.receive(done)
            if alive and worker.is_late(self.timeout):
                # The whole job may have been suspended: a second look.
                wait([worker.results], 1)
                alive = worker.receive(done)
            if alive and worker.is_late(self.timeout):
                worker.process.kill()
                reason = f"took its data worker more than {self.timeout:g} s"
            elif not alive:
                reason = f"crashed its data worker ({worker.end()})"
            else:
                continue
            if (
                worker.tasks
                and reason.endswith("(SIGKILL)")
                and worker.tasks[0] not in self.retried
            ):
                # From outside, for lack of memory as a rule: not its fault the first time.
                self.retried.add(worker.tasks[0])
            elif worker.tasks:
                done.append((*worker.tasks.popleft(), WorkerFailure(reason)))
            self.pending.extendleft(reversed(worker.tasks))
            self.workers[place] = Worker(self.dataset, self.memory)
            worker.close()
        self.hand_out()
        return done


def end_workers(workers):
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.close()


class Worker:
    """A process, the tasks it was sent, the first of which it is at, and since when it is."""

    def __init__(self, dataset, memory):
        context = multiprocessing.get_context("fork")  # shares the data set and the memory
        tasks, self.outbox = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        self.process = context.Process(
            target=worker_main, args=(dataset, memory, tasks, results), daemon=True
        )
        gc.freeze()  # a collection in the worker would touch, and so copy, all that it shares
        self.process.start()
        gc.unfreeze()
        tasks.close()
        results.close()
        self.tasks = deque()
        self.since = 0.0

    def send(self, task):
        """False where it is dead, which Pool.finished will find: the task is not to blame."""
        try:
            self.outbox.send(task)
        except BrokenPipeError:
            return False
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        return True

    def receive(self, done):
        """Adds to `done` what it has finished. False where it is dead."""
        try:
            while self.results.poll():
                error, failure = self.results.recv()
                if failure:
                    raise RuntimeError(f"a data worker failed\n{failure}")
                done.append((*self.tasks.popleft(), error))
                self.since = time.monotonic()
        except (EOFError, OSError):
            return False
        return True

    def is_late(self, timeout):
        return bool(self.tasks) and time.monotonic() > self.since + timeout

    def end(self):
        """How it ended, for a message."""
        self.process.join()
        status = self.process.exitcode
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self):
        self.outbox.close()
        self.results.close()
        self.process.join(5)  # longer where it hangs in the kernel, on a file system that is gone
        if self.process.exitcode is not None:
            self.process.close()


def worker_main(dataset, memory, tasks, results):
    """What a worker does, until its parent ends it."""
    die_with_parent()
    for number in (signal.SIGINT, *STOP_SIGNALS):  # they are for the parent to answer
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    while True:
        slot, key = tasks.recv()
        error = failure = None
        try:
            error = read_item(dataset, key, memory, slot)
        except Exception:
            failure = traceback.format_exc()
        results.send((error, failure))
