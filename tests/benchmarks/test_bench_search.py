"""The benchmark of the search runs from end to end, and finds the same as sorting all scores."""

import pytest

from tests.helpers import run_python


@pytest.mark.slow
def test_the_benchmark_prints_both_ways_and_compares_them():
    printed = run_python(
        "benchmarks/bench_search.py", "--windows=1700", "--dim=16", "--queries=4"
    ).stdout
    assert "| plain |" in printed and "| ours |" in printed
    assert "ours: 0 of 4 queries have other moments" in printed
