import contextlib
import csv
import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed.process
import main_distributed
from args import get_args
from s3dg import S3D, load_model, load_words, read_weights
from tests.helpers import (
    FAILURES,
    await_gone,
    golden_json,
    run_python,
    scalars,
    toy_flags,
    write_csv,
)
from training.optimizer import lr_multiplier
from utils import run_script
from video_loader import QUARANTINE, StepSampler, training_batches

ROOT = Path(main_distributed.__file__).parent


def run_flags(folder, name="run"):
    return [
        f"--checkpoint_root={folder}/checkpoint",
        f"--checkpoint_dir={name}",
        f"--log_root={folder}/log",
    ]


def records(folder, name="run"):
    return [json.loads(line) for line in (folder / "log" / f"{name}.jsonl").open()]


def test_the_releases_command_trains_on_a_tree_of_the_real_layout(toy, tmp_path):
    """The release's command with smaller sizes appended; it finds its tables in data/."""
    (tmp_path / "data").mkdir()
    for name in ("howto100m_videos.csv", "word2vec.pth", "dict.npy"):
        shutil.copy(toy / name, tmp_path / "data")
    command = (
        "--n_display=1 --multiprocessing-distributed --batch_size=256 --num_thread_reader=40 "
        "--cudnn_benchmark=1 --pin_memory --checkpoint_dir=milnce --num_candidates=4 --resume "
        f"--lr=0.001 --warmup_steps=10000 --epochs=300 --caption_root={toy}/captions "
        f"--video_path={toy}/videos "
    )
    smaller = "--batch_size=4 --num_thread_reader=2 --num_frames=4 --video_size=32 --epochs=1"
    run_python("main_distributed.py", *(command + smaller).split(), cwd=tmp_path)
    saved = read_weights(tmp_path / "checkpoint/milnce/epoch0001.pth.tar")
    assert {"epoch", "state_dict", "optimizer", "scheduler"} < saved.keys() and saved["epoch"] == 1
    assert "step 2" in (tmp_path / "log/milnce.txt").read_text()
    assert [r["step"] for r in records(tmp_path, "milnce")] == [1, 2]
    assert records(tmp_path, "milnce")[0].keys() == {
        "epoch", "step", "loss", "lr", "batch_size", "clips_per_second", "data_wait",
        "seconds_left", "bad_samples", "skipped_steps",
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_epochs(toy, weights, tmp_path_factory):
    """A run of two epochs in two processes that scores retrieval on the way."""
    folder = tmp_path_factory.mktemp("two_epochs")
    flags = [
        *toy_flags(toy),
        *run_flags(folder),
        "--nproc_per_node=2",
        "--epochs=2",
        f"--pretrain_cnn_path={weights}",
        "--evaluate",
        f"--eval_video_root={toy}/youcook",
        f"--eval_csv={toy}/validation_youcook.csv",
        "--num_windows_test=1",
        "--tensorboard",
    ]
    run_python("main_distributed.py", *flags)
    return folder, flags


def test_two_processes_train_write_logs_and_validate_every_video_once(two_epochs):
    folder, _ = two_epochs
    steps = [r for r in records(folder) if "loss" in r]
    assert [(r["epoch"], r["step"]) for r in steps] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert [r["lr"] for r in steps] == pytest.approx([0, 0.0005, 0.001, 0.0005])
    assert [r["batch_size"] for r in steps] == [4] * 4  # of both processes
    assert all(0 <= r["data_wait"] <= 1 and r["clips_per_second"] > 0 for r in steps)
    validations = [r for r in records(folder) if "R10" in r]
    assert [(r["epoch"], r["num_videos"], r["num_missing"]) for r in validations] == [
        (1, 25, 0),
        (2, 25, 0),
    ]


def test_event_files_match_the_log(two_epochs):
    folder, _ = two_epochs
    steps = [r for r in records(folder) if "loss" in r]
    validations = [r for r in records(folder) if "R10" in r]
    assert [r["step"] for r in validations] == [2, 4]
    shown = scalars(folder / "log/run.tensorboard")
    for name in ("loss", "lr", "clips_per_second", "data_wait"):
        assert shown[f"training/{name}"] == {r["step"]: pytest.approx(r[name]) for r in steps}
    for name in ("R1", "R5", "R10", "MR"):
        expected = {r["step"]: pytest.approx(r[name]) for r in validations}
        assert shown[f"validation/{name}"] == expected


def test_validation_in_two_processes_equals_an_evaluation_in_one(two_epochs, toy, tmp_path):
    folder, flags = two_epochs
    run_python(
        "eval_youcook.py",
        *without(flags, "--nproc", "--evaluate", "--pretrain"),
        f"--pretrain_cnn_path={folder}/checkpoint/run/epoch0002.pth.tar",
        f"--metrics_json={tmp_path}/out.json",
    )
    evaluated = json.loads((tmp_path / "out.json").read_text())
    validated = records(folder)[-1]
    names = ("R1", "R5", "R10", "MR", "num_videos", "num_missing")
    assert [evaluated[name] for name in names] == [validated[name] for name in names]


def test_resuming_skips_a_damaged_file_and_ends_with_the_weights_of_the_uninterrupted_run(
    two_epochs, toy, tmp_path
):
    folder, flags = two_epochs
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/run/epoch0002.pth.tar"
    damaged = path.read_bytes()[:-1000]
    path.write_bytes(damaged)
    flags = without(flags, "--eval", "--checkpoint_root", "--log_root")
    run_python("main_distributed.py", *flags, *run_flags(tmp_path), "--resume")
    assert [r["step"] for r in records(tmp_path)] == [3, 4]
    assert path.with_name("epoch0002.pth.tar.damaged").read_bytes() == damaged
    text = (tmp_path / "log/run.txt").read_text()
    assert text.count("skipped a damaged checkpoint") == 1
    assert "(BadZipFile: File is not a zip file), renamed to epoch0002.pth.tar.damaged" in text
    resumed = read_weights(tmp_path / "checkpoint/run/epoch0002.pth.tar")
    expected = read_weights(folder / "checkpoint/run/epoch0002.pth.tar")
    for name, value in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


@pytest.mark.slow
def test_micro_batches_in_float16_resume_to_the_bit(toy, weights, tmp_path):
    """Two processes with two micro-batches each, recomputed activations and loss scaling."""
    flags = [*toy_flags(toy), f"--pretrain_cnn_path={weights}", "--nproc_per_node=2"]
    flags += ["--accum_steps=2", "--amp=fp16", "--grad_checkpoint", "--epochs=3"]
    run_python("main_distributed.py", *flags, *run_flags(tmp_path, "whole"))
    assert [r["step"] for r in records(tmp_path, "whole")] == [1, 2, 3]  # of 8 videos each
    whole = tmp_path / "checkpoint/whole"
    (tmp_path / "checkpoint/broken").mkdir()
    shutil.copy(whole / "epoch0001.pth.tar", tmp_path / "checkpoint/broken")
    run_python("main_distributed.py", *flags, *run_flags(tmp_path, "broken"), "--resume")
    assert [r["step"] for r in records(tmp_path, "broken")] == [2, 3]
    expected = read_weights(whole / "epoch0003.pth.tar")
    resumed = read_weights(tmp_path / "checkpoint/broken/epoch0003.pth.tar")
    assert resumed["scaler"] == expected["scaler"] and expected["progress"]["clips"] == 24
    for name, value in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


@pytest.mark.slow
def test_torchrun_starts_the_same_training(two_epochs, toy, weights, tmp_path):
    folder, _ = two_epochs
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("main_distributed.py", *toy_flags(toy), *run_flags(tmp_path), "--epochs=2"),
            f"--pretrain_cnn_path={weights}",
        ],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    expected = [r["loss"] for r in records(folder) if "loss" in r]
    assert [r["loss"] for r in records(tmp_path)] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def released_run(toy, tmp_path_factory):
    """A training of one epoch that starts from a file like the released one."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    model = S3D(space_to_depth=True, word2vec_path=toy / "word2vec.pth")
    torch.save(model.state_dict(), folder / "released.pth")
    flags = [*toy_flags(toy), *run_flags(folder), "--epochs=1"]
    run_python("main_distributed.py", *flags, f"--pretrain_cnn_path={folder}/released.pth")
    return folder


def test_released_style_weights_start_a_training_with_their_stem(released_run):
    assert load_model(released_run / "checkpoint/run/epoch0001.pth.tar").space_to_depth


def test_torchvisions_weights_start_a_training_with_the_given_word_vectors(toy, tmp_path):
    state = {name: torch.ones(shape) for name, shape in golden_json("torchvision_s3d")}
    torch.save(state, tmp_path / "s3d.pth")
    flags = [*toy_flags(toy), f"--pretrain_cnn_path={tmp_path}/s3d.pth", "--num_class=16"]
    args = get_args(argv=flags)
    model, again = (main_distributed.build_model(args, load_words(toy / "dict.npy")) for _ in "12")
    vectors = torch.load(toy / "word2vec.pth", weights_only=True)
    assert torch.equal(model.text_module.word_embd.weight, vectors)
    assert torch.equal(model.conv_2b.conv1.weight, state["features.2.0.weight"])
    assert model.fc.out_features == 16  # new, and the same on every rank:
    assert torch.equal(model.fc.weight, again.fc.weight)


def test_the_shared_clips_can_be_trained_on(toy, tmp_path, shared_videos):
    names = [p.name for p in shared_videos.iterdir() if p.suffix != ".md"]
    for name in names:
        rows = [("start", "end", "text"), (0, 2, "cut the red star"), (2.5, 4, "the star spins")]
        write_csv((tmp_path / name).with_suffix(".csv"), *rows)
    (tmp_path / "list.csv").write_text("\n".join(["video_path", *names]) + "\n")
    run_python(
        "main_distributed.py",
        *toy_flags(toy),
        *run_flags(tmp_path),
        f"--train_csv={tmp_path}/list.csv",
        f"--video_path={shared_videos}",
        f"--caption_root={tmp_path}",
        "--num_candidates=2",
        "--epochs=2",
    )
    assert len(records(tmp_path)) == 2 * len(names) // 4
    assert all(np.isfinite(r["loss"]) for r in records(tmp_path))


BAD_INPUTS = {
    "missing video list": ["--train_csv=absent.csv"],
    "list without the column": ["--train_csv={toy}/msrvtt_test.csv"],
    "missing video folder": ["--video_path=absent"],
    "video folder not given": ["--video_path="],
    "no video found": ["--video_path={toy}/hmdb"],
    "missing caption folder": ["--caption_root=absent"],
    "no caption found": ["--caption_root={toy}/hmdb"],
    "missing word vectors": ["--word2vec_path=absent.pth"],
    "another file as word vectors": ["--word2vec_path={toy}/dict.npy"],
    "missing vocabulary": ["--token_to_word_path=absent.npy"],
    "another file as the vocabulary": ["--token_to_word_path={toy}/word2vec.pth"],
    "vocabulary that does not fit": ["--word2vec_path="],
    "a batch that processes cannot divide": ["--batch_size=5", "--nproc_per_node=2"],
    "a batch larger than all the epochs": ["--batch_size=20", "--epochs=2"],
    "a first epoch after the last": ["--epochs=2", "--start_epoch=2"],
    "unknown decoder": ["--decoder=gstreamer"],
    "missing start weights": ["--pretrain_cnn_path=absent.pth"],
    "another file as start weights": ["--pretrain_cnn_path={toy}/howto100m_videos.csv"],
    "start weights of another model": ["--pretrain_cnn_path={toy}/word2vec.pth"],
    "a file where the log folder goes": ["--log_root={toy}/dict.npy"],
    "a file where the checkpoint folder goes": ["--checkpoint_root={toy}/dict.npy"],
    "validation without videos": ["--evaluate", "--eval_video_root=absent"],
    "a compiler and recomputed activations": ["--grad_checkpoint", "--compile"],
    "validation without a table": ["--evaluate", "--eval_csv=absent.csv"],
}


@pytest.mark.parametrize("fault", BAD_INPUTS)
def test_bad_input_exits_with_status_2_and_one_line_that_names_the_flag(
    fault, toy, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(toy=toy) for flag in BAD_INPUTS[fault]]
    validation = [f"--eval_video_root={toy}/youcook", f"--eval_csv={toy}/validation_youcook.csv"]
    monkeypatch.setattr("sys.argv", ["main_distributed.py", *toy_flags(toy), *validation, *flags])
    with pytest.raises(SystemExit) as stopped:
        run_script(main_distributed.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    culprit = flags[-1].split("=")[0]
    if fault == "vocabulary that does not fit":
        culprit = "--token_to_word_path"
    elif fault.startswith("a batch"):
        culprit = "--batch_size"
    elif fault.startswith("a first epoch"):
        culprit = "--start_epoch"
    assert culprit in error
    assert not list(Path("log").glob("*"))  # no empty log of a run that never started


def test_a_file_where_the_event_files_go_is_rejected(toy, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.tensorboard").write_text("in the way")
    flags = [f"--log_root={tmp_path}", f"--checkpoint_root={tmp_path}", "--checkpoint_dir=run"]
    monkeypatch.setattr(
        "sys.argv", ["main_distributed.py", *toy_flags(toy), *flags, "--tensorboard"]
    )
    with pytest.raises(SystemExit) as stopped:
        run_script(main_distributed.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--tensorboard" in error


def with_a_different_rank(own):
    """Return what gather returns if the other rank starts from another checkpoint."""
    return [own, {**own, "checkpoint": "another"}]


def test_nothing_is_renamed_before_all_ranks_agree_on_the_start(
    two_epochs, tmp_path, monkeypatch, capsys
):
    """A file that one rank finds damaged, because of its memory or network, may be intact."""
    folder, flags = two_epochs
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint/run/epoch0002.pth.tar"
    path.write_bytes(b"")
    gather = distributed.process.RankContext.gather
    monkeypatch.setattr(
        distributed.process.RankContext,
        "gather",
        lambda context, value: (
            with_a_different_rank(value) if isinstance(value, dict) else gather(context, value)
        ),
    )
    flags = without(flags, "--eval", "--checkpoint_root", "--log_root", "--nproc")
    flags = [*flags, *run_flags(tmp_path), "--resume", "--nproc_per_node=1"]
    monkeypatch.setattr("sys.argv", ["main_distributed.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_script(main_distributed.main)
    assert stopped.value.code == 2 and "rank 1 starts from" in capsys.readouterr().err
    assert path.read_bytes() == b""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_unreadable_newest_checkpoint_ends_the_start_and_no_file_changes(
    processes, two_epochs, tmp_path
):
    """On Linux, a process that reads its own memory at address 0 gets an I/O error."""
    folder, flags = two_epochs
    checkpoints = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint") / "run"
    newest = checkpoints / "epoch0003.pth.tar"
    newest.symlink_to("/proc/self/mem")
    if not newest.exists():
        pytest.skip("no /proc/self/mem here")
    before = {path.name: path.lstat().st_mtime_ns for path in checkpoints.iterdir()}
    flags = without(flags, "--eval", "--checkpoint_root", "--log_root", "--nproc")
    flags += [*run_flags(tmp_path), "--resume", "--epochs=5", f"--nproc_per_node={processes}"]
    command = [sys.executable, ROOT / "main_distributed.py", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert line.startswith(f"error: --resume: {newest}: cannot be read (Input/output error)")
    assert {path.name: path.lstat().st_mtime_ns for path in checkpoints.iterdir()} == before


def without(flags, *names):
    return [flag for flag in flags if not flag.startswith(names)]


def test_resuming_a_finished_run_trains_no_further(two_epochs, tmp_path):
    _, flags = two_epochs
    flags = without(flags, "--eval", "--log_root")
    run_python("main_distributed.py", *flags, f"--log_root={tmp_path}", "--resume")
    assert not (tmp_path / "run.jsonl").exists()
    assert "after epoch 2" in (tmp_path / "run.txt").read_text()


@pytest.mark.slow
def test_more_epochs_and_another_learning_rate_take_effect_when_resuming(two_epochs, tmp_path):
    folder, flags = two_epochs
    shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    flags = [*without(flags, "--eval", "--pretrain"), *run_flags(tmp_path), "--resume"]
    run_python("main_distributed.py", *flags, "--epochs=4", "--lr=0.5")
    expected = [0.5 * lr_multiplier(step, 2, 8) for step in range(4, 8)]
    assert [r["lr"] for r in records(tmp_path)] == pytest.approx(expected)


REJECTED_WITH_OLD_CHECKPOINTS = {
    "--checkpoint_dir": [],
    "--resume": ["--resume", "--optimizer=sgd"],
    "--token_to_word_path": ["--resume", "--token_to_word_path={folder}/short.npy"],
}


@pytest.mark.parametrize("named", REJECTED_WITH_OLD_CHECKPOINTS)
def test_old_checkpoints_are_not_overwritten_or_misused(
    named, two_epochs, tmp_path, monkeypatch, capsys
):
    folder, flags = two_epochs
    np.save(tmp_path / "short.npy", np.array(["cut"]))
    more = [flag.format(folder=tmp_path) for flag in REJECTED_WITH_OLD_CHECKPOINTS[named]]
    monkeypatch.setattr("sys.argv", ["main_distributed.py", *flags, *more])
    with pytest.raises(SystemExit) as stopped:
        run_script(main_distributed.main)
    assert stopped.value.code == 2 and named in capsys.readouterr().err
    assert len(list((folder / "checkpoint/run").iterdir())) == 2


@pytest.mark.slow
def test_a_video_that_any_process_cannot_read_is_listed_once(toy, tmp_path):
    """Two of the eight videos are absent, and one validation video is a text file."""
    videos = shutil.copytree(toy / "videos", tmp_path / "videos")
    names = sorted(path.name for path in videos.iterdir())
    for name in names[:2]:
        (videos / name).unlink()
    validation = shutil.copytree(toy / "youcook", tmp_path / "youcook")
    table = (toy / "validation_youcook.csv").read_text().splitlines()[:5]
    (tmp_path / "table.csv").write_text("\n".join(table))
    task, _, video = table[2].split(",")[2:]  # the second item is the second rank's
    next((validation / "validation" / task).glob(f"{video}.*")).write_text("no video")
    flags = [f"--video_path={videos}", f"--eval_video_root={validation}", "--evaluate"]
    flags += [f"--eval_csv={tmp_path}/table.csv", "--nproc_per_node=2", "--epochs=3"]
    flags += ["--max_bad_fraction=0.3"]
    run_python("main_distributed.py", *toy_flags(toy), *run_flags(tmp_path), *flags)
    text = (tmp_path / "log/run.txt").read_text()
    with open(tmp_path / "log/run.bad.csv", newline="") as file:
        bad = [tuple(row.values()) for row in csv.DictReader(file)]
    reason = f"{videos}/{{}}: No such file or directory"
    assert sorted(bad) == [(name, reason.format(name)) for name in names[:2]]
    assert (
        "bad samples: 6" in text
        and [r for r in records(tmp_path) if "loss" in r][-1]["bad_samples"] == 6
    )
    assert f"{video}." in text
    assert records(tmp_path)[-1]["num_missing"] >= 1


@pytest.mark.slow
def test_a_space_to_depth_run_resumes_with_its_stem(released_run, toy):
    flags = [*toy_flags(toy), *run_flags(released_run), "--epochs=2", "--resume"]
    run_python("main_distributed.py", *flags)
    assert load_model(released_run / "checkpoint/run/epoch0002.pth.tar").space_to_depth


def test_an_odd_clip_size_is_rejected_with_that_stem(released_run, toy, monkeypatch, capsys):
    flags = [*toy_flags(toy), f"--pretrain_cnn_path={released_run}/released.pth", "--num_frames=5"]
    monkeypatch.setattr("sys.argv", ["main_distributed.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        run_script(main_distributed.main)
    assert stopped.value.code == 2 and "5 frames" in capsys.readouterr().err


@pytest.mark.parametrize("failure", FAILURES)
def test_a_sample_is_bad_if_the_ffmpeg_program_fails(toy, ffmpeg_in_path, failure):
    commands, quoted = FAILURES[failure]
    args = get_args(argv=[*toy_flags(toy), "--decoder=ffmpeg"])
    dataset = main_distributed.training_set(args, load_words(args.token_to_word_path))
    assert dataset[0, 0].keys() == {"video", "text"}
    ffmpeg_in_path(commands)
    assert quoted in dataset[0, 0]["error"]


@pytest.mark.slow
def test_a_training_counts_failures_of_the_ffmpeg_program(toy, ffmpeg_in_path, tmp_path):
    flags = [*toy_flags(toy), *run_flags(tmp_path), "--decoder=ffmpeg", "--epochs=1"]
    ffmpeg_in_path(
        'case "$*" in *toy00003*) echo "no libx264" >&2; exit 127;; esac; exec {real} "$@"'
    )
    run_python("main_distributed.py", *flags, "--max_bad_fraction=0.2")
    assert records(tmp_path)[-1]["bad_samples"] == 1
    with open(tmp_path / "log/run.bad.csv", newline="") as file:
        [(name, reason)] = [tuple(row.values())[:2] for row in csv.DictReader(file)]
    assert name == "toy00003.mp4" and reason.endswith("exited with status 127: no libx264")


def test_a_slow_ffmpeg_program_ends_with_its_worker(toy, ffmpeg_in_path, tmp_path):
    """The only limit is that of the worker, which quarantines the video."""
    args = get_args(argv=[*toy_flags(toy), "--decoder=ffmpeg"])
    dataset = main_distributed.training_set(args, load_words(args.token_to_word_path))
    ffmpeg_in_path(
        f'case "$*" in *toy00003*) echo $$ >> {tmp_path}/pids; exec sleep 600;; esac; '
        'exec {real} "$@"'
    )
    sampler, quarantined = StepSampler(len(dataset), 4, 4), set()
    batches = training_batches(dataset, sampler, workers=2, timeout=2, quarantined=quarantined)
    with contextlib.closing(batches):
        bad = [fault for batch in batches for faults in batch["bad"] for fault in faults]
        assert quarantined == {"toy00003.mp4"}
        assert dict(bad)["toy00003.mp4"].startswith(QUARANTINE)
        assert "took its data worker more than 2 s" in bad[0][1]
        for line in (tmp_path / "pids").read_text().splitlines():
            await_gone(int(line))


@pytest.mark.slow
def test_sample_timeout_limits_a_slow_ffmpeg_program(toy, ffmpeg_in_path, tmp_path):
    flags = [*toy_flags(toy), *run_flags(tmp_path), "--decoder=ffmpeg", "--epochs=1"]
    ffmpeg_in_path('case "$*" in *toy00003*) exec sleep 600;; esac; exec {real} "$@"')
    run_python("main_distributed.py", *flags, "--sample_timeout=3", "--max_bad_fraction=0.2")
    with open(tmp_path / "log/run.bad.csv", newline="") as file:
        [(name, reason)] = [tuple(row.values())[:2] for row in csv.DictReader(file)]
    assert name == "toy00003.mp4"
    assert reason == "quarantined: it took its data worker more than 3 s"


@pytest.mark.slow
def test_a_training_ends_if_the_ffmpeg_program_always_fails(toy, ffmpeg_in_path, tmp_path):
    flags = [*toy_flags(toy), *run_flags(tmp_path), "--decoder=ffmpeg", "--epochs=1"]
    for version, named in (
        (True, "samples in a row cannot be read: "),
        (False, "--decoder ffmpeg"),
    ):
        ffmpeg_in_path("echo 'no libx264' >&2; exit 127", version=version)
        with pytest.raises(subprocess.CalledProcessError) as stopped:
            run_python("main_distributed.py", *flags)
        assert stopped.value.returncode == 2
        last = stopped.value.stderr.splitlines()[-1]
        assert named in last and "status 127: no libx264" in last


def test_only_the_micro_batches_of_one_step_are_in_memory(toy, weights, tmp_path, monkeypatch):
    """They take 20 GB at 8192 clips of 16 x 224 x 224."""
    alive, counts = weakref.WeakSet(), []

    def tracked_batches(*args, **options):
        for batch in training_batches(*args, **options):
            alive.add(batch["video"])
            counts.append(len(alive))
            yield batch
            del batch

    monkeypatch.setattr(main_distributed, "training_batches", tracked_batches)
    monkeypatch.setattr(
        "sys.argv",
        [
            *("main_distributed.py", *toy_flags(toy), *run_flags(tmp_path)),
            *("--batch_size=2", "--accum_steps=4", "--epochs=3", f"--pretrain_cnn_path={weights}"),
        ],
    )
    run_script(main_distributed.main)
    assert len(counts) > 8 and max(counts) == 4
