"""The ranks of one node of a run: python meet.py NODE URL NPROC TIMEOUT. Run by test_rendezvous."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from distributed.launch import detect_launch
from distributed.process import start
from utils import run_script


def add_up(context):
    print("sum of the ranks:", context.start_sum(context.rank)())


def main():
    node, url, nproc, timeout = sys.argv[1:]
    launch = detect_launch(
        device="cpu",
        gpu=None,
        dist_url=url,
        dist_file="dist-file",
        nproc_per_node=int(nproc),
        world_size=2,
        rank=int(node),
        env={},
    )
    start(add_up, launch, device="cpu", gpu=None, backend="nccl", timeout=float(timeout))


if __name__ == "__main__":
    run_script(main)
