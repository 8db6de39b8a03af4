"""The benchmark of collecting runs from end to end, with batches lent and copied."""

import re

from tests.helpers import run_python


def test_the_benchmark_prints_each_way_with_the_cpu_time_and_the_rate():
    printed = run_python("benchmarks/bench_feed.py", "--quick").stdout
    rows = re.findall(r"^\| (.*) \| 2 \| [\d.]+ \| [\d,]+ \| [\d,]+ \|$", printed, re.MULTILINE)
    assert rows == ["collecting", "16x32x32, lent", "16x32x32, copied"]
