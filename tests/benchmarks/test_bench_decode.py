"""The benchmark of the decoders runs from end to end."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
def test_the_quick_benchmark_prints_every_table():
    script = ROOT / "benchmarks" / "bench_decode.py"
    done = subprocess.run(
        [sys.executable, script, "--quick"], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("| pyav |") == 4 and done.stdout.count("| release |") == 4
    assert "PSNR" in done.stdout
