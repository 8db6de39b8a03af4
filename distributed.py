"""How the processes of a run find each other: plain python, torchrun or SLURM."""

import os
import re
import socket
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import InputError, pick_device, run_script


@dataclass(frozen=True)
class Launch:
    """Where this process stands before any other is started.

    It becomes `spawn` processes, the ranks first_rank, first_rank + 1, .. of world_size;
    local_rank is the first one's number on this node, of nproc_per_node.
    """

    launcher: str  # "python", "torchrun" or "SLURM", for the log
    world_size: int
    first_rank: int
    local_rank: int
    nproc_per_node: int
    spawn: int
    init_method: str


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
    """Reads off flags and environment which processes there are. Raises InputError."""
    gpus = torch.cuda.device_count() if pick_device(args).type == "cuda" else 0
    if args.gpu is not None and (args.nproc_per_node or 1) > 1:
        raise InputError("--gpu takes one process: drop it, or --nproc_per_node")
    nproc = args.nproc_per_node or (1 if args.gpu is not None else max(1, gpus))
    if gpus and nproc > gpus:
        raise InputError(f"--nproc_per_node {nproc}: there are {gpus} GPUs here")
    url = args.dist_url
    if url and not re.match(r"(tcp|file)://.", url):
        raise InputError(f"--dist_url {url}: give tcp://host:port or file:///path")
    if not url and args.dist_file != "dist-file":
        url = "file://" + os.path.abspath(args.dist_file)
    has_master = {"MASTER_ADDR", "MASTER_PORT"} <= env.keys()

    world_size = whole_number(env, "WORLD_SIZE")
    if "RANK" in env and world_size:
        if world_size > 1 and not has_master and not url:
            raise InputError("RANK and WORLD_SIZE are set, but no MASTER_ADDR and MASTER_PORT")
        rank, local_rank = whole_number(env, "RANK"), whole_number(env, "LOCAL_RANK")
        local_world = whole_number(env, "LOCAL_WORLD_SIZE", default=world_size)
        return Launch("torchrun", world_size, rank, local_rank, local_world, 1, url or "env://")

    if not url and has_master:
        url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    tasks = whole_number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", default=1)
    if "SLURM_PROCID" in env and tasks > 1:
        nodes = whole_number(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)
        task = whole_number(env, "SLURM_PROCID")
        if not url:
            names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
            hosts = next((env[name] for name in names if name in env), "127.0.0.1")
            port = 20000 + whole_number(env, "SLURM_JOB_ID", "SLURM_JOBID") % 40000
            url = f"tcp://{first_host(hosts)}:{port}"
        if tasks > nodes:  # a task a process
            local = whole_number(env, "SLURM_LOCALID")
            return Launch("SLURM", tasks, task, local, max(1, tasks // nodes), 1, url)
        return Launch("SLURM", tasks * nproc, task * nproc, 0, nproc, nproc, url)

    nodes, node = max(1, args.world_size), max(0, args.rank)
    if nodes > 1 and not url:
        raise InputError("--world_size above 1 needs --dist_url tcp://host:port, the first node's")
    if node >= nodes:
        raise InputError(f"--rank {node} is not below --world_size {nodes}")
    url = url or f"tcp://127.0.0.1:{free_port()}"
    return Launch("python", nodes * nproc, node * nproc, 0, nproc, nproc, url)


@dataclass(frozen=True)
class Process:
    """One process of a run, as the training sees it."""

    rank: int
    world_size: int
    nproc_per_node: int
    device: torch.device
    launcher: str


def start(work, args, launch):
    """Runs work(args, process) in every process of this node and waits for them."""
    if launch.spawn == 1:
        run_process(0, work, args, launch)
        return
    try:
        mp.spawn(run_spawned, args=(work, args, launch), nprocs=launch.spawn)
    except mp.ProcessExitedException as error:
        if error.exit_code == 2:  # the process has said why
            sys.exit(2)
        raise


def run_spawned(index, work, args, launch):
    run_script(lambda: run_process(index, work, args, launch))


def run_process(index, work, args, launch):
    """Joins the process group as the index-th process of this launch and does the work."""
    rank, local_rank = launch.first_rank + index, launch.local_rank + index
    device = pick_device(args, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.nproc_per_node))
    if launch.world_size > 1:
        backend = args.dist_backend if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=launch.init_method, rank=rank, world_size=launch.world_size
        )
    try:
        nproc = launch.nproc_per_node
        work(args, Process(rank, launch.world_size, nproc, device, launch.launcher))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
