"""Read samples in worker processes, and survive samples that kill or hang them.

A data set describes an item in `item_spec`: {name: (shape, dtype)}. Workers write items into memory
that all processes share, so neither pixels nor file handles pass through pipes. torch's DataLoader,
in contrast, ends the run when a worker dies.
"""

import gc
import math
import mmap
import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import torch

from utils import STOP_SIGNALS, die_with_parent

MAX_QUEUED = 500  # tasks that wait at a worker: they fit into its pipe, so sending never blocks


class ItemDataset(Protocol):
    """A data set of which an item is a dict of tensors as in item_spec, or {"error": one line}."""

    item_spec: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def __getitem__(self, key: Any) -> dict[str, Any]: ...


class WorkerFailure(str):
    """The error of an item that crashed or hung its worker: what the item did to it."""


class Task(NamedTuple):
    slot: int  # where in the shared memory its item goes
    key: Any


class Result(NamedTuple):
    slot: int
    key: Any
    error: str | None


class PendingBatch:
    """A batch whose items are being read into the slots from `start` on."""

    def __init__(self, start: int, size: int):
        self.start, self.remaining = start, size
        self.errors: list[str | None] = [None] * size

    def covers(self, slot: int) -> bool:
        return self.start <= slot < self.start + len(self.errors)


def sample_batches(
    dataset: ItemDataset,
    batches: Iterable[list],
    *,
    workers: int,
    timeout: float,
    prefetch: int | None = None,
    pin_memory: bool = False,
    retry: Callable[[Any, str], Any] = lambda key, error: None,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Yield, for each list of keys, its items as one dict of tensors [len(keys), ...].

    The tensors are the caller's own, in page-locked memory with pin_memory. The dict also has
    "errors": for each item None or its error, which is the item's own, or a WorkerFailure if it
    crashed its worker or took more than `timeout` seconds. Such an item costs itself only.

    The first batch is the largest. retry(key, error) returns another key to take the item's place,
    or None to keep the error; the item's tensors are then undefined. on_sample is called after each
    item. `prefetch` batches are read while the caller uses one. With 0 workers everything happens
    in this process, crashes included.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    size = len(first)
    if not workers:
        prefetch = 0
    elif prefetch is None:
        prefetch = prefetch_depth(size, workers)
    slots = max(1, prefetch) * size
    memory = {name: allocate_shared((slots, *s), t) for name, (s, t) in dataset.item_spec.items()}
    pool = Pool(dataset, memory, workers, timeout) if workers else SerialPool(dataset, memory)
    pending: deque[PendingBatch] = deque()
    start = 0  # the first slot of the next batch; the slots are a ring

    def submit(depth):
        nonlocal start
        while len(pending) < depth and (keys := next(batches, None)):
            pending.append(PendingBatch(start, len(keys)))
            for slot, key in enumerate(keys, start):
                pool.submit(Task(slot, key))
            start = (start + size) % slots

    try:
        while True:
            submit(max(1, prefetch))
            if not pending:
                return
            while pending[0].remaining:
                for slot, key, error in pool.collect():
                    on_sample()
                    other = retry(key, error) if error else None
                    if other is not None:
                        pool.submit(Task(slot, other))
                        continue
                    batch = next(b for b in pending if b.covers(slot))
                    batch.errors[slot - batch.start] = error
                    batch.remaining -= 1
            batch = pending.popleft()
            items = slice(batch.start, batch.start + len(batch.errors))
            tensors = {
                name: tensor[items].pin_memory() if pin_memory else tensor[items].clone()
                for name, tensor in memory.items()
            }
            submit(prefetch)
            yield {**tensors, "errors": batch.errors}
            del tensors  # their memory is the caller's to free
    finally:
        pool.close()


def prefetch_depth(size: int, workers: int) -> int:
    """How many batches to prefetch: two items per worker, but three batches of several items."""
    return max(3, math.ceil(2 * workers / size)) if size > 1 else 2 * workers


def describe_error(error: str, path: Any) -> str:
    """Describe an item's error in one line that names its file, as the decoder's errors do."""
    return f"{path}: it {error}" if isinstance(error, WorkerFailure) else error


def allocate_shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate a tensor that forked processes share. Unlike torch's it takes no /dev/shm."""
    count = math.prod(shape)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def read_item(
    dataset: ItemDataset, key: Any, memory: dict[str, torch.Tensor], slot: int
) -> str | None:
    """Read an item into its slot and return its error, if any."""
    item = dataset[key]
    if "error" in item:
        return item["error"]
    for name, tensor in memory.items():
        tensor[slot] = item[name]
    return None


class SerialPool:
    """Has the interface of Pool, without processes."""

    def __init__(self, dataset: ItemDataset, memory: dict[str, torch.Tensor]):
        self.dataset, self.memory = dataset, memory
        self.tasks: deque[Task] = deque()

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def collect(self) -> list[Result]:
        slot, key = self.tasks.popleft()
        return [Result(slot, key, read_item(self.dataset, key, self.memory, slot))]

    def close(self) -> None:
        pass


class Pool:
    """Worker processes. A task costs at most `timeout` seconds, and no other task its result."""

    def __init__(
        self, dataset: ItemDataset, memory: dict[str, torch.Tensor], workers: int, timeout: float
    ):
        self.dataset, self.memory, self.timeout = dataset, memory, timeout
        self.queue: deque[Task] = deque()  # that no worker has yet
        self.retried: list[Task] = []  # their worker was killed; keys may be unhashable
        self.workers: list[Worker] = []
        # At the program's exit multiprocessing would send the workers a SIGTERM, which they ignore,
        # and wait for them.
        self.close = Finalize(self, kill_workers, (self.workers,), exitpriority=0)
        for _ in range(workers):
            self.workers.append(Worker(dataset, memory))

    def submit(self, task: Task) -> None:
        self.queue.append(task)
        self.dispatch()

    def dispatch(self) -> None:
        while self.queue:
            worker = min(self.workers, key=lambda worker: len(worker.tasks))
            if len(worker.tasks) == MAX_QUEUED or not worker.send(self.queue[0]):
                return
            self.queue.popleft()

    def collect(self) -> list[Result]:
        """Wait for something to happen and return what is done since. Replaces lost workers."""
        now = time.monotonic()
        late = min((w.since + self.timeout for w in self.workers if w.tasks), default=math.inf)
        channels = [end for w in self.workers for end in (w.results, w.process.sentinel)]
        wait(channels, None if late == math.inf else max(0, late - now))
        done = []
        for place, worker in enumerate(self.workers):
            alive = worker.receive(done)
            if alive and worker.is_late(self.timeout):
                # The whole job may have been suspended: look again.
                wait([worker.results], 1)
                alive = worker.receive(done)
            if alive and worker.is_late(self.timeout):
                worker.process.kill()
                reason = f"took its data worker more than {self.timeout:g} s"
            elif not alive:
                reason = f"crashed its data worker ({worker.describe_exit()})"
            else:
                continue
            killed = reason.endswith("(SIGKILL)")
            if worker.tasks and killed and worker.tasks[0] not in self.retried:
                # From outside, usually by the OOM killer: not the task's fault the first time.
                self.retried.append(worker.tasks[0])
            elif worker.tasks:
                done.append(Result(*worker.tasks.popleft(), WorkerFailure(reason)))
            self.queue.extendleft(reversed(worker.tasks))
            self.workers[place] = Worker(self.dataset, self.memory)
            worker.close()
        self.dispatch()
        return done


def kill_workers(workers: list["Worker"]) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.close()


class Worker:
    """A process and the tasks that it was sent.

    tasks: the first one is in work, since the time `since`.
    """

    def __init__(self, dataset: ItemDataset, memory: dict[str, torch.Tensor]):
        context = multiprocessing.get_context("fork")  # shares the data set and the memory
        tasks, self.outbox = context.Pipe(duplex=False)
        self.results, results = context.Pipe(duplex=False)
        self.process = context.Process(
            target=worker_main, args=(dataset, memory, tasks, results), daemon=True
        )
        gc.freeze()  # a collection in the worker would touch, and so copy, all that it shares
        # Python drops a KeyboardInterrupt that arrives within a fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        self.process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        gc.unfreeze()
        tasks.close()
        results.close()
        self.tasks: deque[Task] = deque()
        self.since = 0.0

    def send(self, task: Task) -> bool:
        """Return False if the process is dead, as Pool.collect will find; the task is unsent."""
        try:
            self.outbox.send(tuple(task))  # fewer bytes: without the name of the class
        except BrokenPipeError:
            return False
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        return True

    def receive(self, done: list[Result]) -> bool:
        """Append the results so far to `done`. Return False if the process is dead."""
        try:
            while self.results.poll():
                error, failure = self.results.recv()
                if failure:
                    raise RuntimeError(f"a data worker failed\n{failure}")
                done.append(Result(*self.tasks.popleft(), error))
                self.since = time.monotonic()
        except (EOFError, OSError):
            return False
        return True

    def is_late(self, timeout: float) -> bool:
        return bool(self.tasks) and time.monotonic() > self.since + timeout

    def describe_exit(self) -> str:
        self.process.join()
        status = self.process.exitcode
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self) -> None:
        self.outbox.close()
        self.results.close()
        self.process.join(5)  # longer if it hangs in the kernel, on a file system that is gone
        if self.process.exitcode is not None:
            self.process.close()


def worker_main(dataset, memory, tasks, results) -> None:
    """Read the items of a worker's tasks until the parent ends it."""
    die_with_parent()
    for number in STOP_SIGNALS:  # the parent handles them
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
