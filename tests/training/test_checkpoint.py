import errno
import pickle
import subprocess

import pytest
import torch

from s3dg import S3D
from tests.helpers import golden_json
from training.checkpoint import (
    KEPT,
    KEPT_STEPS,
    load_model,
    newest_checkpoint,
    numbered,
    read_checkpoint,
    save_checkpoint,
)
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


def save(folder, epoch, step=None):
    return save_checkpoint(folder, content(epoch, {"w": torch.ones(1) * epoch}), step)


def names(folder):
    return [path.name for _, path in numbered(folder)]


def test_the_newest_ten_are_kept_under_their_epochs_names(tmp_path):
    for epoch in range(1, KEPT + 4):
        save(tmp_path, epoch)
    assert names(tmp_path) == [f"epoch{epoch:04d}.pth.tar" for epoch in range(4, KEPT + 4)]
    assert {path.name for path in tmp_path.iterdir()} == set(names(tmp_path))


def test_files_of_steps_come_between_those_of_epochs(tmp_path):
    ordered = [
        "epoch0000_step00000005.pth.tar",
        "epoch0001.pth.tar",
        "epoch0001_step00001000.pth.tar",
        "epoch0001_step123456789.pth.tar",
        "epoch0002.pth.tar",
        "epoch10000_step00000007.pth.tar",
    ]
    for name in [*reversed(ordered), "epoch0003_step7.pth.tar", "epochs.pth.tar"]:
        (tmp_path / name).touch()
    assert names(tmp_path) == ordered
    assert numbered(tmp_path)[2][0] == (1, 1000)


def test_the_newest_two_of_steps_are_kept_besides_the_ten_of_epochs(tmp_path):
    for epoch in range(KEPT + 2):
        if epoch:
            save(tmp_path, epoch)
        for step in (10 * epoch + 3, 10 * epoch + 6):
            path = save(tmp_path, epoch, step)
            assert path.name == f"epoch{epoch:04d}_step{step:08d}.pth.tar"
            assert newest_checkpoint(tmp_path)["path"] == path
    keys = [key for key, _ in numbered(tmp_path)]
    last = KEPT + 1
    steps = [(last, 10 * last + 3), (last, 10 * last + 6)]
    assert keys == [(epoch, 0) for epoch in range(2, last + 1)] + steps
    assert len(steps) == KEPT_STEPS


def test_fewer_larger_steps_of_a_resumed_epoch_replace_its_older_files(tmp_path):
    """A run of batches of 256 is resumed with batches of 512."""
    save(tmp_path, 3)
    save(tmp_path, 3, 9500)
    save(tmp_path, 3, 10_000)
    path = save(tmp_path, 3, 5500)
    assert newest_checkpoint(tmp_path)["path"] == path


def assert_not_written(folder, path, log):
    """Of the folder, which has epoch 1, after a save of epoch 2."""
    assert path is None
    assert "epoch0002" in log.text and log.records[-1].levelname == "ERROR"
    assert [path.name for path in folder.iterdir()] == ["epoch0001.pth.tar"]
    assert newest_checkpoint(folder)["epoch"] == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")]
)
def test_a_write_that_fails_leaves_the_older_files(tmp_path, monkeypatch, milnce_log, error):
    save(tmp_path, 1)

    def half_a_save(content, file):
        file.write(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_a_save)
        path = save(tmp_path, 2)
    assert_not_written(tmp_path, path, milnce_log)
    assert save(tmp_path, 2).is_file()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("floats", [300_000, 3_000_000])
def test_a_full_disk_leaves_the_older_files(small_disk, milnce_log, floats):
    save(small_disk, 1)
    path = save_checkpoint(small_disk, content(2, {"w": torch.zeros(floats)}))
    assert_not_written(small_disk, path, milnce_log)
    assert save(small_disk, 2).is_file()


def test_a_folder_that_cannot_be_made_is_a_write_that_fails(tmp_path, milnce_log):
    (tmp_path / "file").touch()
    assert save(tmp_path / "file" / "run", 1) is None
    assert "epoch0001" in milnce_log.text


def test_what_a_killed_run_left_half_written_goes_with_the_next_save(tmp_path):
    (tmp_path / "epoch0003.pth.tmp").write_bytes(b"half")
    (tmp_path / "epoch0003_step00000031.pth.tmp").write_bytes(b"half")
    assert numbered(tmp_path) == [] and newest_checkpoint(tmp_path) is None
    save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0004.pth.tar"]


def test_resuming_skips_a_damaged_newest_file(tmp_path):
    for epoch in (1, 2):
        path = save(tmp_path, epoch)
    path.write_bytes(path.read_bytes()[:50])
    found = newest_checkpoint(tmp_path)
    assert found["epoch"] == 1 and found["path"].name == "epoch0001.pth.tar"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_resuming_notices_numbers_that_have_changed_on_the_disk(tmp_path):
    for epoch in (1, 2):
        path = save_checkpoint(tmp_path, content(epoch, {"w": torch.rand(100_000)}))
    damaged = bytearray(path.read_bytes())
    damaged[200_000:200_100] = bytes(100)
    path.write_bytes(damaged)
    assert newest_checkpoint(tmp_path)["epoch"] == 1


def test_what_is_written_is_kept_whatever_damaged_files_have_higher_numbers(tmp_path):
    """The run has gone on from before them."""
    save_checkpoint(tmp_path, content(6, {}))
    for step in (100, 200):
        (tmp_path / f"epoch0007_step{step:08d}.pth.tar").write_text("damaged")
    for epoch in range(8, 8 + KEPT):
        (tmp_path / f"epoch{epoch:04d}.pth.tar").write_text("damaged")
    assert save_checkpoint(tmp_path, content(6, {}), step=90).is_file()
    assert [key for key, _ in numbered(tmp_path)] == [(6, 0), (6, 90)]


def test_a_checkpoint_reads_without_its_prefix(tmp_path):
    path = save_checkpoint(tmp_path, content(3, {"module.w": torch.ones(1)}))
    assert list(read_checkpoint(path)["state_dict"]) == ["w"]
