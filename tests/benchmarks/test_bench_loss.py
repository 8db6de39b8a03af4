"""The benchmark of the loss runs from end to end, and both of its ways give the same gradient."""

import re

import pytest

from tests.helpers import run_python


@pytest.mark.slow
def test_the_benchmark_prints_both_ways_and_their_ratio():
    sizes = ("--batch=256", "--candidates=3", "--dim=32", "--ranks=8", "--steps=1")
    printed = run_python("benchmarks/bench_loss.py", *sizes).stdout
    assert "| dense |" in printed and "| ours |" in printed
    assert re.search(r"ratio: memory [\d.]+x, time [\d.]+x", printed)
    difference = float(re.search(r"gradients: at most (\S+)", printed)[1])
    assert difference < 1e-4
