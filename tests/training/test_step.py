import contextlib
import copy
import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from args import get_args
from distributed import device as device_module
from distributed.device import cpu_flags, training_dtype
from loss import MILNCELoss
from s3dg import S3D, to_unit_range
from tests.helpers import golden_weight
from training.optimizer import build_optimizer, resume_optimizer
from training.step import BatchNormBuffers, HostToDevice, TrainingStep, distribute

CPU = torch.device("cpu")
BATCH, CANDIDATES = 4, 2


def model(dtype=torch.float64):
    """Golden weights, which have the activations of a trained network, and a small word table."""
    s3d = S3D()
    s3d.text_module.word_embd = torch.nn.Embedding.from_pretrained(torch.zeros(50, 300))
    weights = {name: golden_weight(name, v.shape) for name, v in s3d.state_dict().items()}
    s3d.load_state_dict(weights)
    return s3d.to(dtype)


def clips(batch=BATCH, frames=4, size=32):
    generator = torch.Generator().manual_seed(1)
    video = torch.randint(0, 256, (batch, 3, frames, size, size), generator=generator)
    text = torch.randint(0, 50, (batch, CANDIDATES, 20), generator=generator)
    return {"video": video.byte(), "text": text}


def micro_batches(batch, parts):
    cut = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: cut[name][n] for name in cut} for n in range(parts)]


def step_of(network, *flags, dtype=torch.float32):
    """Build the step that main_distributed.py would build from the flags, at a rate of 0.001."""
    args = get_args(argv=[*flags])
    fused = bool(args.fused_optimizer)
    optimizer = build_optimizer(network, args.optimizer, args.lr, fused=fused)
    return TrainingStep(network, optimizer, dtype)


def gradients(network):
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


def one_big_batch(network):
    """Compute loss and gradients of the whole batch at once, by autograd alone."""
    batch = clips()
    video, text = to_unit_range(batch["video"]), batch["text"].flatten(0, 1)
    loss = MILNCELoss()(*network(video, text))
    loss.backward()
    return loss.detach(), gradients(network)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12 * scale, msg=name)


# --- the batch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--grad_checkpoint"]], ids=["kept", "recomputed"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_give_the_gradient_of_the_one_big_batch(parts, flags):
    expected_loss, expected = one_big_batch(model().eval())
    network = model().eval()
    network.grad_checkpoint = bool(flags)
    loss = step_of(network)(micro_batches(clips(), parts))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(network), expected)


def run_rank(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    network = model().eval()
    step = step_of(distribute(network, CPU))
    own = micro_batches(clips(), world_size)[rank]
    loss = step(micro_batches(own, 2))
    torch.save((loss, gradients(network)), f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # for the reason given in distributed.process.run_and_exit


def test_two_processes_with_micro_batches_give_the_gradient_of_the_one_big_batch(tmp_path):
    expected_loss, expected = one_big_batch(model().eval())
    mp.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    for rank in range(2):
        loss, found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        assert_same_gradients(found, expected)


def averages_after(network, batches):
    """Return the running averages after a forward pass of each of the batches alone."""
    state, found = network.state_dict(), []
    for batch in batches:
        fresh = model().train()
        fresh.load_state_dict(state)
        fresh(to_unit_range(batch["video"]), batch["text"].flatten(0, 1))
        found.append(dict(fresh.named_buffers()))
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_running_averages_move_once_by_the_mean_of_the_micro_batches(parts, checkpointed):
    network = model().train()
    network.grad_checkpoint = checkpointed
    each = averages_after(network, micro_batches(clips(), parts))
    step_of(network)(micro_batches(clips(), parts))
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == 1
        else:
            mean = sum(after[name] for after in each) / parts
            torch.testing.assert_close(buffer, mean, rtol=1e-12, atol=0, msg=name)


def test_each_micro_batch_is_normalised_by_its_own_statistics():
    halves = micro_batches(clips(), 2)
    together, alone = model().train(), model().train()
    step_of(together)(halves)
    embeddings = [alone(to_unit_range(h["video"]), h["text"].flatten(0, 1)) for h in halves]
    videos, texts = (torch.cat(parts) for parts in zip(*embeddings, strict=True))
    MILNCELoss()(videos, texts).backward()
    assert_same_gradients(gradients(together), gradients(alone))


# --- steps that are skipped -----------------------------------------------------------------------


class SmallNetwork(torch.nn.Module):
    """A small network with a BatchNorm: which steps are skipped does not depend on the network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.video, self.text = torch.nn.Linear(3, 5), torch.nn.Embedding(50, 5)
        self.bn1 = torch.nn.BatchNorm1d(5)

    def forward(self, video, text):
        return self.bn1(self.video(video.mean((2, 3, 4)))), self.text(text).mean(1)


def state_of(step):
    optimizer = step.optimizer.state_dict()["state"]
    flat = {f"{i} {k}": v for i, state in optimizer.items() for k, v in state.items()}
    return {k: v.clone() for k, v in {**step.network.state_dict(), **flat}.items()}


BROKEN = {**clips(), "video": clips()["video"] * float("nan")}
OPTIMIZERS = [
    ["--optimizer=adam"],
    ["--optimizer=sgd"],
    ["--optimizer=adam", "--fused_optimizer=0"],
]


@pytest.mark.parametrize("flags", OPTIMIZERS, ids=" ".join)
def test_a_step_that_is_not_finite_changes_nothing(flags):
    step = step_of(SmallNetwork(), *flags)
    for parts in (1, 2):
        step([clips()])
        before = state_of(step)
        assert not step(micro_batches(BROKEN, parts)).isfinite()
        after = state_of(step)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert step.skipped() == [2, 1, 1]


@pytest.mark.parametrize("flags", OPTIMIZERS, ids=" ".join)
def test_a_skipped_first_step_does_not_change_the_second(flags):
    plain, after_broken = step_of(SmallNetwork(), *flags), step_of(SmallNetwork(), *flags)
    after_broken([BROKEN])
    plain([clips()])
    after_broken([clips()])
    for name, value in plain.network.state_dict().items():
        assert torch.equal(after_broken.network.state_dict()[name], value), name


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    step = step_of(SmallNetwork())
    resumed = TrainingStep(step.network, step.optimizer, torch.float32, skipped=(5, 2))
    resumed([clips()])
    assert resumed.skipped() == [5, 0, 0]
    for batch in (BROKEN, BROKEN, clips(), BROKEN):
        step([batch])
    assert step.skipped() == [3, 1, 2]
    resumed = TrainingStep(step.network, step.optimizer, torch.float32, skipped=(3, 1))
    resumed([BROKEN])
    assert resumed.skipped() == [4, 2, 2]


@pytest.mark.parametrize("flags", [["--fused_optimizer=1"], ["--fused_optimizer=0"]], ids=" ".join)
def test_float16_gradients_that_overflow_lower_the_scale_and_are_not_bad_steps(flags):
    step = step_of(SmallNetwork(), *flags, dtype=torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = state_of(step)
    step([clips()])
    assert all(torch.equal(before[k], v) for k, v in step.network.state_dict().items())
    assert step.skipped() == [1, 0, 0]  # counted, but not towards --max_bad_steps
    assert step.scaler.get_scale() == 2.0**126
    step([BROKEN])
    assert step.skipped() == [2, 1, 1]


def test_float16_scaling_does_not_change_the_step():
    plain = step_of(SmallNetwork(), "--optimizer=sgd")  # unlike Adam, sensitive to the scale
    scaled = step_of(SmallNetwork(), "--optimizer=sgd", dtype=torch.float16)
    scaled.dtype = torch.float32  # only scale the loss
    plain([clips()])
    scaled(micro_batches(clips(), 1))
    for name, value in plain.network.state_dict().items():
        torch.testing.assert_close(scaled.network.state_dict()[name], value, msg=name)


# --- precision and the optimizer ------------------------------------------------------------------


def test_embeddings_and_loss_are_float32_under_bfloat16():
    seen = []
    step = step_of(model(torch.float32).train(), dtype=torch.bfloat16)
    step.network.conv_2b.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    video, text = step.embed(clips())
    assert seen == [torch.bfloat16]
    assert video.dtype == text.dtype == step.criterion(video, text).dtype == torch.float32
    outside = step.criterion(video, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(step.criterion(video, text), outside)


def test_bfloat16_gradients_are_those_of_float32_up_to_rounding():
    """The clips have 16 frames, so that T is 2 in the last blocks."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        network = S3D(init="kaiming_normal").eval()
        step = step_of(network, dtype=dtype)
        # An untrained network embeds all clips alike, so MIL-NCE would see rounding errors only.
        step.criterion = lambda video, text: video.square().sum() + text.square().sum()
        step([clips(2, 16, 64)])
        found[dtype] = gradients(network)
    for name in ("fc.weight", "mixed_5c.conv_b1_b.conv2.weight", "mixed_5b.conv_b1_b.conv2.weight"):
        expected, value = found[torch.float32][name], found[torch.bfloat16][name]
        assert (value - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.parametrize(
    ("flag", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("none", torch.float32)],
)
def test_amp_selects_the_type(flag, dtype):
    assert training_dtype(flag, CPU) == dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_bfloat16_is_the_default_if_the_processor_supports_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(device_module, "cpu_flags", lambda: set(flags.split()))
    assert training_dtype("auto", CPU) == dtype


def test_the_flags_of_the_processor_are_read(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t\t: fpu avx512_bf16\nbugs: amx_bf16\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx512_bf16"}
    (tmp_path / "cpuinfo").write_text("Features: bf16\n")  # of ARM
    assert cpu_flags(tmp_path / "cpuinfo") == set()


@pytest.mark.parametrize("flags", OPTIMIZERS, ids=" ".join)
def test_an_optimizer_resumes_from_a_state_of_any_layout(flags):
    """Checkpoints of the public release, and of --channels_last=0, have contiguous weights."""

    def trained(layout, resumed=None):
        torch.manual_seed(0)
        conv = torch.nn.Conv3d(3, 4, 3, bias=False).to(memory_format=layout)
        args = get_args(argv=flags)
        fused = bool(args.fused_optimizer)
        optimizer = build_optimizer(conv, args.optimizer, 0.001, fused=fused)
        if resumed:
            resume_optimizer(optimizer, resumed)
        return conv, optimizer

    def step(conv, optimizer):
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.zero_grad()
        conv(torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))).sum().backward()
        optimizer.step()

    plain, optimizer = trained(torch.contiguous_format)
    step(plain, optimizer)
    resumed = copy.deepcopy(optimizer.state_dict())
    other, continued = trained(torch.channels_last_3d, resumed)
    other.load_state_dict(plain.state_dict())
    step(plain, optimizer)
    step(other, continued)
    torch.testing.assert_close(other.weight, plain.weight)


def test_the_optimizer_leaves_the_frozen_word_embedding_alone():
    network = model(torch.float32)
    optimizer = build_optimizer(network, "adam", 0.001)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) not in trained}
    assert names == {"text_module.word_embd.weight"}


def test_batchnorm_buffers_are_read_and_written_back():
    network = SmallNetwork()
    buffers = BatchNormBuffers(network)
    before = buffers.read()
    with buffers.without_counting():
        network.train()(torch.rand(4, 3, 2, 2, 2), torch.zeros(4, 3, dtype=torch.int64))
    assert not torch.equal(network.bn1.running_mean, torch.zeros(5))
    assert network.bn1.num_batches_tracked == 0
    buffers.write(before)
    buffers.count(torch.tensor(2))
    assert torch.equal(network.bn1.running_mean, torch.zeros(5))
    assert network.bn1.num_batches_tracked == 2


# --- copies of batches to a GPU -------------------------------------------------------------------


class Gpu:
    """A mock of the parts of torch.cuda that HostToDevice uses. It records the order of calls."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "copying"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda d: Stream(self, "computing"))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(self))


class Stream:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def record_event(self, event):
        event.record(self)
        return event

    def wait_event(self, event):
        self.gpu.calls.append(f"{self.name} waits for {event.name}")


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self, stream):
        self.name = f"{stream.name} at {len(self.gpu.calls)}"
        self.gpu.calls.append(f"event {self.name}")

    def synchronize(self):
        self.gpu.calls.append(f"host waits for {self.name}")


class HostTensor:
    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def to(self, device, non_blocking):
        assert non_blocking
        self.gpu.calls.append(f"copy {self.name}")
        return self

    def record_stream(self, stream):
        pass


def test_a_batch_is_held_until_its_copy_to_the_gpu_is_done(monkeypatch):
    """Workers write into its memory as soon as nothing holds it (with a mock of a GPU)."""
    gpu = Gpu(monkeypatch)
    to_device = HostToDevice(torch.device("cuda"))
    freed = {}
    for name in "abc":
        batch = HostTensor(gpu, name)
        weakref.finalize(batch, lambda name=name: freed.update({name: len(gpu.calls)}))
        to_device(batch)
        del batch
    assert freed.keys() == {"a", "b"}
    for name, later in zip("ab", "bc", strict=True):
        copied = gpu.calls[gpu.calls.index(f"copy {name}") + 1].removeprefix("event ")
        assert copied.startswith("copying")
        assert gpu.calls.index(f"computing waits for {copied}") < gpu.calls.index(f"copy {later}")
        assert gpu.calls.index(f"host waits for {copied}") < freed[name]


def test_the_arrival_of_a_batch_is_recorded_once_after_its_copy(monkeypatch):
    gpu = Gpu(monkeypatch)
    to_device = HostToDevice(torch.device("cuda"))
    to_device.arrival = arrival = Event(gpu)
    for name in "ab":
        to_device(HostTensor(gpu, name))
    after = gpu.calls[gpu.calls.index("copy a") : gpu.calls.index("copy b")]
    assert [what.split(" at ")[0] for what in after[1:4]] == [
        "event copying",
        "computing waits for copying",
        "event computing",
    ]
    assert after[3] == f"event {arrival.name}"
    assert "computing waits for" in gpu.calls[-1]  # nothing is recorded after the second copy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_gpu_gives_the_gradients_of_the_cpu(parts):
    expected, network = model().train(), model().train().cuda()
    step_of(expected)(micro_batches(clips(), parts))
    pinned = {name: tensor.pin_memory() for name, tensor in clips().items()}
    step_of(network)(micro_batches(pinned, parts))
    found = {name: gradient.cpu() for name, gradient in gradients(network).items()}
    assert_same_gradients(found, gradients(expected))
