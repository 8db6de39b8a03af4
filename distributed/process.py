"""The ranks of a run: how they start, meet, talk and end."""

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distributed.device import pick_device
from distributed.watchdog import Watchdog
from utils import STOP_SIGNALS, InputError, die_with_parent, input_error, log, one_line, run_script

COLLECTIVE_TIMEOUT_FACTOR = (
    10  # of collective operations, in dist_timeouts: the watchdog knows which rank hangs
)


class RankContext:
    """One process of a run, as the training sees it."""

    def __init__(self, rank, launch, device, watchdog, group, launchers_store):
        self.rank, self.device, self.launch = rank, device, launch
        self.world_size, self.nproc_per_node = launch.world_size, launch.nproc_per_node
        self.enter_stage, self.on_sample = watchdog.enter_stage, watchdog.on_sample
        self.group = group  # of gloo, on the CPU: small talk does not wait for the GPUs
        self.launchers_store = launchers_store  # torchrun's, which lives longer than its processes
        self.signal = None  # the name of the first one of STOP_SIGNALS that came

    def __str__(self):
        nodes = self.world_size // self.nproc_per_node
        return (
            f"{self.launch.launcher}: {nodes} x {self.nproc_per_node} processes, on "
            f"{self.device.type}, meeting at {self.launch.init_method}"
        )

    def answer_signals(self):
        def note(number, frame):
            self.signal = self.signal or signal.Signals(number).name

        for number in STOP_SIGNALS:
            signal.signal(number, note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def is_restarted(self):
        """Whether the launcher has started the run before, and past begin()."""
        if self.launchers_store is None:
            return self.launch.restarts > 0
        return self.launchers_store.check(["begun"])

    def mark_started(self):
        """The input is all right: what the launcher starts after this is a restart."""
        if self.launchers_store is not None:
            self.launchers_store.set("begun", "")

    def sum(self, *values):
        """The sums of these whole numbers over all ranks."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def gather(self, value):
        """The ranks' values, in their order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value):
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def abort(self, message):
        """Ends the run for a reason that all ranks have found; it is said once."""
        if self.rank == 0:
            log.error(message)
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.gather(None)
        sys.exit(2)


def start(work, args, launch):
    """Runs work(args, process) in every process of this node and waits for them."""
    if launch.world_size == 1:
        run_process(0, work, args, launch)
        return
    if launch.spawn == 1:
        end_with(lambda: run_process(0, work, args, launch))
    context = mp.get_context("spawn")
    # What is started here inherits the blocked signals: a rank until it can answer them, Python's
    # resource tracker for good.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    processes = [
        context.Process(target=run_spawned, args=(index, work, args, launch))
        for index in range(launch.spawn)
    ]
    for process in processes:
        process.start()
    running = {p.sentinel: (launch.first_rank + i, p) for i, p in enumerate(processes)}

    def pass_on(number, frame):
        for _, process in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    status = 0
    while running:
        ended = []
        for sentinel in wait(list(running)):
            rank, process = running[sentinel]
            process.join()
            del running[sentinel]
            ended.append((process.exitcode, rank))
        failed = [end for end in ended if end[0] not in (0, os.EX_TEMPFAIL)]
        code, rank = min(failed or ended)  # a signal's, if any: what it killed, others failed for
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


def run_spawned(index, work, args, launch):
    die_with_parent()
    end_with(lambda: run_process(index, work, args, launch))


def end_with(main):
    """Runs main() as run_script does and ends the process, without Python's own way of ending: a
    thread of a process group that then asks for the interpreter aborts all, with the work done.
    """
    status = 1
    try:
        run_script(main)
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


def run_process(index, work, args, launch):
    """Joins the process group as the index-th process of this launch and does the work."""
    if launch.launcher == "torchrun":
        die_with_parent()
    rank, local_rank = launch.first_rank + index, launch.local_rank + index
    with input_error("--device, --gpu"):
        local_gpu = local_rank if torch.cuda.device_count() > 1 else 0
        device = pick_device(args.device, args.gpu, local_gpu)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.nproc_per_node))
    store, group, launchers = dist.HashStore(), None, None
    if launch.world_size > 1:
        store, group, launchers = join_group(args, launch, rank, device)
    watchdog = Watchdog(store, rank, launch.world_size, args.dist_timeout)
    process = RankContext(rank, launch, device, watchdog, group, launchers)
    process.answer_signals()
    try:
        process.gather(None)  # every rank has a watchdog
        watchdog.start()
        work(args, process)
        process.enter_stage("the end")
        process.gather(None)  # rank 0 keeps the store until all are done
    except RuntimeError as error:
        # Most likely a collective operation that lacks a rank.
        print(f"rank {rank}: {one_line(error)}", file=sys.stderr, flush=True)
        if launch.world_size > 1 and (gone := watchdog.find_dead_ranks()):
            log.error("stopping: %s", gone)
            print(f"error: rank {rank}: {gone}", file=sys.stderr)
            sys.exit(1)
        raise
    finally:
        watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def join_group(args, launch, rank, device):
    """Meets the other ranks: the store they share, a group of gloo, and torchrun's store if any."""
    timeout = datetime.timedelta(seconds=args.dist_timeout)
    patience = timeout * COLLECTIVE_TIMEOUT_FACTOR
    try:
        rendezvous = dist.rendezvous(launch.init_method, rank, launch.world_size, timeout=timeout)
        store, launchers_store = next(rendezvous)[0], None
        store.set_timeout(timeout)
        if launch.init_method == "env://":
            launchers_store, store = store, fresh_store(store, launch, rank, timeout)
        backend = args.dist_backend if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=launch.world_size,
            timeout=patience,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"rank {rank} of {launch.world_size} did not find the others at {launch.init_method} "
            f"within {args.dist_timeout:g} s (--dist_timeout): {one_line(error)}"
        ) from None
    group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=patience)
    return store.clone(), group, launchers_store


def fresh_store(store, launch, rank, timeout):
    """A store of this start's own, which rank 0 opens. torchrun's has what ranks of earlier starts
    left in it, and no number in the environment tells one start from the next on all nodes: rank 0
    answers whoever says hello, and goes by who is then here.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"hello/{rank}", name)
        host, port = store.get(f"answer/{name}").decode().rsplit(":", 1)
        fresh = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
        fresh.set(f"here/{rank}", "")
        return fresh
    fresh = dist.TCPStore("0.0.0.0", 0, is_master=True, timeout=timeout, wait_for_workers=False)
    address = f"{own_address(launch)}:{fresh.port}"
    missing = set(range(1, launch.world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in list(missing):
            if fresh.check([f"here/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):
                name = store.get(f"hello/{other}").decode()
                store.set(f"answer/{name}", address)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} are missing")
        time.sleep(0.1)
    return fresh


def own_address(launch):
    """The address under which the other nodes find this one."""
    master = os.environ["MASTER_ADDR"]
    if launch.nproc_per_node == launch.world_size:
        return "127.0.0.1"
    port = int(os.environ["MASTER_PORT"])
    family, kind, _, _, target = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        address = probe.getsockname()[0]
    # A node may know itself as a loopback address, by which no other finds it.
    return master if address.startswith("127.") or address == "::1" else address
