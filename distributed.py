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

    launcher: str  # "python", "torchrun" or "slurm", for the log
    world_size: int
    first_rank: int
    local_rank: int
    nproc_per_node: int
    spawn: int
    init_method: str


def first_host(node_list):
    """The first host of a SLURM node list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", node_list)[0])


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
    if not url and args.dist_file != "dist-file":
        url = "file://" + os.path.abspath(args.dist_file)

    if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= env.keys():
        local_world = int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
        local_rank = int(env.get("LOCAL_RANK", 0))
        return Launch(
            "torchrun",
            int(env["WORLD_SIZE"]),
            int(env["RANK"]),
            local_rank,
            local_world,
            1,
            "env://",
        )

    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
    if "SLURM_PROCID" in env and tasks > 1:
        nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        task = int(env["SLURM_PROCID"])
        if not url:
            hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
            port = 20000 + int(env.get("SLURM_JOB_ID", 0)) % 40000
            url = f"tcp://{first_host(hosts)}:{port}"
        if tasks > nodes:  # a task a process
            local = int(env.get("SLURM_LOCALID", 0))
            return Launch("slurm", tasks, task, local, max(1, tasks // nodes), 1, url)
        return Launch("slurm", tasks * nproc, task * nproc, 0, nproc, nproc, url)

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
    local_rank: int
    nproc_per_node: int
    device: torch.device


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
        work(args, Process(rank, launch.world_size, local_rank, launch.nproc_per_node, device))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
