"""Feature files: what is written and read, and which files are rejected."""

import errno
import json

import numpy as np
import pytest

from evaluation import feature_file
from evaluation.feature_file import (
    FeatureSet,
    checksum,
    feature_settings,
    read_features,
    write_features,
)
from utils import DataError

SETTINGS = {"pretrain_cnn_path": "sha256:aa", "num_frames": 16}
LEFT_OUT = {"jump/b.avi": "undecodable", "jump/c.avi": "absent"}
NAMES = ["wave/a.avi", "wave/ä b.avi", *LEFT_OUT]


def some_features():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, 1024)).astype(np.float32) for name in NAMES[:2]}


@pytest.fixture
def path(tmp_path):
    write_features(tmp_path / "features.npz", SETTINGS, FeatureSet(some_features(), LEFT_OUT))
    return tmp_path / "features.npz"


def test_features_are_read_as_written_bit_for_bit(path):
    features, left_out = read_features(path, SETTINGS, NAMES)
    assert left_out == LEFT_OUT
    assert list(features) == NAMES[:2]
    for name, windows in some_features().items():
        assert features[name].dtype == np.float32
        np.testing.assert_array_equal(features[name], windows)


def test_only_the_named_videos_are_returned(path):
    features, left_out = read_features(path, SETTINGS, [NAMES[1], NAMES[3]])
    assert (list(features), left_out) == ([NAMES[1]], {NAMES[3]: "absent"})


def test_a_file_may_have_features_of_all_videos(tmp_path):
    write_features(tmp_path / "f.npz", SETTINGS, FeatureSet(some_features(), {}))
    assert read_features(tmp_path / "f.npz", SETTINGS, NAMES[:2]).left_out == {}


def test_numpy_alone_reads_the_file(path):
    with np.load(path) as file:
        assert file["features"].shape == (2, 4, 1024)
        assert file["videos"].tolist() == NAMES[:2]
        assert json.loads(file["settings"].item()) == SETTINGS


def test_videos_may_have_different_numbers_of_windows(tmp_path):
    rng = np.random.default_rng(0)
    features = {f"v{n}": rng.standard_normal((n, 8)).astype(np.float32) for n in (3, 1, 7)}
    write_features(tmp_path / "f.npz", SETTINGS, FeatureSet(features, LEFT_OUT))
    found = read_features(tmp_path / "f.npz", SETTINGS, ["v7", "v1", *LEFT_OUT])
    assert found.left_out == LEFT_OUT and list(found.features) == ["v7", "v1"]
    for name, windows in found.features.items():
        np.testing.assert_array_equal(windows, features[name])
    with np.load(tmp_path / "f.npz") as file:
        assert file["features"].shape == (11, 8) and file["windows"].tolist() == [3, 1, 7]


def test_a_file_from_before_the_number_of_windows_was_stored_is_read(path):
    with np.load(path) as file:
        older = {name: file[name] for name in file if name != "windows"}
    np.savez(path, **older)
    assert list(read_features(path, SETTINGS, NAMES).features) == NAMES[:2]


def test_windows_that_do_not_add_up_are_refused(tmp_path):
    features = {"a": np.zeros((2, 8), np.float32), "b": np.zeros((3, 8), np.float32)}
    write_features(tmp_path / "f.npz", SETTINGS, FeatureSet(features, {}))
    with np.load(tmp_path / "f.npz") as file:
        changed = {**file, "windows": np.array([2, 4])}
    np.savez(tmp_path / "f.npz", **changed)
    assert "damaged" in refusal(tmp_path / "f.npz", names=["a", "b"])


def refusal(path, settings=SETTINGS, names=NAMES):
    with pytest.raises(DataError) as refused:
        read_features(path, settings, names)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert message.endswith("delete it or give another file")
    return message


def test_other_settings_are_refused_and_named(path):
    other = {**SETTINGS, "num_frames": 32}
    assert "--num_frames 16, not 32;" in refusal(path, other)
    other["pretrain_cnn_path"] = "sha256:bb"
    message = refusal(path, other)
    assert "--num_frames 16, not 32" in message
    assert "--pretrain_cnn_path sha256:aa, not sha256:bb" in message


def test_a_setting_that_the_file_lacks_is_refused(path):
    assert "--amp None, not bf16" in refusal(path, {**SETTINGS, "amp": "bf16"})


def test_a_setting_of_none_matches_any_value(path):
    features, left_out = read_features(path, {**SETTINGS, "pretrain_cnn_path": None}, NAMES)
    assert (list(features), left_out) == (NAMES[:2], LEFT_OUT)


def test_features_of_another_decoder_are_refused(tmp_path):
    path = tmp_path / "features.npz"
    write_features(path, {**SETTINGS, "decoder": "pyav"}, FeatureSet(some_features(), LEFT_OUT))
    assert read_features(path, {**SETTINGS, "decoder": "pyav"}, NAMES)[1] == LEFT_OUT
    assert "--decoder pyav, not ffmpeg;" in refusal(path, {**SETTINGS, "decoder": "ffmpeg"})


@pytest.mark.parametrize("decoder", ["pyav", "ffmpeg"])
def test_features_from_before_the_decoder_was_a_setting_are_read(path, decoder):
    features, left_out = read_features(path, {**SETTINGS, "decoder": decoder}, NAMES)
    assert (list(features), left_out) == (NAMES[:2], LEFT_OUT)


def test_a_table_with_other_videos_is_refused(path):
    assert "wave/new.avi" in refusal(path, names=[*NAMES, "wave/new.avi"])


def change_a_byte(content):
    where = content.index(some_features()[NAMES[0]].tobytes()[:64])  # one of the numbers
    return content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "its last byte cut": lambda content: content[:-1],
    "a bit changed": change_a_byte,
    "another file": lambda content: b"video_id,label\n",
    "another npy": lambda content: np.lib.format.magic(1, 0) + b"\x00" * 8,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(path, damage):
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert "damaged" in refusal(path)


def test_another_npz_and_one_with_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "other.npz", words=np.array(["cut"]))
    assert "damaged or not a feature file" in refusal(tmp_path / "other.npz")
    np.savez(tmp_path / "pickles.npz", settings=np.array({"num_frames": 16}, dtype=object))
    assert "damaged or not a feature file" in refusal(tmp_path / "pickles.npz")


def test_a_full_disk_keeps_the_previous_file(path, monkeypatch):
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_file.np, "savez", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_features(path, SETTINGS, FeatureSet(some_features(), {}))
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_settings_name_the_weights_by_their_content(tmp_path):
    def settings(weights, **others):
        (tmp_path / "w.pth").write_bytes(weights)
        clip = {"num_frames": 16, "video_size": 224, "amp": "auto", **others}
        return feature_settings(checksum(tmp_path / "w.pth"), **clip)

    digest = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    clip = {"num_frames": 16, "video_size": 224, "amp": "none"}
    assert settings(b"abc") == {"pretrain_cnn_path": digest, **clip}
    assert settings(b"abc", stride=1.5, weights_key="weights") == {
        "weights": digest,
        **clip,
        "stride": 1.5,
    }
    assert settings(b"abd")["pretrain_cnn_path"] != digest
    assert feature_settings(None, **clip) == {"pretrain_cnn_path": None, **clip}
