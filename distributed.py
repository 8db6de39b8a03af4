"""How the processes of a run find each other, talk and end: plain python, torchrun or SLURM."""

import contextlib
import datetime
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import (
    STOP_SIGNALS,
    InputError,
    die_with_parent,
    log,
    one_line,
    pick_device,
    run_script,
)
from watchdog import Watchdog

DIST_FILE = "dist-file"  # the flag's default, the release's; here it means none
PATIENCE = 10  # of collective operations, in dist_timeouts: the watchdog knows which rank hangs
STOPPED = 75  # exit status after a signal and a checkpoint: start again to go on (EX_TEMPFAIL)


@dataclass(frozen=True)
class Launch:
    """Where this process stands before any other is started.

    It becomes `spawn` processes, the ranks first_rank, first_rank + 1, .. of world_size;
    local_rank is the first one's number on this node, of nproc_per_node.
    """

    launcher: str  # for the log
    world_size: int
    first_rank: int
    local_rank: int
    nproc_per_node: int
    spawn: int
    init_method: str
    restarts: int = 0  # how often the launcher has started it again


def first_host(node_list):
    """The first host of a SLURM node list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", node_list)[0])


def whole_number(env, *names, default=0):
    """The first of these variables that is set. Raises InputError where it is no number."""
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError:
                raise InputError(f"{name}={env[name]} in the environment: not a number") from None
    return default


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def plan_launch(args, env=os.environ):
    """Reads off flags and environment which processes there are.

    torchrun is told by RANK and WORLD_SIZE, srun by SLURM_STEP_ID; anything else is plain python.
    Raises InputError where they contradict each other.
    """
    gpus = torch.cuda.device_count() if pick_device(args).type == "cuda" else 0
    url = args.dist_url
    if url and args.dist_file != DIST_FILE:
        raise InputError("--dist_url and --dist_file exclude each other: drop one")
    if url and not re.match(r"(tcp|file)://.", url):
        raise InputError(f"--dist_url {url}: give tcp://host:port or file:///path")
    if args.dist_file != DIST_FILE:
        url = "file://" + os.path.abspath(args.dist_file)
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        raise InputError(
            "of RANK and WORLD_SIZE one is set, one is not: set both (torchrun) or none"
        )
    if "RANK" in env:
        launch = plan_torchrun(env, url)
    elif "SLURM_STEP_ID" in env and slurm_tasks(env) > 1:
        launch = plan_slurm(args, env, url, max(1, gpus))
    else:
        if "SLURM_PROCID" in env and slurm_tasks(env) > 1:
            raise InputError(
                f"this SLURM job has {slurm_tasks(env)} tasks, but python was started without "
                "srun: put srun before it"
            )
        launch = plan_python(args, env, url, max(1, gpus))

    if args.gpu is not None and launch.nproc_per_node > 1:
        raise InputError(
            f"--gpu takes one process a node, but {launch.launcher} has {launch.nproc_per_node}: "
            "drop it, or start one"
        )
    found = {
        "nproc_per_node": launch.nproc_per_node,
        "world_size": launch.world_size // launch.nproc_per_node,
        "rank": launch.first_rank // launch.nproc_per_node,
    }
    for flag, value in found.items():
        given = getattr(args, flag)
        if given not in (None, -1, value):
            raise InputError(
                f"--{flag} {given}, but started by {launch.launcher} it is {value}: drop the flag"
            )
    # A launcher may show each process its own GPU only.
    if gpus and launch.nproc_per_node > gpus and not (gpus == 1 and launch.spawn == 1):
        raise InputError(
            f"{launch.nproc_per_node} processes on this node, but {gpus} GPUs: start one a GPU "
            "(--nproc_per_node)"
        )
    return launch


@dataclass(frozen=True)
class Share:
    """Which part of a list this process takes: every count-th item, from the index-th on.

    local_rank is its number on this node, of nproc_per_node.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    nproc_per_node: int = 1


def plan_share(args, env=os.environ):
    """The share of a process that works by itself, with no process group: --shard, or else what
    torchrun or srun, and a SLURM job array, say.

    An array of N tasks of M processes each has N x M shares. Raises InputError where the
    variables do not say which.
    """
    index, count, local, on_node = 0, 1, 0, 1
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        raise InputError(
            "of RANK and WORLD_SIZE one is set, one is not: set both (torchrun) or none"
        )
    if "RANK" in env:
        index, count = whole_number(env, "RANK"), whole_number(env, "WORLD_SIZE")
        local = whole_number(env, "LOCAL_RANK")
        on_node = whole_number(env, "LOCAL_WORLD_SIZE", default=1)
        names = f"RANK={index}, WORLD_SIZE={count}"
    elif "SLURM_STEP_ID" in env:
        index, count = whole_number(env, "SLURM_PROCID"), slurm_tasks(env)
        local = whole_number(env, "SLURM_LOCALID")
        nodes = whole_number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
        on_node = -(-count // max(1, nodes))
        names = f"SLURM_PROCID={index} of {count} tasks"
    if not 0 <= index < count:
        raise InputError(f"{names} in the environment: not a process of these: give --shard")
    if args.shard is not None:
        part, parts = args.shard
        index, count = part * count + index, parts * count
    elif "SLURM_ARRAY_TASK_ID" in env:
        task, first, last, step, tasks = (
            whole_number(env, f"SLURM_ARRAY_TASK_{name}", default=default)
            for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
        )
        number, rest = divmod(task - first, max(1, step))
        if rest or not 0 <= number < tasks or (last - first) // max(1, step) + 1 != tasks:
            raise InputError(
                f"the SLURM array's task {task} of {tasks}, from {first} to {last}, is not one of "
                "an even row, so which share it takes is not known: give --shard"
            )
        index, count = number * count + index, tasks * count
    return Share(index, count, local, on_node)


def workers_of(args, process):
    """This process's share of the node's data workers, one at least unless none are wanted."""
    return min(args.num_thread_reader, max(1, args.num_thread_reader // process.nproc_per_node))


def plan_torchrun(env, url):
    world_size, rank = whole_number(env, "WORLD_SIZE"), whole_number(env, "RANK")
    if not 0 <= rank < world_size:
        raise InputError(f"RANK={rank} is not below WORLD_SIZE={world_size}: use torchrun")
    if world_size > 1 and not url and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise InputError("RANK and WORLD_SIZE are set, but no MASTER_ADDR and MASTER_PORT")
    local_world = whole_number(env, "LOCAL_WORLD_SIZE", default=world_size)
    restarts = whole_number(env, "TORCHELASTIC_RESTART_COUNT")
    local = whole_number(env, "LOCAL_RANK")
    return Launch("torchrun", world_size, rank, local, local_world, 1, url or "env://", restarts)


def slurm_tasks(env):
    return whole_number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", default=1)


def plan_slurm(args, env, url, gpus):
    tasks, task = slurm_tasks(env), whole_number(env, "SLURM_PROCID")
    nodes = whole_number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    if tasks % nodes or "," in env.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise InputError(f"{tasks} SLURM tasks on {nodes} nodes: give each node as many")
    job, step = whole_number(env, "SLURM_JOB_ID", "SLURM_JOBID"), whole_number(env, "SLURM_STEP_ID")
    restarts = whole_number(env, "SLURM_RESTART_COUNT")
    if url.startswith("file://"):
        url += f".{job}.{step}.{restarts}"  # a file of an earlier start would mislead this one
    if not url and {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    if not url:
        names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        host = first_host(next((env[name] for name in names if name in env), "127.0.0.1"))
        # Below the ports that systems hand out; another one for every step of a job.
        url = f"tcp://{host}:{10000 + (31 * job + step) % 20000}"
    if tasks > nodes:
        local, on_node = whole_number(env, "SLURM_LOCALID"), tasks // nodes
        return Launch("SLURM, a task a process", tasks, task, local, on_node, 1, url, restarts)
    nproc = args.nproc_per_node or gpus
    return Launch(
        "SLURM, a task a node", tasks * nproc, task * nproc, 0, nproc, nproc, url, restarts
    )


def plan_python(args, env, url, gpus):
    nproc = args.nproc_per_node or (1 if args.gpu is not None else gpus)
    nodes, node = max(1, args.world_size), max(0, args.rank)
    if nodes > 1 and not url:
        raise InputError("--world_size above 1 needs --dist_url tcp://host:port, the first node's")
    if node >= nodes:
        raise InputError(f"--rank {node} is not below --world_size {nodes}")
    url = url or f"tcp://127.0.0.1:{free_port()}"
    restarts = whole_number(env, "SLURM_RESTART_COUNT")
    return Launch("python", nodes * nproc, node * nproc, 0, nproc, nproc, url, restarts)


class Process:
    """One process of a run, as the training sees it."""

    def __init__(self, rank, launch, device, watchdog, group, launchers_store):
        self.rank, self.device, self.launch = rank, device, launch
        self.world_size, self.nproc_per_node = launch.world_size, launch.nproc_per_node
        self.at, self.on_sample = watchdog.at, watchdog.on_sample
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

    def begin(self):
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

    def refuse(self, message):
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
        failed = [end for end in ended if end[0] not in (0, STOPPED)]
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
    device = pick_device(args, local_rank if torch.cuda.device_count() > 1 else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.nproc_per_node))
    store, group, launchers = dist.HashStore(), None, None
    if launch.world_size > 1:
        store, group, launchers = join_group(args, launch, rank, device)
    watchdog = Watchdog(store, rank, launch.world_size, args.dist_timeout)
    process = Process(rank, launch, device, watchdog, group, launchers)
    process.answer_signals()
    try:
        process.gather(None)  # every rank has a watchdog
        watchdog.start()
        work(args, process)
        process.at("the end")
        process.gather(None)  # rank 0 keeps the store until all are done
    except RuntimeError as error:
        # Most likely a collective operation that lacks a rank.
        print(f"rank {rank}: {one_line(error)}", file=sys.stderr, flush=True)
        if launch.world_size > 1 and (gone := watchdog.blame()):
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
    patience = timeout * PATIENCE
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
