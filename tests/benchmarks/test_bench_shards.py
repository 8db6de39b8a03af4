"""The benchmark of videos in shards runs from end to end."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_the_quick_benchmark_prints_both_parts():
    script = ROOT / "benchmarks" / "bench_shards.py"
    done = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("| CPU ms, ") == 2 and "| KB read | " in done.stdout
    assert done.stdout.count("lookups: ") == 2
