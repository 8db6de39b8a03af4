import pickle

import pytest
import torch
from conftest import golden_json

from checkpoint import (
    KEPT,
    load_model,
    newest_checkpoint,
    numbered,
    read_checkpoint,
    save_checkpoint,
)
from s3dg import S3D
from utils import InputError


@pytest.fixture(scope="module")
def small():
    """A model with a short word table, so that its files are small."""
    model = S3D(num_classes=16)
    model.text_module.word_embd = torch.nn.Embedding.from_pretrained(torch.randn(5, 300))
    return model.eval()


def content(epoch, state):
    return {"epoch": epoch, "state_dict": state, "optimizer": {}, "scheduler": {"last_epoch": 1}}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("bare", [False, True])
def test_weights_load_with_or_without_prefix_and_wrapping(tmp_path, small, prefix, bare):
    state = {prefix + name: value for name, value in small.state_dict().items()}
    torch.save(state if bare else content(1, state), tmp_path / "weights.pth")
    model = load_model(tmp_path / "weights.pth")
    assert not model.training and model.num_classes == 16
    for name, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("stem", ["standard", "space_to_depth"])
def test_a_file_with_the_released_keys_and_shapes_loads_with_its_stem(tmp_path, stem):
    keys = golden_json("state_dict")["state_dict"][stem]
    torch.save({name: torch.zeros(shape) for name, shape in keys}, tmp_path / "s3d.pth")
    model = load_model(tmp_path / "s3d.pth")
    assert model.space_to_depth == (stem == "space_to_depth")


def test_keys_and_shapes_that_differ_are_named(tmp_path, small):
    state = dict(small.state_dict())
    state["fc.bias"] = torch.zeros(7)
    state["extra.weight"] = state.pop("conv_2b.conv1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError) as refused:
        load_model(tmp_path / "weights.pth")
    message = str(refused.value)
    for part in ("weights.pth", "conv_2b.conv1.weight", "extra.weight", "fc.bias is [7], not [16]"):
        assert part in message


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    "damage", ["absent", "text", "more text", "empty", "truncated", "pickle", "list", "other model"]
)
def test_what_is_not_a_checkpoint_is_refused_by_name(tmp_path, small, damage, capsys):
    path = tmp_path / "weights.pth"
    if damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "more text":
        path.write_text("Kitchen weights, not a checkpoint")
    elif damage == "empty":
        path.touch()
    elif damage == "truncated":
        torch.save(small.state_dict(), path)
        path.write_bytes(path.read_bytes()[:100_000])
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif damage == "list":
        torch.save([1, 2], path)
    elif damage == "other model":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_model(path)
    assert "must not run" not in capsys.readouterr().out


def test_the_newest_ten_are_kept_under_their_epochs_names(tmp_path):
    for epoch in range(1, KEPT + 4):
        save_checkpoint(tmp_path, content(epoch, {"w": torch.ones(1) * epoch}))
    assert [epoch for epoch, _ in numbered(tmp_path)] == list(range(4, KEPT + 4))
    assert (tmp_path / "epoch0013.pth.tar").is_file()
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar"}


def test_resuming_skips_a_damaged_newest_file(tmp_path):
    for epoch in (1, 2):
        path = save_checkpoint(tmp_path, content(epoch, {"w": torch.ones(1) * epoch}))
    path.write_bytes(path.read_bytes()[:50])
    found = newest_checkpoint(tmp_path)
    assert found["epoch"] == 1 and found["path"].name == "epoch0001.pth.tar"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_reads_without_its_prefix(tmp_path):
    path = save_checkpoint(tmp_path, content(3, {"module.w": torch.ones(1)}))
    assert list(read_checkpoint(path)["state_dict"]) == ["w"]
