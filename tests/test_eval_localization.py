"""eval_crosstask.py and eval_htm_align.py, run as a user runs them, on the toy set's files."""

import json
import shutil

import numpy as np
import pytest

from tests.helpers import DETAILS, run_python, without_command
from tests.test_eval_scripts import BAD_INPUTS, BAD_TEXT_INPUTS, page_data, run_main

SETS = {
    "eval_crosstask.py": ("crosstask", "crosstask_release"),
    "eval_htm_align.py": ("htm_align", "htm_align.json"),
}
KEYS = {
    "eval_crosstask.py": [
        *("recall", "recall_per_video", "recall_unordered"),
        *("num_videos", "num_missing", "num_hits", "num_steps", "tasks"),
    ],
    "eval_htm_align.py": [
        *("R1", "AUC", "R1_64", "AUC_64"),
        *("num_videos", "num_missing", "num_sentences", "num_alignable"),
    ],
}


def small(weights, toy):
    return [
        f"--pretrain_cnn_path={weights}",
        f"--token_to_word_path={toy}/dict.npy",
        *("--num_frames=4", "--video_size=32", "--num_thread_reader=2"),
    ]


def toy_set(script, toy):
    folder, annotations = SETS[script]
    return [f"--eval_video_root={toy}/{folder}", f"--eval_csv={toy}/{annotations}"]


@pytest.fixture(scope="module", params=SETS)
def kept(request, toy, weights, tmp_path_factory):
    """Run with --feature_cache and --html_report on a set with one absent and one broken video.

    Returns the script, the folder, the flags and the output. The videos are removed after the run.
    """
    script = request.param
    folder = tmp_path_factory.mktemp("kept")
    for name in SETS[script]:
        copy = shutil.copytree if (toy / name).is_dir() else shutil.copy
        copy(toy / name, folder / name)
    videos = sorted((folder / SETS[script][0]).rglob("*.mp4"))
    if script == "eval_crosstask.py":
        videos = [path for path in videos if path.stem in ("toytask401_1", "toytask401_2")]
        videos[1].write_bytes(b"not a video")
    else:
        sentences = json.loads((folder / "htm_align.json").read_text())
        sentences = {**sentences, "broken": [[1, 0, 1, "make the red ball spin"]]}
        (folder / "htm_align.json").write_text(json.dumps(sentences))
        (folder / "htm_align" / "broken.mp4").write_bytes(b"not a video")
        videos = [folder / "htm_align" / f"{next(iter(sentences))}.mp4"]
    videos[0].unlink()
    flags = [*small(weights, toy), *toy_set(script, folder)]
    flags.append(f"--feature_cache={folder}/features.npz")
    outputs = [f"--metrics_json={folder}/out.json", f"--html_report={folder}/page"]
    run = run_python(script, *flags, *outputs)
    shutil.rmtree(folder / SETS[script][0])
    return script, folder, flags, run.stdout


def test_metrics_are_written_and_missing_videos_are_counted_and_named(kept):
    script, folder, _, output = kept
    metrics = json.loads((folder / "out.json").read_text())
    assert list(metrics) == [*KEYS[script], *DETAILS]
    assert metrics["num_missing"] == 2
    assert "skipped videos: 1 absent (" in output
    assert "skipped videos: 1 undecodable (" in output
    assert output.splitlines()[-1] == f"report: {folder}/page/index.html"
    if script == "eval_crosstask.py":
        assert metrics["num_videos"] == 2
        task = metrics["tasks"]["401"]
        assert task["title"].startswith("Play with the ") and task["num_videos"] == 1
        assert metrics["tasks"]["404"]["recall"] is None  # conftest.toy drops its videos
        recalls = [task["recall"] for task in metrics["tasks"].values() if task["num_steps"]]
        assert metrics["recall"] == pytest.approx(np.mean(recalls))
    else:
        assert metrics["num_videos"] == 1
        assert 0 <= metrics["R1_64"] <= 1 and 0 <= metrics["AUC"] <= 1
        assert 0 < metrics["num_alignable"] < metrics["num_sentences"]


def test_the_page_agrees_with_the_metrics(kept):
    script, folder, _, _ = kept
    metrics = json.loads((folder / "out.json").read_text())
    data = page_data(folder / "page")
    videos = data["timelines"]
    assert len(videos) == metrics["num_videos"]
    assert sorted(reason for _, reason in data["missing"]) == ["absent", "undecodable"]
    hits, total = (sum(video[key] for video in videos) for key in ("hits", "total"))
    if script == "eval_crosstask.py":
        assert total == metrics["num_steps"]
        tasks = [task for task in metrics["tasks"].values() if task["num_steps"]]
        assert hits == round(sum(task["recall"] * task["num_steps"] for task in tasks))
        assert len(data["tasks"]) == len(tasks)
    else:
        assert total == metrics["num_alignable"]
        assert hits / total == pytest.approx(metrics["R1"])
    page = (folder / "page" / "index.html").read_text()
    command = json.dumps(metrics["command"])[1:-1].replace("<", "\\u003c")
    assert page.count(command) == 1
    assert str(folder) not in page.replace(command, "")  # the only paths are the command's


def test_a_second_run_needs_no_videos(kept, tmp_path, monkeypatch):
    script, folder, flags, _ = kept
    more = ["--eval_video_root=", f"--metrics_json={tmp_path}/out.json"]
    run_main(script, [*flags, *more], monkeypatch)
    again, first = (json.loads((at / "out.json").read_text()) for at in (tmp_path, folder))
    assert without_command(again) == without_command(first)


def refusal(script, flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main(script, flags, monkeypatch)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_frames=8"], "--num_frames 4, not 8"),
        (["--feature_cache=absent/features.npz"], "absent/features.npz cannot be written"),
    ],
)
def test_a_feature_cache_that_does_not_fit_ends_with_one_line(
    kept, toy, flags, named, monkeypatch, capsys
):
    flags = [*kept[2], *(flag.format(toy=toy) for flag in flags)]
    assert named in refusal(kept[0], flags, monkeypatch, capsys)


@pytest.mark.parametrize("script", SETS)
def test_bad_input_ends_with_one_line_and_status_2(
    script, toy, weights, tmp_path, monkeypatch, capsys
):
    np.save(tmp_path / "short.npy", np.array(["cut"]))
    faults = {**BAD_INPUTS, **BAD_TEXT_INPUTS}
    faults["another set's table"] = (["--eval_csv={toy}/hmdb51.csv"], "hmdb51.csv")
    for fault, (flags, named) in faults.items():
        flags = [flag.format(toy=toy, short=tmp_path / "short.npy") for flag in flags]
        flags = [*small(weights, toy), *toy_set(script, toy), *flags]
        assert named in refusal(script, flags, monkeypatch, capsys), fault


@pytest.mark.parametrize("script", SETS)
def test_a_set_without_decodable_videos_ends_with_one_line(
    script, toy, weights, tmp_path, monkeypatch, capsys
):
    for path in (toy / SETS[script][0]).rglob("*.mp4"):
        (tmp_path / path.name).write_bytes(b"not a video")
    flags = [*small(weights, toy), *toy_set(script, toy), f"--eval_video_root={tmp_path}"]
    message = "--eval_video_root: none of the videos can be decoded"
    assert message in refusal(script, flags, monkeypatch, capsys)
