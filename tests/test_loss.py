import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loss import DistributedLogSumExp, MILNCELoss
from tests.helpers import golden_json


def embeddings(case):
    rs = np.random.RandomState(case["numpy_seed"])
    video = rs.standard_normal((case["B"], case["D"])) * case["video_scale"]
    text = rs.standard_normal((case["B"] * case["K"], case["D"]))
    return [torch.as_tensor(x).requires_grad_() for x in (video, text)]


@pytest.mark.parametrize("case", golden_json("misc")["loss"], ids=lambda c: f"B{c['B']}K{c['K']}")
def test_value_and_gradients_match_the_golden_values(case):
    video, text = embeddings(case)
    loss = MILNCELoss()(video, text)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert video.grad.norm().item() == pytest.approx(case["video_grad_norm"], rel=1e-9, abs=1e-12)
    assert text.grad.norm().item() == pytest.approx(case["text_grad_norm"], rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(video.grad[0], case["video_grad_first_row"], rtol=1e-9, atol=1e-12)


def test_the_minimum_is_log_two():
    video = 100 * torch.eye(4, dtype=torch.float64)
    assert MILNCELoss()(video, video.repeat_interleave(3, 0)).item() == pytest.approx(math.log(2))


def test_large_scores_stay_finite():
    video = 1e4 * torch.randn(4, 8)
    assert torch.isfinite(MILNCELoss()(video, 1e2 * torch.randn(8, 8)))


def random_embeddings(batch, candidates, dim=5):
    generator = torch.Generator().manual_seed(2)
    sizes = ((batch, dim), (batch * candidates, dim))
    return [
        torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()
        for size in sizes
    ]


@pytest.mark.parametrize(("batch", "candidates"), [(4, 3), (5, 1), (1, 2)])
def test_gradients_match_finite_differences(batch, candidates):
    inputs = random_embeddings(batch, candidates)
    assert torch.autograd.gradcheck(MILNCELoss(), inputs)
    # One denominator at a time: the mean gives all of them the same weight.
    assert torch.autograd.gradcheck(DistributedLogSumExp.apply, inputs)


def test_a_second_backward_pass_gives_the_same_gradients():
    inputs = random_embeddings(4, 3)
    loss = MILNCELoss()(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


# A small two-tower model: the loss does not depend on what computes the embeddings.
def towers():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(6, 5), nn.Sequential(nn.Linear(4, 5), nn.Tanh())]).double()


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.towers = towers()

    def forward(self, video, text):
        return self.towers[0](video), self.towers[1](text)


def union_batch(batch=8, candidates=3):
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(batch, 6, dtype=torch.float64, generator=generator)
    text = torch.randn(batch * candidates, 4, dtype=torch.float64, generator=generator)
    return video, text


def run_rank(rank, world_size, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    model = DistributedDataParallel(TwoTowers())
    video, text = (x.chunk(world_size)[rank] for x in union_batch())
    loss = MILNCELoss()(*model(video, text))
    loss.backward()
    gradients = [p.grad for p in model.module.parameters()]
    torch.save((loss.detach(), gradients), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # for the reason given in distributed.process.run_and_exit


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_get_the_value_and_gradient_of_the_union_batch(tmp_path, world_size):
    model = TwoTowers()
    expected = MILNCELoss()(*model(*union_batch()))
    expected.backward()
    mp.spawn(run_rank, args=(world_size, tmp_path), nprocs=world_size)
    for rank in range(world_size):
        loss, gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for gradient, parameter in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)
