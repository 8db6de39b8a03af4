"""Find out how a run was started: plain python, torchrun or SLURM."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distributed.device import pick_device
from utils import InputError

DIST_FILE = "dist-file"  # the default of --dist_file, kept from the release; it means "not given"


class LaunchError(InputError):
    """Flags and environment contradict each other, or the ranks cannot connect."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run, as seen by one of them before it starts any other.

    This process becomes `spawn` ranks: first_rank, first_rank + 1, .. of world_size. local_rank is
    the first one's number on this node, which has nproc_per_node ranks.
    """

    launcher: str  # for the log
    world_size: int
    first_rank: int
    local_rank: int
    nproc_per_node: int
    spawn: int
    init_method: str  # the address of the rendezvous
    restarts: int = 0  # how often the launcher has restarted this process


@dataclass(frozen=True)
class Shard:
    """The part of a list that one process takes: every count-th item, from the index-th on.

    local_rank is the process's number on its node, which has nproc_per_node processes.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    nproc_per_node: int = 1


def detect_launch(
    *,
    device: str,
    gpu: int | None,
    dist_url: str,
    dist_file: str,
    nproc_per_node: int | None,
    world_size: int,
    rank: int,
    env: Mapping[str, str] = os.environ,
) -> Launch:
    """Detect the processes of a run from flags and environment.

    RANK and WORLD_SIZE mean torchrun, SLURM_STEP_ID means srun, anything else plain python. The
    arguments are the flags of the same names; world_size and rank count nodes, and -1 means "not
    given". Raises LaunchError if flags and environment contradict each other.
    """
    on_gpu = pick_rank_device(device, gpu).type == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else 0
    url = rendezvous_url(dist_url, dist_file)
    nproc = nproc_per_node or (1 if gpu is not None else max(1, gpus))
    if under_torchrun(env):
        launch = detect_torchrun(env, url)
    elif "SLURM_STEP_ID" in env and slurm_tasks(env) > 1:
        launch = detect_slurm(env, url, nproc)
    elif "SLURM_PROCID" in env and slurm_tasks(env) > 1:
        raise LaunchError(
            f"this SLURM job has {slurm_tasks(env)} tasks, but python was started without srun; "
            "put srun before it"
        )
    else:
        launch = detect_python(env, url, nproc, max(1, world_size), max(0, rank))

    if gpu is not None and launch.nproc_per_node > 1:
        raise LaunchError(
            f"--gpu allows one process per node, but there are {launch.nproc_per_node} (launcher: "
            f"{launch.launcher}); drop the flag, or start one process"
        )
    for flag, given, detected in (
        ("nproc_per_node", nproc_per_node, launch.nproc_per_node),
        ("world_size", world_size, launch.world_size // launch.nproc_per_node),
        ("rank", rank, launch.first_rank // launch.nproc_per_node),
    ):
        if given not in (None, -1, detected):
            raise LaunchError(
                f"--{flag} {given} contradicts the launcher ({launch.launcher}), which sets "
                f"{detected}; drop the flag"
            )
    # A launcher may show each process its own GPU only.
    if gpus and launch.nproc_per_node > gpus and not (gpus == 1 and launch.spawn == 1):
        raise LaunchError(
            f"this node has fewer GPUs ({gpus}) than processes ({launch.nproc_per_node}); start "
            "one process per GPU (--nproc_per_node)"
        )
    return launch


def detect_shard(
    shard: tuple[int, int] | None = None, env: Mapping[str, str] = os.environ
) -> Shard:
    """Detect the shard of a process that works without a process group.

    shard: part I of N, from --shard; by default the task of a SLURM job array. M processes that
    torchrun or srun starts divide the part further, so that there are N x M shards. Raises
    LaunchError if the environment does not determine a shard.
    """
    index, count, local_rank, nproc_per_node = 0, 1, 0, 1
    if under_torchrun(env):
        index, count = env_int(env, "RANK"), env_int(env, "WORLD_SIZE")
        local_rank = env_int(env, "LOCAL_RANK")
        nproc_per_node = env_int(env, "LOCAL_WORLD_SIZE", default=1)
        names = f"RANK={index}, WORLD_SIZE={count}"
    elif "SLURM_STEP_ID" in env:
        index, count = env_int(env, "SLURM_PROCID"), slurm_tasks(env)
        local_rank = env_int(env, "SLURM_LOCALID")
        nproc_per_node = -(-count // max(1, slurm_nodes(env)))
        names = f"SLURM_PROCID={index} of {count} tasks"
    if not 0 <= index < count:
        raise LaunchError(f"{names} in the environment is out of range; fix or unset it")
    if shard is None:
        shard = detect_array_task(env) if "SLURM_ARRAY_TASK_ID" in env else (0, 1)
    part, parts = shard
    return Shard(part * count + index, parts * count, local_rank, nproc_per_node)


def detect_array_task(env: Mapping[str, str]) -> tuple[int, int]:
    """Return the index of this task in a SLURM job array, from 0, and the number of tasks."""
    task, first, last, step, tasks = (
        env_int(env, f"SLURM_ARRAY_TASK_{name}", default=default)
        for name, default in (("ID", 0), ("MIN", 0), ("MAX", 0), ("STEP", 1), ("COUNT", 1))
    )
    number, rest = divmod(task - first, max(1, step))
    if rest or not 0 <= number < tasks or (last - first) // max(1, step) + 1 != tasks:
        raise LaunchError(
            f"the tasks of this SLURM array ({tasks} from {first} to {last}) are not evenly "
            f"spaced, so the shard of task {task} is unknown; give --shard"
        )
    return number, tasks


def workers_per_rank(num_workers: int, nproc_per_node: int) -> int:
    """Divide a node's data workers among its ranks: at least one each, unless there are none."""
    return min(num_workers, max(1, num_workers // nproc_per_node))


def pick_rank_device(device: str, gpu: int | None, local_rank: int = 0) -> torch.device:
    """Call pick_device for a rank. Raises LaunchError instead of ValueError."""
    try:
        return pick_device(device, gpu, local_rank)
    except ValueError as error:
        raise LaunchError(f"--device, --gpu: {error}") from None


def rendezvous_url(dist_url: str, dist_file: str) -> str:
    """Return the address that the two flags give, or ""."""
    if dist_file == DIST_FILE:
        if dist_url:
            check_url(dist_url)
        return dist_url
    if dist_url:
        raise LaunchError("--dist_url and --dist_file cannot be combined; drop one")
    return "file://" + os.path.abspath(dist_file)


def check_url(url: str) -> None:
    """Raise LaunchError unless it is the address of a rendezvous."""
    tcp = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.%]+\]|[^\s/:@\[\]]+):(\d{1,5})", url)
    if not (re.match(r"file://.", url) or (tcp and int(tcp[2]) <= 65535)):
        raise LaunchError(f"--dist_url {url} is invalid; give tcp://host:port or file:///path")


def under_torchrun(env: Mapping[str, str]) -> bool:
    if ("RANK" in env) != ("WORLD_SIZE" in env):
        raise LaunchError(
            "only one of RANK and WORLD_SIZE is set in the environment; start with torchrun, which "
            "sets both, or unset it"
        )
    return "RANK" in env


def detect_torchrun(env: Mapping[str, str], url: str) -> Launch:
    world_size, rank = env_int(env, "WORLD_SIZE"), env_int(env, "RANK")
    if not 0 <= rank < world_size:
        raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={world_size}; use torchrun")
    if world_size > 1 and not url and not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise LaunchError(
            "RANK and WORLD_SIZE are set, but MASTER_ADDR and MASTER_PORT are not; use torchrun"
        )
    local_world_size = env_int(env, "LOCAL_WORLD_SIZE", default=world_size)
    restarts = env_int(env, "TORCHELASTIC_RESTART_COUNT")
    local = env_int(env, "LOCAL_RANK")
    url = url or "env://"
    return Launch("torchrun", world_size, rank, local, local_world_size, 1, url, restarts)


def detect_slurm(env: Mapping[str, str], url: str, nproc: int) -> Launch:
    tasks, task, nodes = slurm_tasks(env), env_int(env, "SLURM_PROCID"), slurm_nodes(env)
    if tasks % nodes or "," in env.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise LaunchError(
            f"{tasks} SLURM tasks on {nodes} nodes are unevenly distributed; start as many on each"
        )
    job, step = env_int(env, "SLURM_JOB_ID", "SLURM_JOBID"), env_int(env, "SLURM_STEP_ID")
    restarts = env_int(env, "SLURM_RESTART_COUNT")
    if url.startswith("file://"):
        url += f".{job}.{step}.{restarts}"  # the file of an earlier start would mislead this one
    if not url and {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        check_url(url)
    if not url:
        names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        host = first_host(next((env[name] for name in names if name in env), "127.0.0.1"))
        # Below the ephemeral ports, and different for every step of a job.
        url = f"tcp://{host}:{10000 + (31 * job + step) % 20000}"
    if tasks > nodes:
        local, on_node = env_int(env, "SLURM_LOCALID"), tasks // nodes
        return Launch("SLURM, a task per process", tasks, task, local, on_node, 1, url, restarts)
    launcher = "SLURM, a task per node"
    return Launch(launcher, tasks * nproc, task * nproc, 0, nproc, nproc, url, restarts)


def detect_python(env: Mapping[str, str], url: str, nproc: int, nodes: int, node: int) -> Launch:
    if nodes > 1 and not url:
        raise LaunchError("--world_size above 1 needs --dist_url tcp://host:port of the first node")
    if node >= nodes:
        raise LaunchError(f"--rank {node} is not below --world_size {nodes}")
    url = url or f"tcp://127.0.0.1:{free_port()}"
    restarts = env_int(env, "SLURM_RESTART_COUNT")
    return Launch("python", nodes * nproc, node * nproc, 0, nproc, nproc, url, restarts)


def slurm_tasks(env: Mapping[str, str]) -> int:
    return env_int(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS", default=1)


def slurm_nodes(env: Mapping[str, str]) -> int:
    return env_int(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", default=1)


def env_int(env: Mapping[str, str], *names: str, default: int = 0) -> int:
    """Return the first of these variables that is set. Raises LaunchError if it is no integer."""
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError:
                raise LaunchError(
                    f"{name}={env[name]} in the environment is not a number; unset it"
                ) from None
    return default


def first_host(node_list: str) -> str:
    """Return the first host of a SLURM node list: "gpu[03-05,9],cpu1" -> "gpu03"."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^[]*\])", node_list)[0])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
