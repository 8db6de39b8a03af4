"""The script that writes features, run as a user runs it."""

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import extract_features
from args import get_args, inference_model
from s3dg import S3D, load_model, to_unit_range
from tests.helpers import (
    FAILURES,
    ROOT,
    await_gone,
    golden_weight,
    make_video,
    pack_folder,
    write_csv,
)
from utils import InputError
from video_decoder import ClipSpec, decode_clips, decode_windows

HEADER = ("video_path", "feature_path")
NAMES = ["a.mp4", "sub/a.mkv", "sub/b.mp4", "short.mp4"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of golden weights with few words."""
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    state = S3D().state_dict() | {"text_module.word_embd.weight": torch.zeros(5, 300)}
    torch.save({name: golden_weight(name, v.shape).to(v.dtype) for name, v in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, seconds in zip(NAMES, (8, 2, 3, 0.5), strict=True):
        make_video(folder / name, seconds)
    (folder / "notes.txt").write_text("no video")
    return folder


def flags(weights, videos, out, *more):
    return [
        f"--pretrain_cnn_path={weights}",
        f"--video_path={videos}",
        f"--feature_root={out}",
        *("--num_frames=4", "--video_size=32", "--batch_size_val=8", "--num_thread_reader=1"),
        *more,
    ]


@functools.cache
def model_of(path):
    """Load the model once for all runs in this process."""
    args = get_args(argv=[f"--pretrain_cnn_path={path}", "--num_frames=4", "--video_size=32"])
    return inference_model(args, torch.device("cpu"))


@pytest.fixture
def extract(weights, videos, monkeypatch):
    """Return a function that runs the script in this process and returns its exit status.

    It uses no workers, which is quicker.
    """
    monkeypatch.setattr(
        extract_features,
        "inference_model",
        lambda args, device, joint_space: model_of(Path(args.pretrain_cnn_path)),
    )

    def run(out, *more):
        given = flags(weights, videos, out, "--num_thread_reader=0", *more)
        monkeypatch.setattr(sys, "argv", ["extract_features.py", *map(str, given)])
        try:
            extract_features.main()
        except SystemExit as stopped:
            return stopped.code
        return 0

    return run


def written(out):
    """Read all files below a folder: {relative path: bytes}."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(weights, videos, tmp_path_factory):
    """Extract the features of all videos, in one run with a worker process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    command = [sys.executable, ROOT / "extract_features.py", *flags(weights, videos, out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def assert_close(found, expected):
    """Compare within a thousandth of the largest value: sums depend on the batch's size."""
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def assert_same_features(out, whole):
    assert written(out).keys() == written(whole).keys()
    for name, content in written(whole).items():
        if name.endswith(".npy"):
            assert_close(np.load(out / name), np.load(whole / name))
        else:
            assert written(out)[name] == content


def test_the_features_of_a_tar_file_are_those_of_its_folder(extract, whole, videos, tmp_path):
    shard = pack_folder(videos, tmp_path / "films/s.tar")
    assert extract(tmp_path / "out", f"--video_path={shard}") == 0
    assert_same_features(tmp_path / "out", whole)
    assert extract(tmp_path / "folder", f"--video_path={shard.parent}") == 0
    expected = {f"s.tar/{name}" for name in written(whole)}
    assert written(tmp_path / "folder").keys() == expected
    for name in expected:
        if name.endswith(".npy"):
            assert_close(np.load(tmp_path / "folder" / name), np.load(whole / name[6:]))


def test_a_folder_of_videos_becomes_a_folder_of_features_and_sidecar_files(whole, weights):
    stems = ("a", "short", "sub/a", "sub/b")
    assert list(written(whole)) == [f"{s}.{kind}" for s in stems for kind in ("json", "npy")]
    side = json.loads((whole / "sub/b.json").read_text())
    assert side["video"] == "sub/b.mp4" and side["black"] == []
    assert side["times"] == [[0.0, 0.8], [0.8, 1.6], [1.6, 2.4]]
    assert side["frames"] == [4, 4, 4]
    checksum = side["settings"].pop("pretrain_cnn_path")
    assert checksum.startswith("sha256:") and len(checksum) == 71
    assert side["settings"] == {
        "num_frames": 4,
        "video_size": 32,
        "layer": "mixed_5c",
        "fps": 5,
        "stride": 0.8,
        "amp": "none",
        "decoder": "pyav",
    }


def test_the_features_are_the_models_output_for_each_window(whole, weights, videos):
    model = load_model(weights)
    for name, rows in (("a.mp4", 10), ("short.mp4", 1)):
        found = np.load((whole / name).with_suffix(".npy"))
        starts = [k * 0.8 for k in range(rows)]
        clips, _ = decode_windows(videos / name, starts, ClipSpec(4, 32, 5))
        with torch.inference_mode():
            expected = model(to_unit_range(clips), mode="video", mixed5c=True).numpy()
        assert_close(found, expected)
        assert found.shape == (rows, 1024)
        assert rows == 1 or expected.std(axis=0).max() > 0.02 * expected.max()  # windows differ


def test_the_window_of_a_short_video_ends_where_the_video_does(whole):
    side = json.loads((whole / "short.json").read_text())
    assert side["times"] == [[0.0, 0.5]] and side["frames"] == [3]  # of 0.8 s and 4 frames


def test_a_table_is_extracted_as_joint_embeddings_at_another_stride(
    extract, weights, videos, tmp_path
):
    table = tmp_path / "list.csv"
    write_csv(table, HEADER, ("sub/b.mp4", "x/y.npy"), ("short.mp4", "z.npy"))
    assert (
        extract(tmp_path / "out", f"--feature_csv={table}", "--layer=embedding", "--stride=1") == 0
    )
    assert list(written(tmp_path / "out")) == ["x/y.json", "x/y.npy", "z.json", "z.npy"]
    assert json.loads((tmp_path / "out/x/y.json").read_text())["times"][-1] == [2.0, 2.8]
    clips = decode_clips(videos / "sub/b.mp4", [0, 1, 2], fps=5, num_frames=4, size=32)
    with torch.inference_mode():
        expected = model_of(weights)(to_unit_range(clips), mode="video").numpy()
    assert_close(np.load(tmp_path / "out/x/y.npy"), expected)


def test_shards_do_not_overlap_and_cover_all_videos(extract, whole, tmp_path):
    for index in range(2):
        assert extract(tmp_path / f"{index}", f"--shard={index}/2") == 0
    shards = [set(written(tmp_path / f"{index}")) for index in range(2)]
    assert all(shards) and not shards[0] & shards[1]
    for name, content in written(tmp_path / "1").items():
        (tmp_path / "0" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "0" / name).write_bytes(content)
    assert_same_features(tmp_path / "0", whole)


def test_an_array_task_takes_its_shard(extract, tmp_path, monkeypatch):
    for name, value in {"ID": 5, "MIN": 1, "MAX": 7, "STEP": 2, "COUNT": 4}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert extract(tmp_path) == 0
    assert list(written(tmp_path)) == ["sub/a.json", "sub/a.npy"]  # the third of four


def test_videos_with_features_are_skipped(extract, whole, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("a.json", "a.npy", "sub/a.json", "short.json"):
        content = (whole / name).read_bytes() if (whole / name).exists() else b"half"
        (tmp_path / name).write_bytes(content)
    before = (tmp_path / "a.npy").stat().st_mtime_ns
    extracted = []

    def record(model, paths, *args, **settings):
        extracted.extend(path.name for path in paths)
        return strided_features(model, paths, *args, **settings)

    strided_features = extract_features.strided_features
    monkeypatch.setattr(extract_features, "strided_features", record)
    assert extract(tmp_path) == 0
    assert extracted == ["short.mp4", "a.mkv", "b.mp4"]
    assert (tmp_path / "a.npy").stat().st_mtime_ns == before
    assert_same_features(tmp_path, whole)
    extracted.clear()
    assert extract(tmp_path) == 0 and extracted == []


@pytest.mark.slow
def test_a_killed_run_leaves_complete_files_and_can_be_resumed(weights, videos, whole, tmp_path):
    script = ROOT / "extract_features.py"
    command = [sys.executable, script, *flags(weights, videos, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not list(tmp_path.glob("*.npy")) and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = {name: c for name, c in written(tmp_path).items() if name.endswith((".npy", ".json"))}
    assert 0 < len(left) <= len(written(whole))
    for path in tmp_path.rglob("*.npy"):
        assert np.load(path).shape == np.load(whole / path.relative_to(tmp_path)).shape
        assert json.loads(path.with_suffix(".json").read_text())
    subprocess.run(command, check=True, capture_output=True)
    for path in tmp_path.rglob("*.tmp"):
        path.unlink()  # what a kill may leave
    assert_same_features(tmp_path, whole)
    assert all(written(tmp_path)[n] == c for n, c in left.items() if n.endswith(".npy"))


def test_ctrl_c_ends_the_run_with_one_line(weights, videos, tmp_path):
    script = ROOT / "extract_features.py"
    command = [sys.executable, script, *flags(weights, videos, tmp_path), "--stride=0.005"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = psutil.Popen(
        command,
        **pipes,
        text=True,
        start_new_session=True,
        # A background job ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "already done: 0" in process.stdout.readline()  # and many windows remain
    family = [process, *process.children(recursive=True)]
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches all of them
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "stopped: the same command resumes\n")
    for member in family:
        await_gone(member.pid)


def test_videos_that_cannot_be_used_are_listed_and_the_others_extracted(extract, tmp_path, capsys):
    rows = [("absent.mp4", "x.npy"), ("short.mp4", "short.npy"), ("notes.txt", "y.npy")]
    write_csv(tmp_path / "list.csv", HEADER, *rows)
    for _ in range(2):  # a second run retries them
        assert extract(tmp_path / "out", f"--feature_csv={tmp_path}/list.csv") == 1
        assert list(written(tmp_path / "out")) == ["failed.csv", "short.json", "short.npy"]
        with open(tmp_path / "out/failed.csv", newline="") as file:
            listed = list(csv.reader(file))
        assert [row[0] for row in listed] == ["video_path", "absent.mp4", "notes.txt"]
        assert "No such file" in listed[1][1] and "Invalid data" in listed[2][1]
    shown = capsys.readouterr().out
    assert shown.count("absent.mp4: No such file") == shown.count("notes.txt: Invalid") == 2
    write_csv(tmp_path / "list.csv", HEADER, rows[1])
    assert extract(tmp_path / "out", f"--feature_csv={tmp_path}/list.csv") == 0
    assert "failed.csv" not in written(tmp_path / "out")


@pytest.mark.parametrize("failure", FAILURES)
def test_an_ffmpeg_program_that_fails_leaves_no_features(
    extract, ffmpeg_in_path, tmp_path, failure
):
    commands, quoted = FAILURES[failure]
    ffmpeg_in_path(commands)
    assert extract(tmp_path / "out", "--decoder=ffmpeg") == 1
    assert list(written(tmp_path / "out")) == ["failed.csv"]
    with open(tmp_path / "out/failed.csv", newline="") as file:
        reasons = {row["video_path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == set(NAMES) and all(quoted in reason for reason in reasons.values())


def test_an_ffmpeg_program_that_does_not_run_is_reported_at_the_start(
    extract, ffmpeg_in_path, tmp_path
):
    ffmpeg_in_path("echo 'no libx264' >&2; exit 127", version=False)
    with pytest.raises(InputError, match=r"--decoder ffmpeg: .*/ffmpeg exited .*: no libx264; "):
        extract(tmp_path / "out", "--decoder=ffmpeg")
    assert not list(tmp_path.rglob("*.json"))


def test_an_extraction_of_mostly_black_windows_is_an_error(extract, tmp_path, capsys):
    folder = tmp_path / "videos"
    make_video(folder / "a.mp4", 4)  # five windows
    make_video(folder / "dark.mp4", 4, "-vf", "drawbox=t=fill:color=black")
    assert extract(tmp_path / "half", f"--video_path={folder}") == 0
    shown = capsys.readouterr().out
    assert "dark.mp4: black windows: 5 of 5" in shown and "5 of 10" not in shown
    make_video(folder / "dark.mkv", 0.8, "-vf", "drawbox=t=fill:color=black")
    (folder / "dark.mkv").rename(folder / "b.mkv")
    assert extract(tmp_path / "most", f"--video_path={folder}") == 1
    assert capsys.readouterr().out.count("black windows: 6 of 11; check the videos") == 1


def test_features_from_before_the_decoder_was_a_setting_are_kept(extract, whole, tmp_path):
    for name, content in written(whole).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".json"):
            side = json.loads(content)
            del side["settings"]["decoder"]
            content = json.dumps(side).encode()
        (tmp_path / name).write_bytes(content)
    before = written(tmp_path)
    for decoder in ("pyav", "ffmpeg"):
        assert extract(tmp_path, f"--decoder={decoder}") == 0
        assert written(tmp_path) == before


def test_old_features_of_a_short_video_with_black_frames_are_extracted_again(
    extract, whole, tmp_path
):
    shutil.copytree(whole, tmp_path / "out")
    for name in ("a", "short"):
        side = tmp_path / "out" / f"{name}.json"
        content = json.loads(side.read_text())
        del content["frames"]
        side.write_text(json.dumps(content))
    assert extract(tmp_path / "out") == 0
    assert "frames" in json.loads((tmp_path / "out/short.json").read_text())
    assert "frames" not in json.loads((tmp_path / "out/a.json").read_text())


def test_truncated_features_are_extracted_again(extract, whole, tmp_path):
    for name in ("a.json", "a.npy"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    for kept in (0, -4):
        (tmp_path / "a.npy").write_bytes((whole / "a.npy").read_bytes()[:kept])
        assert extract(tmp_path) == 0
        assert_same_features(tmp_path, whole)


def test_failure_lists_of_earlier_runs_are_removed(extract, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("failed.csv", "failed_1of3.csv", "failed_0of2.csv", "failed_1of2.csv"):
        (tmp_path / "out" / name).touch()
    write_csv(tmp_path / "list.csv", HEADER, ("short.mp4", "short.npy"))
    listed = f"--feature_csv={tmp_path}/list.csv"
    assert extract(tmp_path / "out", listed, "--shard=0/2") == 0
    # The other shard's list stays: that shard may still be running.
    left = ["failed_1of2.csv", "short.json", "short.npy"]
    assert list(written(tmp_path / "out")) == left
    assert extract(tmp_path / "out", listed) == 0
    assert list(written(tmp_path / "out")) == left[1:]


def test_a_failure_list_that_cannot_be_written_is_not_named(extract, tmp_path, capsys):
    (tmp_path / "out/failed.csv").mkdir(parents=True)
    write_csv(tmp_path / "list.csv", HEADER, ("absent.mp4", "x.npy"))
    assert extract(tmp_path / "out", f"--feature_csv={tmp_path}/list.csv") == 1
    shown = capsys.readouterr().out
    assert "videos that could not be used: 1, named above" in shown


def test_a_full_disk_ends_the_run_with_one_line_and_complete_files(extract, tmp_path, monkeypatch):
    saved, save = [], np.save

    def full(file, features, allow_pickle):
        if saved:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved.append(save(file, features))

    monkeypatch.setattr(extract_features.np, "save", full)
    with pytest.raises(InputError, match=r"--feature_root: .*No space left on device") as stopped:
        extract(tmp_path)
    assert "\n" not in str(stopped.value)
    assert len(list(tmp_path.rglob("*.npy"))) == 1 and not list(tmp_path.rglob("*.tmp"))


def test_a_file_in_place_of_the_folder_is_refused(extract, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="--feature_root: cannot make the folder"):
        extract(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "more", "named"),
    [
        (None, ["--stride=1"], "--stride 0.8, not 1.0"),
        (None, ["--layer=embedding"], "--layer mixed_5c, not embedding"),
        (None, ["--video_size=64"], "--video_size 32, not 64"),
        (None, ["--decoder=ffmpeg"], "--decoder pyav, not ffmpeg"),
        ({"settings": {}}, [], "--pretrain_cnn_path None, not sha256"),
        ({"video": "b.mp4"}, [], "are of b.mp4, not a.mp4"),
        ("half", [], "a.json is damaged"),
        ("absent", [], "no a.json"),
    ],
)
def test_features_of_something_else_are_not_overwritten(
    change, more, named, extract, whole, tmp_path
):
    for name in ("a.json", "a.npy"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    side = tmp_path / "a.json"
    if change == "half":
        side.write_bytes(side.read_bytes()[:100])
    elif change == "absent":
        side.unlink()
    elif change:
        side.write_text(json.dumps({**json.loads(side.read_text()), **change}))
    before = written(tmp_path)
    with pytest.raises(InputError, match=f"--feature_root: .*{named}") as refused:
        extract(tmp_path, *more)
    assert "\n" not in str(refused.value) and written(tmp_path) == before


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([("/a.mp4", "a.npy")], "line 2: column video_path: '/a.mp4' leads out"),
        ([("a.mp4", "../a.npy")], r"line 2: column feature_path: '../a.npy' leads out"),
        ([("a.mp4", "/tmp/a.npy")], "line 2: column feature_path: '/tmp/a.npy' leads out"),
        ([("a.mp4", "a.npy"), ("b.mp4", "./a.npy")], "line 3: .* is duplicated"),
        ([("a.mp4", "a.npz")], r"line 2: .*'a.npz' is not the name of a \.npy"),
        ([("a.mp4", "")], "line 2: column feature_path: the cell is empty"),
        ([], "no videos"),
    ],
)
def test_invalid_tables_are_refused(rows, named, extract, tmp_path):
    write_csv(tmp_path / "list.csv", HEADER, *rows)
    with pytest.raises(InputError, match=named):
        extract(tmp_path / "out", f"--feature_csv={tmp_path}/list.csv")


def test_features_of_videos_that_differ_by_extension_keep_it(extract, videos, tmp_path):
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("a.mp4", "a.mkv", "a.mkv.mp4", "b.mp4"):
        shutil.copy(videos / "short.mp4", folder / name)
    assert extract(out, f"--video_path={folder}") == 0
    names = ["a.mkv.mp4.npy", "a.mkv.npy", "a.mp4.npy", "b.npy"]
    assert sorted(path.name for path in out.glob("*.npy")) == names


def test_missing_flags_are_named(extract, tmp_path):
    with pytest.raises(InputError, match="--feature_root is needed"):
        extract("")
    with pytest.raises(InputError, match="--video_path is needed"):
        extract(tmp_path, "--video_path=")
    with pytest.raises(InputError, match="--pretrain_cnn_path"):
        extract(tmp_path, "--pretrain_cnn_path=absent.pth")
