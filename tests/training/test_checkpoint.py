import builtins
import errno
import io
import os
import subprocess
import zipfile
from itertools import product

import pytest
import torch

from s3dg import read_weights
from tests.helpers import Evil
from training import checkpoint
from training.checkpoint import (
    KEPT_EPOCHS,
    KEPT_STEPS,
    Progress,
    list_checkpoints,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
)
from utils import DataError


def content(epoch, state):
    return {"epoch": epoch, "state_dict": state, "optimizer": {}, "scheduler": {"last_epoch": 1}}


def save(folder, epoch, step=None, resumed=None):
    return save_checkpoint(folder, content(epoch, {"w": torch.ones(1) * epoch}), step, resumed)


def names(folder):
    return [path.name for _, path in list_checkpoints(folder)]


def test_the_newest_ten_epochs_are_kept(tmp_path):
    for epoch in range(1, KEPT_EPOCHS + 4):
        save(tmp_path, epoch)
    assert names(tmp_path) == [f"epoch{epoch:04d}.pth.tar" for epoch in range(4, KEPT_EPOCHS + 4)]
    assert {path.name for path in tmp_path.iterdir()} == set(names(tmp_path))


def test_files_of_steps_sort_between_those_of_epochs(tmp_path):
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
    assert list_checkpoints(tmp_path)[2][0] == (1, 1000)


def test_the_newest_two_of_steps_are_kept_in_addition_to_those_of_epochs(tmp_path):
    for epoch in range(KEPT_EPOCHS + 2):
        if epoch:
            save(tmp_path, epoch)
        for step in (10 * epoch + 3, 10 * epoch + 6):
            path = save(tmp_path, epoch, step)
            assert path.name == f"epoch{epoch:04d}_step{step:08d}.pth.tar"
            assert newest_checkpoint(tmp_path)["path"] == path
    keys = [key for key, _ in list_checkpoints(tmp_path)]
    last = KEPT_EPOCHS + 1
    steps = [(last, 10 * last + 3), (last, 10 * last + 6)]
    assert keys == [(epoch, 0) for epoch in range(2, last + 1)] + steps
    assert len(steps) == KEPT_STEPS


def test_an_epoch_resumed_with_larger_batches_keeps_its_files_in_order(tmp_path):
    """A run of batches of 256 is resumed with batches of 512."""
    save(tmp_path, 3)
    save(tmp_path, 3, 9500)
    before = save(tmp_path, 3, 10_000)
    content_before = before.read_bytes()
    path = save(tmp_path, 3, 5500, (before, 5000))
    assert newest_checkpoint(tmp_path)["path"] == path
    assert [key for key, _ in list_checkpoints(tmp_path)] == [(3, 0), (3, 5000), (3, 5500)]
    assert (tmp_path / "epoch0003_step00005000.pth.tar").read_bytes() == content_before
    path = save(tmp_path, 3, 6000, (before, 5000))
    assert newest_checkpoint(tmp_path)["path"] == path
    assert [key for key, _ in list_checkpoints(tmp_path)] == [(3, 0), (3, 5500), (3, 6000)]


def test_an_epoch_resumed_with_smaller_batches_keeps_its_files_in_order(tmp_path):
    save(tmp_path, 3, 4500)
    before = save(tmp_path, 3, 5000)
    path = save(tmp_path, 3, 10_500, (before, 10_000))
    assert newest_checkpoint(tmp_path)["path"] == path
    assert [key for key, _ in list_checkpoints(tmp_path)] == [(3, 5000), (3, 10_500)]


def test_the_end_of_an_epoch_resumed_with_larger_batches_is_its_newest_file(tmp_path):
    before = save(tmp_path, 3, 10_000)
    path = save(tmp_path, 4, resumed=(before, 5000))
    assert newest_checkpoint(tmp_path)["path"] == path and before.is_file()


def test_a_file_newer_than_the_resumed_checkpoint_is_never_removed(tmp_path):
    """Such as a checkpoint that was elsewhere at the start, or weights without an optimizer."""
    newer = [(3, 10_100), (4, None), (4, 7), (5, None), *((epoch, None) for epoch in range(7, 20))]
    before = save(tmp_path, 3, 10_000)
    for epoch, step in newer:
        (tmp_path / checkpoint.format_name(epoch, step)).write_text("intact")
    for step in (5500, 6000, 6500):
        path = save(tmp_path, 3, step, (before, 5000))
        assert path.is_file()
    for epoch, step in newer:
        assert (tmp_path / checkpoint.format_name(epoch, step)).read_text() == "intact"
    assert [key for key, _ in list_checkpoints(tmp_path)][:2] == [(3, 6000), (3, 6500)]


def assert_not_written(folder, path, log):
    """Assert that saving epoch 2 to a folder with epoch 1 has failed and changed nothing."""
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


def test_a_folder_that_cannot_be_created_is_a_failed_write(tmp_path, milnce_log):
    (tmp_path / "file").touch()
    assert save(tmp_path / "file" / "run", 1) is None
    assert "epoch0001" in milnce_log.text


def test_the_next_save_removes_partial_files_of_a_killed_run(tmp_path):
    (tmp_path / "epoch0003.pth.tmp").write_bytes(b"half")
    (tmp_path / "epoch0003_step00000031.pth.tmp").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [] and newest_checkpoint(tmp_path) is None
    save(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch0004.pth.tar"]


def change_records(data, change):
    """Replace each record of a checkpoint by change(name, bytes), and drop those that are None."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            if (record := change(name, old.read(name))) is not None:
                new.writestr(name, record)
    return result.getvalue()


def to_bytes(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def flip_bit(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "garbage": lambda data: bytes(range(256)) * 100,
    "text": lambda data: b"not a checkpoint",
    "the first 50 bytes": lambda data: data[:50],
    "half": lambda data: data[: len(data) // 2],
    "all but the last byte": lambda data: data[:-1],
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
    "a flipped bit of a weight": lambda data: flip_bit(data, 200_000),
    "a flipped bit of the pickle": lambda data: flip_bit(data, data.find(b"optimizer")),
    "a missing record": lambda data: change_records(
        data, lambda name, record: None if name.endswith("data/0") else record
    ),
    "a short record": lambda data: change_records(
        data, lambda name, record: record[:100] if name.endswith("data/0") else record
    ),
    "a list": lambda data: to_bytes([1, 2]),
    "no state_dict": lambda data: to_bytes({"epoch": 2, "optimizer": {}, "scheduler": {}}),
    "half of the old format": lambda data: to_bytes(
        content(2, {"w": torch.rand(1000)}), _use_new_zipfile_serialization=False
    )[:2000],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_file_is_skipped_renamed_and_never_deleted(tmp_path, milnce_log, damage):
    for epoch in (1, 2):
        path = save_checkpoint(tmp_path, content(epoch, {"w": torch.rand(100_000)}))
    data = DAMAGES[damage](path.read_bytes())
    path.write_bytes(data)
    damaged = {}
    found = newest_checkpoint(tmp_path, damaged)
    assert found["epoch"] == 1 and found["path"].name == "epoch0001.pth.tar"
    assert list(damaged) == [path] and path.read_bytes() == data  # reading changes nothing
    set_aside(damaged)
    (line,) = [record.getMessage() for record in milnce_log.records]
    for part in (str(path), damaged[path], "renamed to epoch0002.pth.tar.damaged"):
        assert part in line and "\n" not in line
    for epoch in range(2, 14):
        assert save(tmp_path, epoch).is_file()
    assert (tmp_path / "epoch0002.pth.tar.damaged").read_bytes() == data
    assert [key for key, _ in list_checkpoints(tmp_path)] == [(epoch, 0) for epoch in range(4, 14)]


def test_an_intact_file_with_pickled_code_ends_the_start(tmp_path):
    """Its checksums are right, so it is another program's, or an attack: the user has to check."""
    save(tmp_path, 1)
    (tmp_path / "epoch0002.pth.tar").write_bytes(to_bytes(content(2, Evil())))
    with pytest.raises(DataError, match=r"epoch0002.*Unsupported.*may be intact"):
        newest_checkpoint(tmp_path)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    path = save(tmp_path, 1)
    data, expected = path.read_bytes(), newest_checkpoint(tmp_path)
    found = 0
    for place in range(0, len(data), 5):
        path.write_bytes(flip_bit(data, place))
        try:
            read = newest_checkpoint(tmp_path)
        except DataError:
            continue
        found += read is None
        assert read is None or read == expected
    assert found > 100


def test_no_damaged_file_replaces_another(tmp_path):
    texts = ["first", "second", "third"]
    for text in texts:
        path = tmp_path / "epoch0002.pth.tar"
        path.write_text(text)
        set_aside({path: "proof"})
    names = ["epoch0002.pth.tar.damaged", *(f"epoch0002.pth.tar.{n}.damaged" for n in (2, 3))]
    assert [(tmp_path / name).read_text() for name in names] == texts
    assert list_checkpoints(tmp_path) == []


def test_a_damaged_file_that_another_process_has_renamed_is_no_error(tmp_path, milnce_log):
    set_aside({tmp_path / "epoch0002.pth.tar": "proof"})
    assert "which is gone now" in milnce_log.text and not list(tmp_path.iterdir())


def test_a_damaged_file_that_cannot_be_renamed_ends_the_start(tmp_path, monkeypatch):
    path = tmp_path / "epoch0002.pth.tar"
    path.write_text("damaged")

    def rename(*paths):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(DataError, match=r"epoch0002.* \(proof\).*Read-only"):
        set_aside({path: "proof"})
    assert path.is_file()


def open_failing_at(path, real, error, where):
    """Make an open() that fails at one path, when the file is opened or when it is read."""

    class File(io.BytesIO):
        def read(self, *size):
            raise error

    def fake(name, *args, **options):
        if str(name) != str(path):
            return real(name, *args, **options)
        if where == "open":
            raise error
        return File()

    return fake


def torch_error():
    """Return the error that torch raises for lack of memory, which is not a MemoryError."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50)
    return raised.value


NO_PROOF = {
    "EIO": lambda: OSError(errno.EIO, "Input/output error"),
    "ESTALE": lambda: OSError(errno.ESTALE, "Stale file handle"),
    "EACCES": lambda: PermissionError(errno.EACCES, "Permission denied"),
    "ENOENT": lambda: FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "ENOMEM": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "MemoryError": MemoryError,
    "torch's": torch_error,
    "unknown": lambda: RuntimeError("something else"),
}


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *product(NO_PROOF, ["open", "read", "torch.load"]),
        *product(["EIO", "MemoryError"], ["zipfile"]),
    ],
)
def test_an_error_that_proves_no_damage_ends_the_start(tmp_path, monkeypatch, kind, where):
    for epoch in (1, 2):
        path = save(tmp_path, epoch)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    error = NO_PROOF[kind]()

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        if where == "torch.load":
            patch.setattr(torch, "load", fail)
        elif where == "zipfile":
            patch.setattr(zipfile.ZipFile, "testzip", fail)
        else:
            patch.setattr(builtins, "open", open_failing_at(path, open, error, where))
        damaged = {}
        with pytest.raises(DataError) as rejected:
            newest_checkpoint(tmp_path, damaged)
    message = str(rejected.value)
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    for part in (str(path), reason, "start again"):
        assert part in message and "\n" not in message
    assert not damaged
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert newest_checkpoint(tmp_path)["path"] == path


def test_an_error_while_an_older_file_is_read_ends_the_start(tmp_path, monkeypatch):
    """The newest file is damaged, but the one before may be intact."""
    for epoch in (1, 2, 3):
        path = save(tmp_path, epoch)
    path.write_bytes(b"")
    error = OSError(errno.EIO, "Input/output error")
    older = tmp_path / "epoch0002.pth.tar"
    monkeypatch.setattr(builtins, "open", open_failing_at(older, open, error, "read"))
    with pytest.raises(DataError, match="epoch0002"):
        newest_checkpoint(tmp_path)
    assert names(tmp_path) == [f"epoch000{epoch}.pth.tar" for epoch in (1, 2, 3)]


def test_a_file_that_is_renamed_after_it_was_listed_is_no_error(tmp_path, monkeypatch):
    """For example by another node, which has also written a newer one."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    real = open

    def late(name, *args, **options):
        if str(name) == str(path) and path.exists():
            path.rename(f"{path}.damaged")
            save(tmp_path, 3)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "open", late)
    assert newest_checkpoint(tmp_path)["epoch"] == 3


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_ends_the_start(tmp_path, monkeypatch, error):
    """An empty list would start the run from scratch."""
    save(tmp_path, 1)

    def fail(folder):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        patch.setattr(os, "scandir", fail)
        with pytest.raises(DataError, match=os.strerror(error)):
            newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path)["epoch"] == 1
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_folder_that_cannot_be_listed_does_not_fail_a_save(tmp_path, monkeypatch, milnce_log):
    def fail(folder):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "listdir", fail)
    assert save(tmp_path, 1).is_file()
    assert "could not remove old checkpoints" in milnce_log.text


def test_weights_without_an_optimizer_are_skipped_and_kept(tmp_path, milnce_log):
    save(tmp_path, 3)
    bare = tmp_path / "epoch0020.pth.tar"
    torch.save({"w": torch.ones(1)}, bare)
    damaged = {}
    assert newest_checkpoint(tmp_path, damaged)["epoch"] == 3
    assert not damaged and "it has no optimizer" in milnce_log.text
    for epoch in range(4, 17):
        assert save(tmp_path, epoch).is_file()
    assert bare.is_file()
    assert len(list_checkpoints(tmp_path)) == KEPT_EPOCHS + 1


def test_a_checkpoint_in_the_old_format_is_resumed_from(tmp_path):
    """The release's PyTorch writes this format, which is not a zip archive."""
    save(tmp_path, 1)
    old = to_bytes(content(2, {"module.w": torch.ones(3)}), _use_new_zipfile_serialization=False)
    (tmp_path / "epoch0002.pth.tar").write_bytes(old)
    found = newest_checkpoint(tmp_path)
    assert found["epoch"] == 2 and torch.equal(found["state_dict"]["w"], torch.ones(3))


def test_a_checkpoint_is_read_without_the_prefix_of_its_keys(tmp_path):
    path = save_checkpoint(tmp_path, content(3, {"module.w": torch.ones(1)}))
    assert list(read_weights(path)["state_dict"]) == ["w"]


def test_a_checkpoint_of_another_batch_size_is_resumed_at_the_same_video():
    progress = {"epoch": 2, "step": 60, "bad_samples": 3, "bad_in_epoch": 1, "skipped_steps": 2}
    progress |= {"skipped_in_row": 1, "clips": 240, "videos": 100}
    resumed = {"epoch": 2, "progress": progress}
    assert Progress.resume(resumed, 4, 100) == Progress(2, 60, 3, 1, 2, 1)
    assert Progress.resume(resumed, 8, 100).step == 30
    # With another video list, the position in the epoch is meaningless: start the epoch again.
    assert Progress.resume(resumed, 4, 50).step == 25
    assert Progress.resume({"epoch": 2}, 4, 100).step == 50  # a checkpoint of the release
