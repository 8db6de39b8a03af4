"""evaluate_all.py: which evaluations run, which are skipped, and how failures are reported."""

import contextlib
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

import evaluate_all
from args import ANNOTATIONS, file_checksum
from evaluation.feature_file import checksum
from evaluation.published import PUBLISHED
from tests.helpers import ROOT
from utils import InputError, run_script

READERS, check_model, run_evaluation = (
    evaluate_all.READERS,
    evaluate_all.check_model,
    evaluate_all.run_evaluation,
)

FAKE = {
    "youcook": {"R1": 0.25, "R5": 0.5, "R10": 0.75, "MR": 4.0, "num_videos": 8, "num_missing": 1},
    "hmdb": {"mean": 0.5, "num_videos": 6, "num_missing": 0, "intervals": {"mean": [0.25, 0.75]}},
    "crosstask": {"recall": 0.4, "num_videos": 3, "num_missing": 0},
    "htm_align": {"R1": 0.3, "AUC": None, "R1_64": 0.4, "AUC_64": 0.6, "num_videos": 2}
    | {"num_missing": 0},
}


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Return a function that runs evaluate_all.py in this process, with fake evaluations.

    The function returns the names of the evaluations that ran. Its `outcomes` sets how one ends:
    with the reason for its failure, or an exception that ends the whole run, as a signal does.
    """
    (tmp_path / "videos").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"weights")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dict.npy").write_bytes(b"words")
    for name, path in ANNOTATIONS.items():
        file = tmp_path / path / "videos.csv" if name == "crosstask" else tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    monkeypatch.chdir(tmp_path)
    outcomes, started = {}, []

    def run_evaluation(plan):
        started.append(plan.evaluation.name)
        outcome = outcomes.get(plan.evaluation.name, "")
        if isinstance(outcome, BaseException):
            raise outcome
        if not outcome:
            plan.settings.write_text(json.dumps(plan.stamp))
            plan.metrics.write_text(json.dumps(FAKE[plan.evaluation.name]))
            (plan.folder / "index.html").write_text("page")
        return outcome

    def run(*flags, names=("youcook", "hmdb", "crosstask")):
        started.clear()
        roots = [f"--{name}_root={tmp_path}/videos" for name in names]
        base = [f"--pretrain_cnn_path={tmp_path}/weights.pth", f"--out={tmp_path}/out"]
        monkeypatch.setattr(sys, "argv", ["evaluate_all.py", *base, *roots, *map(str, flags)])
        run_script(evaluate_all.main)
        return list(started)

    monkeypatch.setattr(evaluate_all, "run_evaluation", run_evaluation)
    monkeypatch.setattr(
        evaluate_all, "READERS", dict.fromkeys(ANNOTATIONS, lambda path, **options: None)
    )

    def check_model(args, chosen):
        return file_checksum(args.pretrain_cnn_path, "pretrain_cnn_path")

    monkeypatch.setattr(evaluate_all, "check_model", check_model)
    run.outcomes = outcomes
    run.folder = tmp_path
    return run


def results_of(folder):
    return json.loads((folder / "out/results.json").read_text())["evaluations"]


def page_data(folder):
    page = (folder / "index.html").read_text()
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_json_page_and_terminal_show_published_figures_ours_and_missing_videos(user, capsys):
    assert user() == ["youcook", "hmdb", "crosstask"]
    found = results_of(user.folder)
    assert {name: found[name]["results"] for name in ("youcook", "hmdb")} == {
        name: FAKE[name] for name in ("youcook", "hmdb")
    }
    assert found["ucf"]["status"] == "no videos given" and found["ucf"]["results"] is None
    assert {"source": "S3D MIL-NCE [1]", "figures": {"mean": 82.7}} in found["ucf"]["published"]
    rows = {row["title"]: row for row in page_data(user.folder / "out")["summary"]}
    assert list(rows) == [evaluation.title for evaluation in evaluate_all.EVALUATIONS]
    assert rows["YouCook2"]["link"] == "youcook/index.html" and not rows["UCF-101"]["link"]
    assert rows["YouCook2"]["missing"] == "1 of 9"
    caption, published, ours, details = rows["HMDB-51"]["metrics"][0]
    assert (caption, ours, details) == ("top-1", "50.0%", "95% interval 25.0% to 75.0%")
    assert ["53.1", "paper [1], 2645 epochs, batch 8192"] in published
    output = capsys.readouterr().out
    list_note, flags_note = "not the published list of videos", "reads the alignable flags"
    line = "CrossTask  recall         40.0%        0 of 3  40.5: S3D MIL-NCE [1]"
    assert f"{line} (ours: {list_note})" in output
    assert rows["CrossTask"]["metrics"][0][3] == list_note
    assert output.count(f"(ours: {flags_note})") == 2  # R@1 and AUC of the 64 s variant
    assert [row[3] for row in rows["HTM-Align"]["metrics"]] == ["", "", flags_note, flags_note]


def test_evaluations_done_with_the_same_weights_and_flags_are_skipped(user):
    names = ("youcook", "hmdb")
    assert user(names=names) == ["youcook", "hmdb"]
    assert user(names=names) == user("--num_thread_reader=3", names=names) == []
    assert user("--fps=10", names=names) == ["youcook"]  # eval_hmdb.py does not use --fps
    table = f"--hmdb_csv={user.folder}/weights.pth"
    assert user("--fps=10", table, names=names) == ["hmdb"]
    (user.folder / "weights.pth").write_bytes(b"others")
    assert user("--fps=10", table, names=names) == ["youcook", "hmdb"]
    (user.folder / "out/youcook/index.html").unlink()  # as if killed before writing the page
    assert user("--fps=10", table, names=names) == ["youcook"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("data/validation_youcook.csv", ["youcook"]),
        ("data/crosstask_release/videos.csv", ["crosstask"]),
        ("data/dict.npy", ["youcook", "crosstask"]),
    ],
)
def test_evaluations_done_with_other_annotations_or_words_are_run_again(user, changed, again):
    user()
    (user.folder / changed).write_text("changed")
    assert user() == again


@pytest.mark.parametrize("content", ["[]", "{}", '{"num_videos": 3}'])
def test_evaluations_with_incomplete_results_are_run_again(user, content):
    user(names=["hmdb"])
    (user.folder / "out/hmdb/metrics.json").write_text(content)
    assert user(names=["hmdb"]) == ["hmdb"]


def test_a_folder_in_place_of_a_file_ends_with_one_line(user, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_all, "run_evaluation", run_evaluation)
    (user.folder / "out/hmdb/metrics.json").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        user(names=["hmdb"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: --out: ") and "metrics.json" in error


def test_annotations_and_weights_are_read_before_any_evaluation(user, monkeypatch, capsys):
    def refusal():
        with pytest.raises(SystemExit) as stopped:
            user("--hmdb_root=videos", names=["youcook"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        return error

    user.outcomes["youcook"] = AssertionError("must not be run")
    monkeypatch.setattr(evaluate_all, "check_model", check_model)
    assert "--pretrain_cnn_path: " in refusal() and "weights.pth" in refusal()
    monkeypatch.setattr(evaluate_all, "READERS", {**READERS, "youcook": lambda path: None})
    assert "--hmdb_csv: data/hmdb51.csv: " in refusal()
    (user.folder / "data/hmdb51.csv").unlink()
    assert "--hmdb_csv: data/hmdb51.csv: No such file" in refusal()


def test_a_long_error_does_not_block_the_script(monkeypatch, capsys):
    """The pipe is read only after the script has ended."""

    def fail():
        raise InputError("x" * 1_000_000)

    monkeypatch.setattr(evaluate_all, "die_with_parent", lambda: None)
    monkeypatch.setitem(sys.modules, "eval_long", types.SimpleNamespace(main=fail))
    monkeypatch.setattr(sys, "argv", [])
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run():
        with contextlib.suppress(SystemExit):
            evaluate_all.run_main("eval_long", [], sender)

    script = threading.Thread(target=run, daemon=True)
    script.start()
    script.join(30)
    assert not script.is_alive()
    assert receiver.recv().startswith("xxx")


def test_a_run_that_was_interrupted_resumes_with_the_remaining_evaluations(user, capsys):
    user.outcomes["hmdb"] = KeyboardInterrupt()
    with pytest.raises(SystemExit) as stopped:
        user()
    assert stopped.value.code == 130
    found = results_of(user.folder)
    assert found["youcook"]["status"] == "done" and found["hmdb"]["status"] == "not run yet"
    user.outcomes.clear()
    assert user() == ["hmdb", "crosstask"]
    assert {name for name, row in results_of(user.folder).items() if row["status"] == "done"} == {
        "youcook",
        "hmdb",
        "crosstask",
    }


def test_an_evaluation_that_fails_does_not_stop_the_others(user, capsys):
    user.outcomes["hmdb"] = "--eval_csv: it is empty"
    with pytest.raises(SystemExit) as ended:
        user()
    assert ended.value.code == 1
    found = results_of(user.folder)
    assert found["hmdb"]["status"] == "failed: --eval_csv: it is empty"
    assert found["crosstask"]["status"] == "done"
    assert "failed: --eval_csv: it is empty" in capsys.readouterr().out
    user.outcomes.clear()
    assert user() == ["hmdb"]


def test_flags_reach_the_scripts_that_use_them():
    evaluations = {e.name: e for e in evaluate_all.EVALUATIONS}
    line = "--hmdb_root=a --youcook_root=b --youcook-csv=t --num-frames=32 --fps=10 --compile"
    titles = dict.fromkeys(evaluations, "")
    parsed = evaluate_all.get_all_args("", titles, [*line.split(), "--out=o"])
    youcook = evaluate_all.make_plan(parsed, evaluations["youcook"], {})
    assert youcook.flags == [
        *("--num_frames=32", "--fps=10", "--compile", "--eval_video_root=b", "--eval_csv=t"),
        *("--metrics_json=o/youcook/metrics.json", "--html_report=o/youcook"),
    ]
    hmdb = evaluate_all.make_plan(parsed, evaluations["hmdb"], {})
    assert hmdb.flags == [
        *("--num_frames=32", "--compile", "--eval_video_root=a"),
        *("--metrics_json=o/hmdb/metrics.json", "--html_report=o/hmdb"),
        "--feature_cache=o/hmdb/features.npz",
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--youcook_root="], "--youcook_root"),
        (["--youcook_root=absent"], "--youcook_root: there is no folder absent"),
        (["--ucf_csv=table.csv"], "--ucf_csv needs the videos; give --ucf_root"),
        (["--youcook_csv=absent.csv"], "--youcook_csv: absent.csv: No such file"),
        (["--pretrain_cnn_path="], "--pretrain_cnn_path is needed"),
        (["--pretrain_cnn_path=absent.pth"], "absent.pth"),
        (["--out={file}"], "--out"),
        (["--out={file}/out"], "--out"),
        (["--num_frames=0"], "--num_frames"),
        (["--eval_csv=table.csv"], "--eval_csv"),
    ],
)
def test_a_bad_flag_ends_with_one_line_before_any_evaluation(user, flags, named, capsys):
    flags = [flag.format(file=user.folder / "weights.pth") for flag in flags]
    user.outcomes["youcook"] = AssertionError("must not be run")
    with pytest.raises(SystemExit) as stopped:
        user(*flags, names=["youcook"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error


def test_published_figures_are_of_metrics_that_are_shown():
    for evaluation in evaluate_all.EVALUATIONS:
        for source in PUBLISHED[evaluation.name]:
            assert source.figures.keys() <= evaluation.metrics.keys()


def toy_command(toy, weights, out, *flags):
    return [
        *(sys.executable, str(ROOT / "evaluate_all.py")),
        *(f"--pretrain_cnn_path={weights}", f"--token_to_word_path={toy}/dict.npy"),
        *("--num_frames=4", "--video_size=32", "--num_windows_test=2", "--num_thread_reader=2"),
        *(f"--ucf_root={toy}/ucf", f"--ucf_csv={toy}/ucfTrainTestlist", f"--out={out}", *flags),
    ]


def test_a_scripts_failure_is_named_and_the_other_set_is_evaluated(toy, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = [f"--hmdb_root={tmp_path}/empty", f"--hmdb_csv={toy}/hmdb51.csv"]
    command = toy_command(toy, weights, tmp_path, *flags)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert found["hmdb"]["status"].startswith("failed: --eval_video_root: ")
    assert found["ucf"]["status"] == "done"
    results = found["ucf"]["results"]
    assert results == json.loads((tmp_path / "ucf/metrics.json").read_text())
    assert (results["num_videos"], results["num_missing"]) == (36, 0)
    assert "eval_ucf.py" in results["command"]
    assert page_data(tmp_path / "ucf")["title"] == "UCF-101"


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_can_be_resumed(toy, weights, tmp_path):
    flags = [f"--youcook_root={toy}/youcook", f"--youcook_csv={toy}/validation_youcook.csv"]
    flags += [f"--hmdb_root={toy}/hmdb", f"--hmdb_csv={toy}/hmdb51.csv"]
    command = toy_command(toy, weights, tmp_path, *flags)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("python eval_hmdb.py"):
            break
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() is not None  # ends when no process holds the pipe open
    process.wait()
    first = (tmp_path / "youcook/metrics.json").stat().st_mtime_ns
    assert not (tmp_path / "hmdb/index.html").exists()
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert f"skipped: YouCook2 is done, see {tmp_path}/youcook" in ended.stdout
    assert (tmp_path / "youcook/metrics.json").stat().st_mtime_ns == first
    found = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert [found[name]["status"] for name in ("youcook", "hmdb", "ucf")] == ["done"] * 3


@pytest.mark.slow
def test_new_weights_are_evaluated_without_the_cached_features_of_the_old_ones(
    toy, weights, tmp_path
):
    old, new = toy_command(toy, weights, tmp_path), toy_command(toy, tmp_path / "new.pth", tmp_path)
    subprocess.run(old, check=True, capture_output=True)
    state = torch.load(weights, weights_only=True)
    torch.save({name: value * 1 for name, value in reversed(state.items())}, tmp_path / "new.pth")
    subprocess.run(new, check=True, capture_output=True)
    results = json.loads((tmp_path / "ucf/metrics.json").read_text())
    assert results["weights_checksum"] == checksum(tmp_path / "new.pth") != checksum(weights)
