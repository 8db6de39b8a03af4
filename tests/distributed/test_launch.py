import pytest
import torch

from args import get_args
from distributed.launch import LaunchError, Shard, detect_launch, detect_shard, first_host

FLAGS = ("device", "gpu", "dist_url", "dist_file", "nproc_per_node", "world_size", "rank")


def detect(line="", device="cpu", **env):
    """Call detect_launch with the flags of a command line."""
    args = get_args(argv=[*line.split(), f"--device={device}"])
    return detect_launch(**{flag: getattr(args, flag) for flag in FLAGS}, env=env)


@pytest.fixture
def detect_with_gpus(monkeypatch):
    """A function like `detect`, on a node where this process sees a number of GPUs."""

    def detect_on_node(gpus, line="", **env):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return detect(line, device="auto", **env)

    return detect_on_node


def test_plain_python_starts_one_process_or_nproc_per_node():
    launch = detect()
    assert (launch.launcher, launch.world_size, launch.spawn) == ("python", 1, 1)
    launch = detect("--nproc_per_node 3")
    assert (launch.world_size, launch.first_rank, launch.spawn) == (3, 0, 3)
    assert launch.init_method.startswith("tcp://127.0.0.1:")


def test_plain_python_on_several_nodes_needs_an_address():
    launch = detect("--world-size 2 --rank 1 --nproc_per_node 4 --dist-url tcp://a:1")
    assert (launch.world_size, launch.first_rank, launch.init_method) == (8, 4, "tcp://a:1")
    with pytest.raises(LaunchError, match="--dist_url"):
        detect("--world-size 2 --rank 0")
    with pytest.raises(LaunchError, match="--rank"):
        detect("--world-size 2 --rank 2 --dist-url tcp://a:1")


TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


def test_torchrun_has_started_every_process_already():
    launch = detect(**TORCHRUN)
    assert (launch.launcher, launch.world_size, launch.first_rank) == ("torchrun", 4, 3)
    assert (launch.local_rank, launch.nproc_per_node, launch.spawn) == (1, 2, 1)
    assert launch.init_method == "env://"


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_NODES": "2",
}
TASK_PER_NODE = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
TASK_PER_PROCESS = {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}


def test_a_slurm_task_per_node_spawns_the_nodes_processes():
    launch = detect("--nproc_per_node 4", **TASK_PER_NODE)
    assert (launch.world_size, launch.first_rank, launch.local_rank) == (8, 4, 0)
    assert (launch.nproc_per_node, launch.spawn) == (4, 4)
    assert launch.init_method.startswith("tcp://gpu03:")


def test_a_slurm_task_per_process_spawns_none():
    launch = detect(**TASK_PER_PROCESS)
    assert (launch.world_size, launch.first_rank, launch.local_rank) == (8, 5, 1)
    assert (launch.nproc_per_node, launch.spawn) == (4, 1)


def test_older_slurm_variables_and_a_given_master_are_used():
    old = {
        "SLURM_NPROCS": "2",
        "SLURM_PROCID": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOBID": "7",
        "SLURM_STEP_ID": "3",
    }
    assert detect(**old, SLURM_NODELIST="a,b").init_method == "tcp://a:10220"
    assert detect(**old, MASTER_ADDR="m", MASTER_PORT="9").init_method == "tcp://m:9"
    assert detect(**old, SLURM_NODELIST="a,b").world_size == 2


def test_every_step_of_a_slurm_job_has_its_own_port_below_the_ephemeral_ones():
    def port(job, step):
        env = {**TASK_PER_NODE, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return int(detect(**env).init_method.rpartition(":")[2])

    ports = {(job, step): port(job, step) for job in (1, 77, 645, 9_999_999) for step in range(31)}
    assert all(10000 <= port <= 29999 for port in ports.values())
    for job in (1, 77, 645, 9_999_999):
        assert len({ports[job, step] for step in range(31)}) == 31
    assert port(77, 0) == port(77, 0) != port(78, 0)


def test_a_slurm_job_without_a_step_of_several_tasks_is_plain_python():
    alone = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert detect(**alone).launcher == "python"
    assert detect("--nproc_per_node 2", **alone, SLURM_STEP_ID="0").spawn == 2
    # A shell of salloc has no SLURM_PROCID.
    assert detect(SLURM_JOB_ID="7", SLURM_NTASKS="2").launcher == "python"


def test_python_and_a_slurm_task_per_node_spawn_a_process_per_gpu(detect_with_gpus):
    assert detect_with_gpus(4).spawn == 4
    assert detect_with_gpus(4, "--nproc_per_node 2").spawn == 2
    assert detect_with_gpus(4, "--gpu 3").spawn == 1
    assert detect_with_gpus(4, "--gpu 3", **TASK_PER_NODE).spawn == 1
    launch = detect_with_gpus(4, **TASK_PER_NODE)
    assert (launch.world_size, launch.first_rank, launch.spawn) == (8, 4, 4)


def test_each_of_several_processes_may_see_only_its_own_gpu(detect_with_gpus):
    launch = detect_with_gpus(1, **TASK_PER_PROCESS)
    assert (launch.world_size, launch.nproc_per_node, launch.spawn) == (8, 4, 1)
    assert detect_with_gpus(1, **TORCHRUN).nproc_per_node == 2


@pytest.mark.parametrize(
    ("gpus", "line", "env"),
    [
        (2, "--nproc_per_node 4", {}),
        (1, "--nproc_per_node 4", {}),
        (1, "--nproc_per_node 2", TASK_PER_NODE),
        (2, "", TASK_PER_PROCESS),
    ],
)
def test_more_processes_than_gpus_are_rejected(detect_with_gpus, gpus, line, env):
    with pytest.raises(LaunchError, match=rf"fewer GPUs \({gpus}\) than"):
        detect_with_gpus(gpus, line, **env)


@pytest.mark.parametrize(
    ("line", "env"), [("--nproc_per_node 2", {}), ("", TORCHRUN), ("", TASK_PER_PROCESS)]
)
def test_several_processes_cannot_share_the_gpu_of_the_flag(detect_with_gpus, line, env):
    with pytest.raises(LaunchError, match="--gpu"):
        detect_with_gpus(4, line + " --gpu 1", **env)


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (TORCHRUN, "--nproc_per_node 2 --world_size 2 --rank 1"),
        (TASK_PER_NODE, "--nproc_per_node 4 --world_size 2 --rank 1"),
        (TASK_PER_PROCESS, "--nproc_per_node 4 --world_size 2 --rank 1"),
    ],
)
def test_flags_may_repeat_the_values_of_the_launcher(env, line):
    launch = detect(line, **env)
    assert launch.first_rank // launch.nproc_per_node == 1


@pytest.mark.parametrize(
    ("env", "lines"),
    [
        (TORCHRUN, ["--nproc_per_node 4", "--world_size 4", "--rank 3"]),
        (TASK_PER_NODE, ["--world_size 8", "--rank 0"]),
        (TASK_PER_PROCESS, ["--nproc_per_node 8", "--world_size 8", "--rank 5"]),
    ],
)
def test_flags_that_contradict_the_launcher_are_rejected(env, lines):
    for line in lines:
        with pytest.raises(LaunchError, match=line):
            detect(line, **env)


def test_the_number_of_restarts_is_read_from_the_launchers_variables():
    assert detect(**TORCHRUN, TORCHELASTIC_RESTART_COUNT="1").restarts == 1
    assert detect(**TASK_PER_NODE, SLURM_RESTART_COUNT="2").restarts == 2
    assert detect(**TASK_PER_PROCESS, SLURM_RESTART_COUNT="3").restarts == 3
    assert detect(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1").restarts == 1
    for env in (TORCHRUN, TASK_PER_NODE, TASK_PER_PROCESS, {}):
        assert detect(**env).restarts == 0


@pytest.mark.parametrize(
    ("line", "env", "named"),
    [
        ("", {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ("", {"RANK": "0"}, "WORLD_SIZE"),
        ("", {"WORLD_SIZE": "2"}, "RANK"),
        ("", {**TORCHRUN, "RANK": "4"}, "RANK=4"),
        ("", {"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x"),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many"),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "srun"),
        ("", {**TASK_PER_PROCESS, "SLURM_STEP_NUM_TASKS": "3"}, "3 SLURM tasks on 2 nodes"),
        ("--dist_url foo", {}, "--dist_url"),
        ("--dist_url tcp://a:1 --dist_file store", {}, "--dist_file"),
        ("--dist_url tcp://a", {}, "--dist_url tcp://a is invalid"),
        ("--dist_url tcp://a:99999", {}, "--dist_url tcp://a:99999"),
        ("--dist_url tcp://a:PORT", {}, "give tcp://host:port"),
    ],
)
def test_an_invalid_flag_or_variable_is_rejected_by_name(line, env, named):
    with pytest.raises(LaunchError, match=named):
        detect(line, **env)


def test_dist_file_overrides_the_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = f"file://{tmp_path}/store"
    assert detect("--dist-file store").init_method == store
    assert detect("--dist-file store", **TORCHRUN).init_method == store


def test_under_slurm_every_start_has_its_own_dist_file():
    line = "--dist-file /d/store"
    assert detect(line, **TASK_PER_NODE).init_method == "file:///d/store.77.0.0"
    again = {**TASK_PER_NODE, "SLURM_STEP_ID": "4", "SLURM_RESTART_COUNT": "2"}
    assert detect(line, **again).init_method == "file:///d/store.77.4.2"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9],cpu1", "gpu03"), ("n[1,7-8]-ib,m", "n1-ib")],
)
def test_first_host_of_a_slurm_node_list(nodes, host):
    assert first_host(nodes) == host


# ---- shards of processes that work without a process group ---------------------------------------


def detect_part(part=None, **env):
    return detect_shard(part, env)


def array(task, first, last, step, count):
    values = {"ID": task, "MIN": first, "MAX": last, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def step(task, tasks, nodes=1):
    return {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_LOCALID": str(task % (tasks // nodes)),
    }


def test_a_single_process_takes_everything():
    assert detect_part() == detect_part(SLURM_PROCID="0", SLURM_NTASKS="4") == Shard(0, 1, 0, 1)


def test_torchrun_srun_and_the_flag_give_the_shard():
    assert detect_part(**TORCHRUN) == Shard(3, 4, 1, 2)
    assert detect_part(**step(5, 8, nodes=2)) == Shard(5, 8, 1, 4)
    assert detect_part((2, 5)) == Shard(2, 5, 0, 1)
    # The processes of a launcher share the part, which replaces the array's task.
    assert detect_part((2, 5), **step(1, 2), **array(3, 0, 9, 1, 10)) == Shard(5, 10, 1, 2)
    assert detect_part((2, 5), **TORCHRUN) == Shard(11, 20, 1, 2)


@pytest.mark.parametrize(
    ("first", "last", "by"), [(0, 3, 1), (1, 4, 1), (1, 7, 2), (10, 40, 10), (5, 5, 1)]
)
def test_the_tasks_of_an_array_divide_the_list_without_overlap(first, last, by):
    tasks = range(first, last + 1, by)
    found = [detect_part(**array(task, first, last, by, len(tasks))) for task in tasks]
    assert [(s.index, s.count) for s in found] == [(i, len(tasks)) for i in range(len(tasks))]


def test_the_processes_of_an_arrays_tasks_divide_their_parts():
    found = {
        detect_part(**array(task, 1, 3, 1, 3), **step(rank, 2)).index
        for task in (1, 2, 3)
        for rank in (0, 1)
    }
    assert found == set(range(6))
    assert detect_part(**array(3, 1, 3, 1, 3), **step(1, 2)) == Shard(5, 6, 1, 2)


@pytest.mark.parametrize(
    "env",
    [
        array(5, 1, 7, 1, 3),  # --array=1,5,7
        array(3, 1, 9, 1, 2),
        array(9, 1, 3, 1, 3),
        step(2, 2),
        {"RANK": "0"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ],
)
def test_variables_that_do_not_determine_a_shard_are_rejected(env):
    with pytest.raises(LaunchError):
        detect_part(**env)
