"""The process of a rank that fails ends, whatever the other ranks do."""

import subprocess
import sys

from distributed.launch import free_port
from tests.helpers import ROOT

# With NCCL, destroy_process_group may wait for ranks that never come. Here it always does.
FAILING_RUN = """
import sys, time
import torch.distributed as dist
from distributed.launch import detect_launch
from distributed.process import start

dist.destroy_process_group = lambda: time.sleep(3600)

def work(context):
    if context.rank == 1:
        raise RuntimeError("out of memory")
    context.gather(None)

url, rank = sys.argv[1:]
launch = detect_launch(device="cpu", gpu=None, dist_url=url, dist_file="dist-file",
                       nproc_per_node=1, world_size=2, rank=int(rank), env={})
start(work, launch, device="cpu", gpu=None, backend="nccl", timeout=10)
"""


def test_a_failed_rank_does_not_wait_for_the_others_to_destroy_the_group():
    url = f"tcp://127.0.0.1:{free_port()}"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING_RUN, url, str(rank)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], errors
    assert "rank 1: out of memory" in errors[1]
