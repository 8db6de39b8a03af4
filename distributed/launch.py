"""How the processes of a run are started: plain python, torchrun or SLURM."""

import os
import re
import socket
from dataclasses import dataclass

import torch

from distributed.device import pick_device
from utils import InputError, input_error

DIST_FILE = "dist-file"  # the flag's default, the release's; here it means none


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


def env_int(env, *names, default=0):
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


def detect_launch(args, env=os.environ):
    """Reads off flags and environment which processes there are.

    torchrun is told by RANK and WORLD_SIZE, srun by SLURM_STEP_ID; anything else is plain python.
    Raises InputError where they contradict each other.
    """
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
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
        launch = detect_torchrun(env, url)
    elif "SLURM_STEP_ID" in env and slurm_tasks(env) > 1:
        launch = detect_slurm(args, env, url, max(1, gpus))
    else:
        if "SLURM_PROCID" in env and slurm_tasks(env) > 1:
            raise InputError(
                f"this SLURM job has {slurm_tasks(env)} tasks, but python was started without "
                "srun: put srun before it"
            )
        launch = detect_python(args, env, url, max(1, gpus))

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
class Shard:
    """Which part of a list this process takes: every count-th item, from the index-th on.

    local_rank is its number on this node, of nproc_per_node.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    nproc_per_node: int = 1


def detect_shard(args, env=os.environ):
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
        index, count = env_int(env, "RANK"), env_int(env, "WORLD_SIZE")
        local = env_int(env, "LOCAL_RANK")
        on_node = env_int(env, "LOCAL_WORLD_SIZE", default=1)
        names = f"RANK={index}, WORLD_SIZE={count}"
    elif "SLURM_STEP_ID" in env:
        index, count = env_int(env, "SLURM_PROCID"), slurm_tasks(env)
        local = env_int(env, "SLURM_LOCALID")
        nodes = env_int(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
        on_node = -(-count // max(1, nodes))
        names = f"SLURM_PROCID={index} of {count} tasks"
    if not 0 <= index < count:
        raise InputError(f"{names} in the environment: not a process of these: give --shard")
    if args.shard is not None:
        part, parts = args.shard
        index, count = part * count + index, parts * count
    elif "SLURM_ARRAY_TASK_ID" in env:
        task, first, last, step, tasks = (
            env_int(env, f"SLURM_ARRAY_TASK_{name}", default=default)
            for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
        )
        number, rest = divmod(task - first, max(1, step))
        if rest or not 0 <= number < tasks or (last - first) // max(1, step) + 1 != tasks:
            raise InputError(
                f"the SLURM array's task {task} of {tasks}, from {first} to {last}, is not one of "
                "an even row, so which share it takes is not known: give --shard"
            )
        index, count = number * count + index, tasks * count
    return Shard(index, count, local, on_node)


def workers_per_rank(args, process):
    """This process's share of the node's data workers, one at least unless none are wanted."""
    return min(args.num_thread_reader, max(1, args.num_thread_reader // process.nproc_per_node))


def detect_torchrun(env, url):
    world_size, rank = env_int(env, "WORLD_SIZE"), env_int(env, "RANK")
    if not 0 <= rank < world_size:
        raise InputError(f"RANK={rank} is not below WORLD_SIZE={world_size}: use torchrun")
    if world_size > 1 and not url and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise InputError("RANK and WORLD_SIZE are set, but no MASTER_ADDR and MASTER_PORT")
    local_world = env_int(env, "LOCAL_WORLD_SIZE", default=world_size)
    restarts = env_int(env, "TORCHELASTIC_RESTART_COUNT")
    local = env_int(env, "LOCAL_RANK")
    return Launch("torchrun", world_size, rank, local, local_world, 1, url or "env://", restarts)


def slurm_tasks(env):
    return env_int(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", default=1)


def detect_slurm(args, env, url, gpus):
    tasks, task = slurm_tasks(env), env_int(env, "SLURM_PROCID")
    nodes = env_int(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
    if tasks % nodes or "," in env.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise InputError(f"{tasks} SLURM tasks on {nodes} nodes: give each node as many")
    job, step = env_int(env, "SLURM_JOB_ID", "SLURM_JOBID"), env_int(env, "SLURM_STEP_ID")
    restarts = env_int(env, "SLURM_RESTART_COUNT")
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
        local, on_node = env_int(env, "SLURM_LOCALID"), tasks // nodes
        return Launch("SLURM, a task a process", tasks, task, local, on_node, 1, url, restarts)
    nproc = args.nproc_per_node or gpus
    return Launch(
        "SLURM, a task a node", tasks * nproc, task * nproc, 0, nproc, nproc, url, restarts
    )


def detect_python(args, env, url, gpus):
    nproc = args.nproc_per_node or (1 if args.gpu is not None else gpus)
    nodes, node = max(1, args.world_size), max(0, args.rank)
    if nodes > 1 and not url:
        raise InputError("--world_size above 1 needs --dist_url tcp://host:port, the first node's")
    if node >= nodes:
        raise InputError(f"--rank {node} is not below --world_size {nodes}")
    url = url or f"tcp://127.0.0.1:{free_port()}"
    restarts = env_int(env, "SLURM_RESTART_COUNT")
    return Launch("python", nodes * nproc, node * nproc, 0, nproc, nproc, url, restarts)
