"""The self-test of a GPU: its list of layers, and the sections that run on a CPU."""

import json
import sys

import pytest
import torch

from tests.helpers import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_selftest


def test_every_layer_of_the_network_is_collected_once():
    layers = gpu_selftest.collect_layers(16, 224, 32)
    assert len({(gpu_selftest.label(layer.module), layer.shape) for layer in layers}) == len(layers)
    counts = {kind: 0 for kind in ("Conv", "Norm", "Pool")}
    for layer in layers:
        counts[layer.kind] += layer.count
    assert counts == {"Conv": 76, "Norm": 76, "Pool": 13}
    assert not all(gpu_selftest.has_two_dimensional(layer.module) for layer in layers)  # the stem


def test_a_section_that_fails_or_takes_too_long_does_not_end_the_others(tmp_path):
    bench = gpu_selftest.Bench(torch.device("cpu"), True, tmp_path)

    def run(function, seconds=5):
        return gpu_selftest.run_section(bench, gpu_selftest.Section("a title", function, seconds))

    def fail(bench):
        raise ValueError("two\nlines")

    def hang(bench):
        while True:
            pass

    failed = run(fail)
    assert (failed["status"], failed["reason"]) == ("failed", "ValueError: two lines")
    assert run(hang, 0.1)["status"] == gpu_selftest.NO_TIME
    parts = {
        "bad": lambda: fail(bench),
        "good": lambda: {"passed": True},
        "gpu": bench.on_gpu(fail),
    }
    found = run(lambda bench: gpu_selftest.run_parts(bench, parts))
    assert found["status"] == "failed"
    assert found["result"] == {
        "bad": {"passed": False, "error": "ValueError: two lines"},
        "good": {"passed": True},
        "gpu": gpu_selftest.NO_GPU,
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run the self-test itself")
def test_on_a_cpu_every_check_passes_or_is_marked_as_not_measured(tmp_path):
    out = tmp_path / "selftest.json"
    printed = run_python("benchmarks/gpu_selftest.py", f"--out={out}").stdout
    report = json.loads(out.read_text())
    assert report["quick"] and report["device"] == "cpu"
    sections = {int(number): section for number, section in report["sections"].items()}
    assert sections.keys() == gpu_selftest.SECTIONS.keys()
    for number, section in sections.items():
        expected = gpu_selftest.NO_GPU if number == 4 else "passed"
        assert section["status"] == expected, printed
        assert f"{number}. {section['title']}: {expected}" in printed
    of = {number: section.get("result", {}) for number, section in sections.items()}
    for number, name in (
        (1, "GPU"),
        (1, "host to device"),
        (3, "float64, against the CPU"),
        (3, "--compile, against eager"),
        (5, "top kernels, ms"),
        (6, "16x224x224 and 32x200x200"),
        (6, "GPU ms, host ms, peak MiB"),
        (8, "out of memory"),
        (9, "nccl"),
    ):
        assert of[number][name] == gpu_selftest.NO_GPU
    assert all(layer["passed"] for layer in of[2]["layers"].values())
    assert len(of[2]["layers"]) > 100
