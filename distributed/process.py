"""Start and end the ranks of a run, and exchange values between them."""

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist

from distributed.launch import Launch, pick_rank_device
from distributed.rendezvous import Rendezvous, extend_timeout, join_group
from distributed.watchdog import Watchdog
from utils import STOP_SIGNALS, die_with_parent, log, one_line, run_script


class RankContext:
    """A rank of a run, as the training sees it.

    signal: the name of the first of STOP_SIGNALS that arrived, or None. For enter_stage and
    on_sample see Watchdog.
    """

    def __init__(
        self,
        rank: int,
        launch: Launch,
        device: torch.device,
        watchdog: Watchdog,
        rendezvous: Rendezvous,
    ):
        self.rank, self.device, self.launch = rank, device, launch
        self.world_size, self.nproc_per_node = launch.world_size, launch.nproc_per_node
        self.enter_stage, self.on_sample = watchdog.enter_stage, watchdog.on_sample
        self.group = rendezvous.group  # on the CPU, so that exchanging values syncs no GPU
        self.launcher_store = rendezvous.launcher_store
        self.signal: str | None = None

    def __str__(self) -> str:
        nodes = self.world_size // self.nproc_per_node
        return (
            f"{self.launch.launcher}: {nodes} x {self.nproc_per_node} processes, on "
            f"{self.device.type}, rendezvous at {self.launch.init_method}"
        )

    def handle_signals(self) -> None:
        """Record STOP_SIGNALS in `signal` instead of exiting on them."""

        def record(number, frame):
            self.signal = self.signal or signal.Signals(number).name

        for number in STOP_SIGNALS:
            signal.signal(number, record)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def mark_started(self) -> None:
        """Record that the input is valid: if the launcher starts the run again, it is a restart."""
        if self.launcher_store is not None:
            self.launcher_store.set("started", "")

    def is_restarted(self) -> bool:
        """Check whether the launcher restarted this run after it had reached mark_started."""
        if self.launcher_store is None:
            return self.launch.restarts > 0
        return self.launcher_store.check(["started"])

    def start_sum(self, *values: int) -> Callable[[], list[int]]:
        """Begin to sum each value over all ranks, and return a function that waits for the sums."""
        return self.start_reduce(dist.ReduceOp.SUM, values)

    def start_max(self, *values: int) -> Callable[[], list[int]]:
        """Begin to find the maximum of each value over all ranks, like start_sum."""
        return self.start_reduce(dist.ReduceOp.MAX, values)

    def start_reduce(self, op: dist.ReduceOp, values: Sequence[int]) -> Callable[[], list[int]]:
        if self.world_size == 1:
            return lambda: list(values)
        reduced = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(reduced, op, group=self.group, async_op=True)

        def wait_for_result():
            work.wait()
            return reduced.tolist()

        return wait_for_result

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank. This is also a barrier."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def abort(self, message: str) -> None:
        """End the run with status 2. All ranks must call it, and rank 0 reports the message."""
        if self.rank == 0:
            log.error(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.gather(None)
        sys.exit(2)


def start(
    work: Callable[[RankContext], None],
    launch: Launch,
    *,
    device: str,
    gpu: int | None,
    backend: str,
    timeout: float,
) -> None:
    """Run work(context) in every rank of this node and wait for them.

    work: picklable. device, gpu: see pick_device. backend: of the process group on GPUs. timeout:
    seconds without progress of any rank after which the run ends. Returns when all ranks of this
    node have succeeded. Otherwise exits with the status of the rank that failed first, with 1 if it
    was killed, or with os.EX_TEMPFAIL if a signal stopped the ranks.
    """
    settings = {"device": device, "gpu": gpu, "backend": backend, "timeout": timeout}
    run = functools.partial(run_rank, work, launch, **settings)
    if launch.world_size == 1:
        run(0)
    elif launch.spawn == 1:
        run_and_exit(run, 0)
    else:
        wait_for_ranks(spawn_ranks(run, launch))


def spawn_ranks(run: Callable[[int], None], launch: Launch) -> dict:
    """Start the ranks and forward STOP_SIGNALS to them: {sentinel: (rank, process)}."""
    context = multiprocessing.get_context("spawn")
    # The processes inherit the blocked signals. A rank unblocks them when it handles them, Python's
    # resource tracker never.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    processes = [
        context.Process(target=run_spawned, args=(run, index)) for index in range(launch.spawn)
    ]
    for process in processes:
        process.start()
    running = {p.sentinel: (launch.first_rank + i, p) for i, p in enumerate(processes)}

    def forward(number, frame):
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return running


def wait_for_ranks(running: dict) -> None:
    """Wait for the ranks of spawn_ranks. When one fails, kill the others and exit."""
    status = 0
    while running:
        ended = []
        for sentinel in wait(list(running)):
            rank, process = running[sentinel]
            process.join()
            del running[sentinel]
            ended.append((process.exitcode, rank))
        failed = [end for end in ended if end[0] not in (0, os.EX_TEMPFAIL)]
        # A killed rank, if any (its code is negative): the others failed because of it.
        code, rank = min(failed or ended)
        if code < 0:
            print(f"error: rank {rank} was killed by {signal.Signals(-code).name}", file=sys.stderr)
        if failed:
            for _, process in running.values():
                process.kill()
            for _, process in running.values():
                process.join()
            sys.exit(code if code > 0 else 1)
        status = max(status, *(code for code, _ in ended))
    if status:
        sys.exit(status)


def run_spawned(run: Callable[[int], None], index: int) -> None:
    die_with_parent()
    run_and_exit(run, index)


def run_and_exit(main: Callable, *args: Any) -> None:
    """Call main like run_script, then end the process without Python's finalization.

    A thread of a process group that needs the interpreter during finalization aborts the process,
    although the work is done.
    """
    status = 1
    try:
        run_script(functools.partial(main, *args))
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # a full disk
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def run_rank(
    work: Callable[[RankContext], None],
    launch: Launch,
    index: int,
    *,
    device: str,
    gpu: int | None,
    backend: str,
    timeout: float,
) -> None:
    """Join the process group as the index-th rank of this launch and do the work: see start."""
    if launch.launcher == "torchrun":
        die_with_parent()
    rank, local_rank = launch.first_rank + index, launch.local_rank + index
    local_gpu = local_rank if torch.cuda.device_count() > 1 else 0
    own_device = pick_rank_device(device, gpu, local_gpu)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    # Also with a GPU: the ranks' work on the CPU would use all cores, which the workers need.
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.nproc_per_node))
    rendezvous = Rendezvous(dist.HashStore())
    if launch.world_size > 1:
        backend = backend if own_device.type == "cuda" else "gloo"
        # Ctrl-C ends the wait for a missing node: there is nothing to save in a checkpoint yet.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        rendezvous = join_group(launch, rank, backend, timeout)
    watchdog = Watchdog(rendezvous.store, rank, launch.world_size, timeout)
    context = RankContext(rank, launch, own_device, watchdog, rendezvous)
    context.handle_signals()
    try:
        context.gather(None)  # wait until every rank has a watchdog
        watchdog.start()
        if launch.world_size > 1:
            extend_timeout(rendezvous, timeout)
        work(context)
        context.enter_stage("the end")
        context.gather(None)  # rank 0 may hold the store, so it waits until all are done
        if launch.world_size > 1:  # after a failure it could wait for ranks that never come
            dist.destroy_process_group()
    except RuntimeError as error:
        # Most likely from a collective operation in which a rank is missing.
        print(f"rank {rank}: {one_line(error)}", file=sys.stderr, flush=True)
        if launch.world_size > 1 and (dead := watchdog.find_dead_ranks()):
            log.error("stopping: %s", dead)
            print(f"error: rank {rank}: {dead}", file=sys.stderr)
            sys.exit(1)
        raise
    finally:
        watchdog.stop()
