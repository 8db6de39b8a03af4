"""The benchmark of the step: the plain way and ours compute the same, and every table is printed.

Times are not tested.
"""

import copy
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))
import ways

SMALL = ("--frames=4", "--size=32", "--rounds=1")
CPU = torch.device("cpu")


def draw_batch(clips, frames, size):
    return ways.draw_batch(SimpleNamespace(frames=frames, size=size, candidates=2), clips, CPU)


@pytest.fixture(scope="module")
def batch():
    return draw_batch(4, 8, 64)


@pytest.fixture(scope="module")
def model(batch):
    model = ways.new_model()
    ways.settle_averages(model, batch)
    return model


class Calls(TorchDispatchMode):
    """Records the arguments of the calls of an operation."""

    def __init__(self, operation):
        super().__init__()
        self.operation, self.arguments = operation, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is self.operation:
            self.arguments.append(args)
        return function(*args, **(kwargs or {}))


def test_the_plain_copy_pads_by_copying_and_convolves_time_in_three_dimensions(model, batch):
    plain, video = ways.plain_copy(model, CPU).eval(), batch["video"].float() / 255
    with torch.no_grad(), Calls(torch.ops.aten.constant_pad_nd) as pads:
        expected = plain(video, mode="video")
    with torch.no_grad(), Calls(torch.ops.aten.convolution) as convolutions:
        plain(video, mode="video")
    assert len(pads.arguments) == 4  # one for each max-pool between the stages
    assert all(weight.ndim == 5 for _, weight, *_ in convolutions.arguments)
    torch.testing.assert_close(model.eval()(video, mode="video"), expected, rtol=1e-3, atol=1e-4)


def test_forward_and_evaluation_give_the_same_embeddings_both_ways(model, batch):
    (expected,) = ways.plain_forward(model, batch, CPU, torch.float32)()
    assert expected.std(dim=0).mean() > 0.01  # the clips' embeddings differ
    for way in (ways.our_forward, ways.plain_evaluation, ways.our_evaluation):
        (found,) = way(model, batch, CPU, torch.float32)()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_step_has_the_same_gradients_both_ways(model):
    pair = draw_batch(2, 4, 64)
    batch = {name: torch.cat((t, t)) for name, t in pair.items()}  # halves of the same statistics
    precise = copy.deepcopy(model).double()  # so that no difference is due to rounding
    expected = ways.plain_step(precise, batch, CPU, torch.float32)()
    largest = max(gradient.abs().max() for gradient in expected).item()
    assert largest > 0
    for flags in [(), ("--grad_checkpoint",), ("--accum_steps=2",)]:
        found = ways.our_step(precise, batch, CPU, torch.float32, *flags)()
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6 * largest)


@pytest.mark.slow
def test_the_benchmark_prints_every_way_of_every_table():
    printed = run_python("benchmarks/bench_step.py", *SMALL, timeout=900).stdout
    tables = re.findall(
        r"^(.+): [\d.]+ GFLOP per clip\n\n\| way .*\n.*\n((?:\|.*\n)+)", printed, re.M
    )
    assert [name for name, _ in tables] == ["forward", "training step", "evaluation"]
    for name, lines in tables:
        assert "| plain |" in lines and "| ours, float32 |" in lines
        assert ("--grad_checkpoint |" in lines) == (name == "training step")
        assert ("--accum_steps=4 |" in lines) == (name == "training step")
    assert float(re.search(r"all in float64: (\S+) apart", printed)[1]) < 1e-6


@pytest.mark.slow
def test_a_step_of_many_clips_takes_the_memory_of_a_few():
    flags = ("--frames=8", "--size=64", "--batch=8", "--effective=64")
    printed = run_python("benchmarks/bench_step.py", *flags).stdout
    (few,), (many,) = (re.findall(rf"^\| {n} \| \d+ \| (\d+) \|", printed, re.M) for n in (8, 64))
    assert float(many) < 2 * float(few)


@pytest.mark.slow
def test_the_profile_names_operations():
    printed = run_python("benchmarks/bench_step.py", "--frames=4", "--size=32", "--profile").stdout
    assert "batch_norm" in printed and "convolution" in printed


@pytest.mark.slow
def test_the_loss_curves_begin_alike(toy):
    flags = ("--steps=4", "--every=1", "--batch=4", "--frames=4", "--size=32")
    printed = run_python("benchmarks/loss_curves.py", f"--toy={toy}", *flags).stdout
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\S+) \| (\S+) \|$", printed, re.M)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4]
    plain, ours, short = map(float, rows[0][1:])
    assert ours == pytest.approx(plain, rel=0.01) and short == pytest.approx(plain, rel=0.2)
