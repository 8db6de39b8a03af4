"""The benchmark of captions runs from end to end, and both ways read the same."""

import pytest

from tests.helpers import run_python


@pytest.mark.slow
def test_the_benchmark_prints_both_ways_and_that_their_captions_are_equal():
    sizes = ("--videos=40", "--captions=5", "--samples=60", "--workers=2")
    printed = run_python("benchmarks/bench_captions.py", *sizes).stdout
    for row in ("| csv |", "| all.json |", "| folder | 40 | 0 |", "| store | 10 | 9 |"):
        assert row in printed
    assert "the same captions in all three: 40 of 40 videos" in printed
