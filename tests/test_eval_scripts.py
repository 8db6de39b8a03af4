"""The evaluation scripts, run as a user runs them."""

import contextlib
import hashlib
import importlib
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from args import get_args, inference_model
from evaluation.feature_file import read_features
from tests.helpers import DETAILS, golden_json, run_python, without_command, write_csv
from utils import run_script


def small(weights, toy):
    return [
        f"--pretrain_cnn_path={weights}",
        f"--token_to_word_path={toy}/dict.npy",
        *("--num_frames=4", "--video_size=32", "--num_windows_test=2", "--num_thread_reader=2"),
    ]


def evaluate(script, tmp_path, *flags):
    run_python(script, *flags, f"--metrics_json={tmp_path}/out.json")
    return json.loads((tmp_path / "out.json").read_text())


TABLES = {
    "eval_youcook.py": ("youcook", "validation_youcook.csv"),
    "eval_msrvtt.py": ("msrvtt", "msrvtt_test.csv"),
    "eval_hmdb.py": ("hmdb", "hmdb51.csv"),
    "eval_ucf.py": ("ucf", "ucfTrainTestlist"),
}


RECOGNITION = ["eval_hmdb.py", "eval_ucf.py"]


def toy_set(script, toy):
    folder, table = TABLES[script]
    return [f"--eval_video_root={toy}/{folder}", f"--eval_csv={toy}/{table}"]


@pytest.mark.parametrize("script", ["eval_youcook.py", "eval_msrvtt.py"])
def test_retrieval_metrics_are_written(script, toy, weights, tmp_path):
    metrics = evaluate(script, tmp_path, *small(weights, toy), *toy_set(script, toy))
    names = ["R1", "R5", "R10", "MR", "num_videos", "num_missing"]
    assert list(metrics) == [*names, *DETAILS]
    rows = len((toy / TABLES[script][1]).read_text().splitlines()) - 1
    assert (metrics["num_videos"], metrics["num_missing"]) == (rows, 0)
    assert 0 <= metrics["R1"] <= metrics["R5"] <= metrics["R10"] <= 1


@pytest.mark.parametrize("script", RECOGNITION)
def test_recognition_metrics_are_written(script, toy, weights, tmp_path):
    metrics = evaluate(script, tmp_path, *small(weights, toy), *toy_set(script, toy))
    names = ["split1", "split2", "split3", "mean", "num_videos", "num_missing"]
    assert list(metrics) == [*names, *DETAILS]
    splits = [metrics[f"split{k}"] for k in (1, 2, 3)]
    assert metrics["mean"] == pytest.approx(sum(splits) / 3)
    assert splits == [hits / of for hits, of in metrics["counts"].values()]
    assert metrics["num_videos"] == len(list((toy / TABLES[script][0]).glob("*/*"))) // (
        3 if script == "eval_hmdb.py" else 1  # the fixture keeps a third of HMDB's table
    )


def test_the_command_and_the_checksum_of_the_weights_are_written(toy, weights, tmp_path):
    flags = [*small(weights, toy), *toy_set("eval_ucf.py", toy), f"--html_report={tmp_path}"]
    metrics = evaluate("eval_ucf.py", tmp_path, *flags)
    python, script, *given = shlex.split(metrics["command"])
    assert (python, Path(script).name) == ("python", "eval_ucf.py")
    assert given == [*flags, f"--metrics_json={tmp_path}/out.json"]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert metrics["weights_checksum"] == f"sha256:{digest}"
    settings = dict(page_data(tmp_path)["settings"])
    assert settings["command"] == metrics["command"]
    assert settings["weights checksum"] == metrics["weights_checksum"]


@pytest.mark.slow
def test_the_ffmpeg_backend_gives_the_same_metrics(toy, weights, tmp_path):
    flags = [*small(weights, toy), *toy_set("eval_msrvtt.py", toy)]
    ours = evaluate("eval_msrvtt.py", tmp_path, *flags)
    theirs = evaluate("eval_msrvtt.py", tmp_path, *flags, "--decoder=ffmpeg")
    assert without_command(ours) == without_command(theirs)


def test_the_shared_clips_are_evaluated_and_absent_or_broken_ones_counted(
    toy, weights, tmp_path, shared_videos
):
    folder = tmp_path / "validation" / "101"
    folder.mkdir(parents=True)
    for clip in ("v_GGSY1Qvo990.mp4", "flipping_a_pancake.mkv"):
        shutil.copy(shared_videos / clip, folder)
    (folder / "broken.mp4").write_bytes(b"not a video")
    rows = [
        (8, 1, 101, "cut the red star", "v_GGSY1Qvo990"),
        (9, 2, 101, "the star spins", "flipping_a_pancake"),
        (9, 2, 101, "the star", "broken"),
        (9, 2, 101, "a star", "absent"),
    ]
    header = ("end", "start", "task", "text", "video_id")
    write_csv(tmp_path / "table.csv", header, *rows)
    metrics = evaluate(
        "eval_youcook.py",
        tmp_path,
        *small(weights, toy),
        f"--eval_csv={tmp_path}/table.csv",
        f"--eval_video_root={tmp_path}",
    )
    assert (metrics["num_videos"], metrics["num_missing"]) == (2, 2)


def test_the_shared_clips_are_classified(toy, weights, tmp_path, shared_videos):
    rows = []
    for label, clip in (("stand", "v_GGSY1Qvo990.mp4"), ("flip", "flipping_a_pancake.mkv")):
        (tmp_path / label).mkdir()
        for part, copy in ((1, f"train_{clip}"), (2, f"test_{clip}")):
            shutil.copy(shared_videos / clip, tmp_path / label / copy)
            rows.append((copy, f"{label}_test", part, part, part))
    header = ("video_id", "label", "split1", "split2", "split3")
    write_csv(tmp_path / "table.csv", header, *rows)
    metrics = evaluate(
        "eval_hmdb.py",
        tmp_path,
        *small(weights, toy),
        f"--eval_csv={tmp_path}/table.csv",
        f"--eval_video_root={tmp_path}",
    )
    top1 = {name: metrics[name] for name in ("split1", "split2", "split3", "mean")}
    assert set(top1.values()) == {1}  # trained on the same clip


def page_data(folder):
    """Return the JSON object of a page of --html_report."""
    page = (folder / "index.html").read_text()
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_of_a_retrieval_agrees_with_the_metrics(toy, weights, tmp_path):
    flags = [*small(weights, toy), *toy_set("eval_youcook.py", toy)]
    run = run_python(
        "eval_youcook.py",
        *flags,
        f"--metrics_json={tmp_path}/out.json",
        f"--html_report={tmp_path}/a/page",
    )
    assert run.stdout.splitlines()[-1] == f"report: {tmp_path}/a/page/index.html"
    metrics = json.loads((tmp_path / "out.json").read_text())
    data = page_data(tmp_path / "a/page")
    ranks = np.array([query["rank"] for query in data["queries"]])
    assert len(ranks) == len(data["videos"]) == metrics["num_videos"]
    assert metrics["R5"] == np.mean(ranks <= 5) and metrics["MR"] == np.median(ranks)
    in_page = [[v for v, _ in query["best"]].index(text) + 1
               for text, query in enumerate(data["queries"]) if query["rank"] <= 5]  # fmt: skip
    assert in_page == ranks[ranks <= 5].tolist()
    assert len({video["picture"] for video in data["videos"]}) > len(ranks) / 2
    assert dict(data["settings"])["weights"] == weights.name
    page = (tmp_path / "a/page/index.html").read_text()
    command = json.dumps(metrics["command"])[1:-1].replace("<", "\\u003c")
    assert page.count(command) == 1
    assert str(tmp_path) not in page.replace(command, "")  # the only paths are the command's
    assert dict((name, value) for name, value, _ in data["metrics"])["MR"] == f"{metrics['MR']:.4g}"


def test_metrics_are_reported_even_if_the_page_cannot_be_written(
    toy, weights, tmp_path, monkeypatch, capsys
):
    @contextlib.contextmanager
    def full(path):
        raise OSError("No space left on device")
        yield

    monkeypatch.setattr("evaluation.report.atomic_write", full)
    flags = [*small(weights, toy), *toy_set("eval_msrvtt.py", toy), f"--html_report={tmp_path}"]
    with pytest.raises(SystemExit) as stopped:
        run_main("eval_msrvtt.py", [*flags, f"--metrics_json={tmp_path}/out.json"], monkeypatch)
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.err.count("\n") == 1
    assert "--html_report" in output.err and "No space left" in output.err
    assert output.out.splitlines()[0].startswith("MSRVTT R1: ")
    assert json.loads((tmp_path / "out.json").read_text())["num_videos"] > 0


@pytest.fixture(scope="module")
def kept(toy, weights, tmp_path_factory):
    """Run eval_hmdb.py with --feature_cache on a table with one broken and one absent clip.

    Returns the folder, flags, metrics and the line on skipped videos. The videos are removed after
    the run.
    """
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(toy / "hmdb", folder / "hmdb")
    shutil.copy(toy / "hmdb51.csv", folder / "hmdb51.csv")
    rows = (folder / "hmdb51.csv").read_text().splitlines()[1:]
    broken, absent = (video_path(folder, row) for row in rows[:2])
    broken.write_bytes(b"not a video")
    absent.unlink()
    flags = [*small(weights, toy), *toy_set("eval_hmdb.py", folder)]
    flags.append(f"--feature_cache={folder}/features.npz")
    run = run_python("eval_hmdb.py", *flags, f"--metrics_json={folder}/out.json")
    shutil.rmtree(folder / "hmdb")
    return folder, flags, json.loads((folder / "out.json").read_text()), skipped_videos(run.stdout)


def video_path(folder, row):
    name, label = row.split(",")[:2]
    return folder / "hmdb" / label.removesuffix("_test") / name


def skipped_videos(output):
    [line] = [line for line in output.splitlines() if "skipped videos: " in line]
    return line.partition("skipped videos: ")[2]


def run_main(script, flags, monkeypatch):
    """Run the script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    run_script(importlib.import_module(script.removesuffix(".py")).main)


def test_a_second_run_needs_neither_videos_nor_weights(kept, tmp_path, monkeypatch, capsys):
    folder, flags, metrics, skipped = kept
    assert skipped == "1 absent, 1 undecodable"
    for argv in (flags, [*flags, "--eval_video_root=", "--pretrain_cnn_path="]):
        run_main("eval_hmdb.py", [*argv, f"--metrics_json={tmp_path}/out.json"], monkeypatch)
        again = json.loads((tmp_path / "out.json").read_text())
        assert without_command(again) == without_command(metrics)
        assert skipped_videos(capsys.readouterr().out) == skipped
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["features.npz", "hmdb51.csv", "out.json"]  # and no partial file


def test_a_second_run_scores_the_tables_splits(kept, tmp_path, monkeypatch):
    folder, flags, _, _ = kept
    header, *rows = (folder / "hmdb51.csv").read_text().splitlines()
    cells = [row.split(",") for row in rows]
    at = header.split(",").index("split1")
    for row in cells:  # tested on what it was trained on
        row[at : at + 3] = ["1"] * 3
    for row in cells[2:3]:
        row[at : at + 3] = ["2"] * 3
    write_csv(tmp_path / "table.csv", header.split(","), *cells)
    output = f"--metrics_json={tmp_path}/out.json"
    run_main("eval_hmdb.py", [*flags, f"--eval_csv={tmp_path}/table.csv", output], monkeypatch)
    metrics = json.loads((tmp_path / "out.json").read_text())
    assert {metrics[f"split{k}"] for k in (1, 2, 3)} <= {0, 1}  # one video is tested


def test_the_page_of_hmdb_agrees_with_the_metrics_and_needs_no_video(kept, tmp_path, monkeypatch):
    _, flags, metrics, _ = kept
    run_main(
        "eval_hmdb.py", [*flags, "--pretrain_cnn_path=", f"--html_report={tmp_path}"], monkeypatch
    )
    data = page_data(tmp_path)
    assert dict(data["settings"])["features"] == "features.npz"
    assert ["num_missing", "2", ""] in data["metrics"]
    confusion = np.array(data["confusion"])
    assert sorted(row[0] for row in data["classes"]) == data["names"]
    # The toy set's splits have nearly equal numbers of test videos: their mean is close to the mean
    # over all test videos.
    assert np.trace(confusion) / confusion.sum() == pytest.approx(metrics["mean"], abs=0.05)


def test_metrics_are_reported_even_if_the_features_cannot_be_written(
    kept, toy, tmp_path, monkeypatch, capsys
):
    folder, flags, metrics, _ = kept
    stored = str(folder / "features.npz")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation_script.inference_model", lambda *given, **options: None)
    monkeypatch.setattr(
        "evaluation_script.clip_features",
        lambda model, dataset, device, **decoding: read_features(stored, {}, dataset.names),
    )
    monkeypatch.setattr("evaluation_script.write_features", full)
    more = [f"--feature_cache={tmp_path}/new.npz", f"--metrics_json={tmp_path}/out.json"]
    run_main("eval_hmdb.py", [*flags, f"--eval_video_root={toy}/hmdb", *more], monkeypatch)
    assert "No space left on device" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert without_command(written) == without_command(metrics)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_frames=8"], "--num_frames 4, not 8"),
        (["--video_size=64"], "--video_size 32, not 64"),
        (["--num_windows_test=3"], "--num_windows_test 2, not 3"),
        (["--pretrain_cnn_path={toy}/word2vec.pth"], "--pretrain_cnn_path sha256:"),
        (["--pretrain_cnn_path=absent.pth"], "absent.pth"),
        (["--feature_cache={toy}/dict.npy"], "dict.npy: is damaged"),
        (["--feature_cache=absent/features.npz"], "absent/features.npz cannot be written"),
        (["--feature_cache={toy}"], "--feature_cache"),
    ],
)
def test_a_feature_cache_that_does_not_fit_ends_with_one_line(
    kept, toy, flags, named, monkeypatch, capsys
):
    flags = [*kept[1], *(flag.format(toy=toy) for flag in flags)]
    with pytest.raises(SystemExit) as stopped:
        run_main("eval_hmdb.py", flags, monkeypatch)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error


BAD_INPUTS = {
    "missing weights": (["--pretrain_cnn_path=absent.pth"], "absent.pth"),
    "weights not given": (["--pretrain_cnn_path="], "--pretrain_cnn_path"),
    "file that has no weights": (["--pretrain_cnn_path={toy}/dict.npy"], "dict.npy"),
    "weights of another model": (["--pretrain_cnn_path={toy}/word2vec.pth"], "word2vec.pth"),
    "missing table": (["--eval_csv=absent.csv"], "absent.csv"),
    "table without a column": (["--eval_csv={toy}/howto100m_videos.csv"], "howto100m_videos.csv"),
    "missing videos": (["--eval_video_root=absent"], "absent"),
    "none of the videos found": (["--eval_video_root={toy}/captions"], "--eval_video_root"),
    "unwritable output": (["--metrics_json=absent/out.json"], "--metrics_json"),
    "report that is a file": (["--html_report={toy}/dict.npy"], "--html_report"),
    "report below a file": (["--html_report={toy}/dict.npy/page"], "--html_report"),
    "unknown backend": (["--decoder=gstreamer"], "--decoder"),
}
BAD_TEXT_INPUTS = {
    "missing vocabulary": (["--token_to_word_path=absent.npy"], "absent.npy"),
    "vocabulary that does not fit": (["--token_to_word_path={short}"], "--token_to_word_path"),
}


@pytest.mark.parametrize("script", TABLES)
def test_bad_input_ends_with_one_line_and_status_2(
    script, toy, weights, tmp_path, monkeypatch, capsys
):
    np.save(tmp_path / "short.npy", np.array(["cut"]))
    faults = BAD_INPUTS if script in RECOGNITION else {**BAD_INPUTS, **BAD_TEXT_INPUTS}
    for fault, (flags, named) in faults.items():
        flags = [flag.format(toy=toy, short=tmp_path / "short.npy") for flag in flags]
        with pytest.raises(SystemExit) as stopped:
            run_main(script, [*small(weights, toy), *toy_set(script, toy), *flags], monkeypatch)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1, (fault, error)
        assert named in error, fault


@pytest.mark.parametrize("script", TABLES)
def test_an_ffmpeg_program_that_does_not_run_ends_with_one_line_and_status_2(
    script, toy, weights, ffmpeg_in_path, monkeypatch, capsys
):
    ffmpeg_in_path("echo 'no libx264' >&2; exit 127", version=False)
    flags = [*small(weights, toy), *toy_set(script, toy), "--decoder=ffmpeg"]
    with pytest.raises(SystemExit) as stopped:
        run_main(script, flags, monkeypatch)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert "--decoder ffmpeg: " in error and "status 127: no libx264; repair" in error


COMMANDS = {
    "eval_youcook": "--eval_video_root={toy}/youcook --eval_csv={toy}/validation_youcook.csv",
    "eval_msrvtt": "--eval_video_root={toy}/msrvtt --eval_csv={toy}/msrvtt_test.csv",
    "eval_crosstask": "--eval_video_root={toy}/crosstask --eval_csv={toy}/crosstask_release",
    "eval_htm_align": "--eval_video_root={toy}/htm_align --eval_csv={toy}/htm_align.json",
    "extract_features": "--layer=embedding --video_path={toy}/hmdb --feature_root={out}",
    "search": "index {toy}/hmdb --out={out}/index",
}


@pytest.fixture
def video_network(tmp_path):
    """Weights with the names and shapes of torchvision's S3D."""
    state = {name: torch.ones(shape) for name, shape in golden_json("torchvision_s3d")}
    torch.save(state, tmp_path / "s3d.pth")
    return tmp_path / "s3d.pth"


def test_a_video_network_alone_has_no_joint_space(toy, video_network, monkeypatch, capsys):
    for script, command in COMMANDS.items():
        flag = "weights" if script == "search" else "pretrain_cnn_path"
        flags = command.format(toy=toy, out=video_network.parent).split()
        flags += [f"--{flag}={video_network}", "--num_frames=4", "--video_size=32"]
        if script != "extract_features":
            flags.append(f"--token_to_word_path={toy}/dict.npy")
        with pytest.raises(SystemExit):
            run_main(f"{script}.py", flags, monkeypatch)
        assert f"--{flag}: {video_network}: holds a video network only" in capsys.readouterr().err


def test_a_video_network_alone_has_features(video_network):
    args = get_args(argv=[f"--pretrain_cnn_path={video_network}"])
    assert not inference_model(args, torch.device("cpu"), joint_space=False).joint_space
