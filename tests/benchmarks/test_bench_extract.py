"""The benchmark of feature extraction runs from end to end, both of its ways."""

import pytest

from tests.helpers import run_python


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_stride():
    printed = run_python("benchmarks/bench_extract.py", "--quick", timeout=900).stdout
    rows = [line for line in printed.splitlines() if line.endswith("x |")]
    assert [row.split(" | ")[0] for row in rows] == ["| 3.2 s", "| 3.2 s", "| 1.0 s"]
