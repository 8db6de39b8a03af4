import pytest

from args import get_args
from distributed import first_host, plan_launch
from utils import InputError


def plan(line="", **env):
    return plan_launch(get_args(argv=[*line.split(), "--device", "cpu"]), env)


def test_plain_python_is_one_process_or_as_many_as_asked():
    launch = plan()
    assert (launch.launcher, launch.world_size, launch.spawn) == ("python", 1, 1)
    launch = plan("--nproc_per_node 3")
    assert (launch.world_size, launch.first_rank, launch.spawn) == (3, 0, 3)
    assert launch.init_method.startswith("tcp://127.0.0.1:")


def test_plain_python_on_several_nodes_needs_an_address():
    launch = plan("--world-size 2 --rank 1 --nproc_per_node 4 --dist-url tcp://a:1")
    assert (launch.world_size, launch.first_rank, launch.init_method) == (8, 4, "tcp://a:1")
    with pytest.raises(InputError, match="--dist_url"):
        plan("--world-size 2 --rank 0")
    with pytest.raises(InputError, match="--rank"):
        plan("--world-size 2 --rank 2 --dist-url tcp://a:1")


def test_torchrun_has_started_every_process_already():
    launch = plan(
        RANK="3",
        LOCAL_RANK="1",
        WORLD_SIZE="4",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="a",
        MASTER_PORT="1",
    )
    assert (launch.world_size, launch.first_rank, launch.local_rank) == (4, 3, 1)
    assert (launch.nproc_per_node, launch.spawn, launch.init_method) == (2, 1, "env://")


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_STEP_NUM_NODES": "2"}


def test_a_slurm_task_a_node_spawns_the_nodes_processes():
    launch = plan("--nproc_per_node 4", **SLURM, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1")
    assert (launch.world_size, launch.first_rank, launch.spawn) == (8, 4, 4)
    assert launch.init_method == "tcp://gpu03:20077"


def test_a_slurm_task_a_process_spawns_none():
    launch = plan(**SLURM, SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="5", SLURM_LOCALID="1")
    assert (launch.world_size, launch.first_rank, launch.local_rank) == (8, 5, 1)
    assert (launch.nproc_per_node, launch.spawn) == (4, 1)


def test_older_slurm_names_and_a_given_master_are_understood():
    old = {"SLURM_NPROCS": "2", "SLURM_PROCID": "1", "SLURM_NNODES": "2", "SLURM_JOBID": "7"}
    assert plan(**old, SLURM_NODELIST="a,b").init_method == "tcp://a:20007"
    assert plan(**old, MASTER_ADDR="m", MASTER_PORT="9").init_method == "tcp://m:9"
    assert plan(**old, SLURM_NODELIST="a,b").world_size == 2


@pytest.mark.parametrize(
    ("line", "env", "named"),
    [
        ("", {"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ("", {"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x"),
        ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "many"}, "SLURM_NTASKS=many"),
        ("--dist_url foo", {}, "--dist_url"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(line, env, named):
    with pytest.raises(InputError, match=named):
        plan(line, **env)


def test_dist_file_overrides_the_address():
    assert plan("--dist-file store").init_method.endswith("/store")
    assert plan("--dist-file store").init_method.startswith("file:///")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9],cpu1", "gpu03"), ("n[1,7-8]-ib,m", "n1-ib")],
)
def test_first_host_of_a_slurm_node_list(nodes, host):
    assert first_host(nodes) == host
