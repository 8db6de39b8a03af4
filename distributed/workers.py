"""Read samples in worker processes, and survive samples that kill or hang them.

A data set describes an item in `item_spec`: {name: (shape, dtype)}. Workers write items into memory
that all processes share, so neither pixels nor file handles pass through pipes. torch's DataLoader,
in contrast, ends the run when a worker dies.
"""

import gc
import heapq
import math
import multiprocessing
import os
import pickle
import selectors
import signal
import struct
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from typing import Any, NamedTuple, Protocol

import torch

from distributed.batch_memory import BatchMemory, prefetch_items
from utils import STOP_SIGNALS, die_with_parent, hold_stop_signals

QUEUED_BATCHES = 3  # tasks queued at all workers together, in batches
MIN_QUEUED = 16  # but at least this many tasks per worker
LENGTH = struct.Struct("i")  # of the text in a worker's result, see worker_main
LONGEST_WAIT = 1e6  # seconds, close to the limit of epoll


class ItemDataset(Protocol):
    """A data set whose items are dicts of tensors as in item_spec, or {"error": one line}."""

    item_spec: dict[str, tuple[tuple[int, ...], torch.dtype]]

    def __getitem__(self, key: Any) -> dict[str, Any]: ...


class WorkerFailure(str):
    """The error of an item that crashed or hung its worker, as a predicate: "crashed its ..."."""


class Task(NamedTuple):
    slot: tuple[int, int]  # of its item: the place in BatchMemory, and the index in the batch
    key: Any


class Result(NamedTuple):
    slot: tuple[int, int]
    key: Any
    error: str | None


class PendingBatch:
    """A batch whose items are being read into its place of a BatchMemory."""

    def __init__(self, place: int, size: int):
        self.place, self.remaining = place, size
        self.errors: list[str | None] = [None] * size


def sample_batches(
    dataset: ItemDataset,
    batches: Iterable[list],
    *,
    workers: int,
    timeout: float,
    prefetch: int | None = None,
    lend: int = 2,
    pin_memory: bool = False,
    retry: Callable[[Any, str], Any] = lambda key, error: None,
    on_sample: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Yield, for each list of keys, its items as one dict of tensors [len(keys), ...].

    The tensors are the caller's own, in page-locked memory with pin_memory. The dict also has
    "errors": for each item None or its error, which is the item's own, or a WorkerFailure if it
    crashed its worker or took more than `timeout` seconds. Other items are not affected.

    The first batch must be the largest. retry(key, error) returns another key to take the item's
    place, or None to keep the error; the item's tensors are then undefined. on_sample is called
    after each item. `prefetch` items, in whole batches, are read while the caller uses a batch; see
    prefetch_items. With 0 workers everything happens in this process, including crashes.

    lend: how many batches the caller keeps at a time, including the newest. These are not copied:
    the memory that the workers filled is reused when no tensor of the batch, and no view of one, is
    left. A caller that keeps more batches gets copies.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    size = len(first)
    if prefetch is None:
        prefetch = prefetch_items(size, workers)
    depth = math.ceil(prefetch / size) if workers else 0
    memory = BatchMemory(dataset.item_spec, size, max(1, depth) + lend)
    if workers:
        queued = max(MIN_QUEUED, math.ceil(QUEUED_BATCHES * size / workers))
        pool = Pool(dataset, memory.batches, workers, timeout, queued)
    else:
        pool = SerialPool(dataset, memory.batches)
    pending: dict[int, PendingBatch] = {}  # by place, the oldest first

    def submit(depth):
        while len(pending) < depth and (keys := next(batches, None)):
            place = memory.free.pop()
            pending[place] = PendingBatch(place, len(keys))
            pool.submit([Task((place, number), key) for number, key in enumerate(keys)])

    try:
        locked = pin_memory and memory.page_lock()
        while True:
            submit(max(1, depth))
            if not pending:
                return
            batch = next(iter(pending.values()))
            while batch.remaining:
                for slot, key, error in pool.collect():
                    on_sample()
                    other = retry(key, error) if error else None
                    if other is not None:
                        pool.submit([Task(slot, other)], first=True)
                        continue
                    place, number = slot
                    pending[place].errors[number] = error
                    pending[place].remaining -= 1
            del pending[batch.place]
            # Keep enough places free to read ahead, however many batches the caller keeps.
            lent = len(memory.free) >= max(1, depth) - len(pending) and locked == pin_memory
            tensors = memory.lend(batch.place, len(batch.errors))
            if not lent:
                tensors = {
                    name: torch.empty_like(tensor, pin_memory=pin_memory).copy_(tensor)
                    for name, tensor in tensors.items()
                }
            submit(depth)
            yield {**tensors, "errors": batch.errors}
            del tensors  # their memory is the caller's to free
    finally:
        pool.close()


def describe_error(error: str, path: Any) -> str:
    """Describe an item's error in one line that names its file, as the decoder's errors do."""
    return f"{path}: it {error}" if isinstance(error, WorkerFailure) else error


def read_item(
    dataset: ItemDataset, key: Any, batches: list[dict[str, torch.Tensor]], slot: tuple[int, int]
) -> str | None:
    """Read an item into its slot and return its error, if any."""
    item = dataset[key]
    if "error" in item:
        return item["error"]
    place, number = slot
    for name, tensor in batches[place].items():
        tensor[number] = item[name]
    return None


class SerialPool:
    """A pool with the interface of Pool, but without processes."""

    def __init__(self, dataset: ItemDataset, batches: list[dict[str, torch.Tensor]]):
        self.dataset, self.batches = dataset, batches
        self.tasks: deque[Task] = deque()

    def submit(self, tasks: list[Task], first: bool = False) -> None:
        self.tasks.extendleft(tasks) if first else self.tasks.extend(tasks)

    def collect(self) -> list[Result]:
        slot, key = self.tasks.popleft()
        return [Result(slot, key, read_item(self.dataset, key, self.batches, slot))]

    def close(self) -> None:
        pass


class Pool:
    """Worker processes. A task takes at most `timeout` seconds, and never affects another task."""

    def __init__(
        self,
        dataset: ItemDataset,
        batches: list[dict[str, torch.Tensor]],
        workers: int,
        timeout: float,
        queued: int,
    ):
        """queued: maximum of tasks per worker, so that a retry does not wait for all read ahead."""
        self.dataset, self.batches, self.timeout = dataset, batches, timeout
        self.queued = queued
        self.queue: deque[Task] = deque()  # tasks that no worker has yet
        self.retried: list[Task] = []  # a list, as keys may be unhashable; see replace
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()  # of the workers' pipes
        self.check_at = math.inf  # no worker is late before this time
        # At the program's exit multiprocessing would send the workers a SIGTERM, which they ignore,
        # and wait for them.
        self.close = Finalize(self, close_pool, (self.workers, self.selector), exitpriority=0)
        for _ in range(workers):
            with hold_stop_signals():  # a worker missing from the list would outlive a Ctrl-C
                self.workers.append(Worker(dataset, batches, self.selector))

    def submit(self, tasks: list[Task], first: bool = False) -> None:
        """Queue tasks, in front of all others if `first`, for a batch that waits for them."""
        self.queue.extendleft(tasks) if first else self.queue.extend(tasks)
        self.dispatch()

    def dispatch(self) -> None:
        """Send tasks to the workers that have done half of theirs, first to the least loaded."""
        loads = [(len(worker.tasks), place) for place, worker in enumerate(self.workers)]
        loads = [(load, place) for load, place in loads if load <= self.queued // 2]
        heapq.heapify(loads)
        shares = [[] for _ in self.workers]
        while self.queue and loads:
            load, place = heapq.heappop(loads)
            shares[place].append(self.queue.popleft())
            if load + 1 < self.queued:
                heapq.heappush(loads, (load + 1, place))
        for worker, tasks in zip(self.workers, shares, strict=True):
            if tasks and not worker.send(tasks):
                self.queue.extendleft(reversed(tasks))
            elif tasks:
                self.check_at = min(self.check_at, worker.since + self.timeout)

    def collect(self) -> list[Result]:
        """Wait for an event and return the results so far. Replaces dead and late workers."""
        left = max(0, self.check_at - time.monotonic())
        done = []
        events = self.selector.select(None if left == math.inf else min(left, LONGEST_WAIT))
        for key, ready in events:
            if ready & selectors.EVENT_WRITE:
                key.data.flush()
        for key, ready in events:
            if ready & selectors.EVENT_READ and not key.data.receive(done):
                self.replace(key.data, done)
        if time.monotonic() >= self.check_at:
            self.replace_late_workers(done)
        self.dispatch()
        return done

    def replace_late_workers(self, done: list[Result]) -> None:
        for worker in list(self.workers):
            if worker.is_late(self.timeout):
                # The whole job may have been suspended: check again.
                wait([worker.results], 1)
                alive = worker.receive(done)
                if not alive:
                    self.replace(worker, done)
                elif worker.is_late(self.timeout):
                    worker.process.kill()
                    reason = f"took its data worker more than {self.timeout:g} s"
                    self.replace(worker, done, reason)
        self.check_at = min(
            (w.since + self.timeout for w in self.workers if w.tasks), default=math.inf
        )

    def replace(self, worker: "Worker", done: list[Result], late: str = "") -> None:
        """Replace a worker that has crashed or been killed, and queue its tasks again.

        late: why it was killed, if it was late. Its current task then fails with that reason.
        """
        status = worker.describe_exit()
        if (
            worker.tasks
            and status == "SIGKILL"
            and not late
            and worker.tasks[0] not in self.retried
        ):
            # From outside, usually by the OOM killer: not the task's fault the first time.
            self.retried.append(worker.tasks[0])
        elif worker.tasks:
            reason = late or f"crashed its data worker ({status})"
            done.append(Result(*worker.tasks.popleft(), WorkerFailure(reason)))
        self.queue.extendleft(reversed(worker.tasks))
        place = self.workers.index(worker)
        with hold_stop_signals():
            self.workers[place] = Worker(self.dataset, self.batches, self.selector)
            worker.close()


def close_pool(workers: list["Worker"], selector: selectors.BaseSelector) -> None:
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.close()
    selector.close()


class Worker:
    """A worker process and the tasks that it was sent.

    tasks: the process has worked on the first one since the time `since`. This process never waits
    for the worker to read: what does not fit into the pipe is sent when the selector reports room.
    """

    def __init__(
        self,
        dataset: ItemDataset,
        batches: list[dict[str, torch.Tensor]],
        selector: selectors.BaseSelector,
    ):
        inbox, self.outbox = os.pipe()
        self.results, replies = os.pipe()
        context = multiprocessing.get_context("fork")  # shares the data set and the memory
        self.process = context.Process(
            target=worker_main, args=(dataset, batches, inbox, replies), daemon=True
        )
        gc.freeze()  # a collection in the worker would write to, and so copy, all shared objects
        self.process.start()
        gc.unfreeze()
        os.close(inbox)
        os.close(replies)
        self.tasks: deque[Task] = deque()
        self.since = 0.0
        self.unsent = self.unread = b""
        self.selector = selector
        for end in (self.outbox, self.results):
            os.set_blocking(end, False)
        selector.register(self.results, selectors.EVENT_READ, self)

    def send(self, tasks: list[Task]) -> bool:
        """Send tasks. Return False, without sending them, if the process is dead (see collect)."""
        # Plain tuples take fewer bytes, without the name of the class.
        self.unsent += pickle.dumps([tuple(task) for task in tasks])
        if not self.flush():
            return False
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.extend(tasks)
        return True

    def flush(self) -> bool:
        """Send as much as the pipe has room for. Return False if the process is dead."""
        alive, waited = True, self.outbox in self.selector.get_map()
        try:
            self.unsent = self.unsent[os.write(self.outbox, self.unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            alive, self.unsent = False, b""
        if self.unsent and not waited:
            self.selector.register(self.outbox, selectors.EVENT_WRITE, self)
        elif waited and not self.unsent:
            self.selector.unregister(self.outbox)
        return alive

    def receive(self, done: list[Result]) -> bool:
        """Append the results so far to `done`. Return False if the process is dead."""
        try:
            read = os.read(self.results, 1 << 16)
        except BlockingIOError:
            return True
        data, start = self.unread + read, 0
        while len(data) >= start + LENGTH.size:
            [length] = LENGTH.unpack_from(data, start)
            end = start + LENGTH.size + abs(length)
            if len(data) < end:
                break
            text = data[start + LENGTH.size : end].decode(errors="surrogatepass")
            if length < 0:
                raise RuntimeError(f"a data worker failed\n{text}")
            done.append(Result(*self.tasks.popleft(), text or None))
            start = end
        if start:
            self.since = time.monotonic()
        self.unread = data[start:]
        return bool(read)

    def is_late(self, timeout: float) -> bool:
        return bool(self.tasks) and time.monotonic() > self.since + timeout

    def describe_exit(self) -> str:
        self.process.join()
        status = self.process.exitcode
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def close(self) -> None:
        for end in (self.outbox, self.results):
            if end in self.selector.get_map():
                self.selector.unregister(end)
            os.close(end)
        self.process.join(5)  # takes longer if it hangs in the kernel, on a lost file system
        if self.process.exitcode is not None:
            self.process.close()


def worker_main(dataset, batches, inbox: int, replies: int) -> None:
    """Read the items of the tasks that arrive, until the parent ends this process.

    The result of a task is the length of a text, and the text: the item's error, or empty. With a
    negative length, the text is the traceback of a bug.
    """
    die_with_parent()
    for number in STOP_SIGNALS:  # the parent handles them
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    with open(inbox, "rb") as tasks, open(replies, "wb", buffering=0) as results:
        while True:
            for slot, key in pickle.load(tasks):
                sign = 1
                try:
                    text = read_item(dataset, key, batches, slot) or ""
                except Exception:
                    sign, text = -1, traceback.format_exc()
                text = text.encode(errors="surrogatepass")
                result = LENGTH.pack(sign * len(text)) + text
                while result:  # the pipe takes a long one in pieces
                    result = result[results.write(result) :]
