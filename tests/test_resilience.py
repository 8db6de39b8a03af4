"""Whole trainings that are killed, stopped, suspended, or given bad data."""

import csv
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch

from s3dg import read_weights
from tests.helpers import ROOT, pack_folder, run_python, scalars, toy_flags, without_command
from training.checkpoint import list_checkpoints
from training.log import read_records

pytestmark = pytest.mark.slow
MAIN = ROOT / "main_distributed.py"


class Run:
    """A training of the toy set in its own folder, as a process that can be watched."""

    def __init__(self, toy, weights, folder, *flags, faults=None, before=(), processes=2, **popen):
        script = MAIN if faults is None else ROOT / "tests" / "faulty_training.py"
        own = [] if before else [f"--nproc_per_node={processes}"]
        self.folder = folder
        command = [
            *(sys.executable, *before, script, *toy_flags(toy)),
            *(f"--checkpoint_root={folder}/checkpoint", f"--log_root={folder}/log"),
            *("--checkpoint_dir=run", f"--pretrain_cnn_path={weights}", *own, *flags),
        ]
        with open(folder / "output.txt", "a") as output:
            self.process = psutil.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "FAULTS": json.dumps(faults)},
                **popen,
            )

    def family(self):
        """Return all processes of the run."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def ranks(self):
        return [p for p in self.process.children() if "spawn_main" in " ".join(p.cmdline())]

    def rank(self, number):
        """Return rank `number`. Ranks are started in order."""
        return sorted(self.ranks(), key=psutil.Process.create_time)[number]

    def wait(self, timeout=240):
        return self.process.wait(timeout)

    def steps(self):
        return [record["step"] for record in records(self.folder) if "loss" in record]

    def wait_for(self, condition, pause=0.1, timeout=300):
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, text(self.folder)
            assert time.monotonic() < deadline, text(self.folder)
            time.sleep(pause)  # polling takes time from the run

    def wait_for_step(self, step):
        self.wait_for(lambda: max(self.steps(), default=0) >= step)


def records(folder):
    return read_records(folder / "log/run.jsonl")


def text(folder):
    return (folder / "output.txt").read_text()


def bad_samples(folder):
    with open(folder / "log/run.bad.csv", newline="") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


def final(folder):
    return read_weights(list_checkpoints(folder / "checkpoint/run")[-1][1])


def assert_same_end(folder, other):
    """Assert that the last checkpoints are bit-identical: weights, optimizer, schedule, counts."""
    one, two = final(folder), final(other)
    assert one["epoch"] == two["epoch"] and one["progress"] == two["progress"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert one["scheduler"]["last_epoch"] == two["scheduler"]["last_epoch"]
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][number][name])


def assert_all_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


EPOCHS = 20
LONG = [f"--epochs={EPOCHS}", "--checkpoint_every=1", "--n_display=1"]


@pytest.fixture(scope="module")
def uninterrupted(toy, weights, tmp_path_factory):
    """A run of 40 steps in two processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = Run(toy, weights, folder, *LONG)
    assert run.wait() == 0, text(folder)
    return folder


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(uninterrupted, toy, weights, tmp_path):
    """SIGKILL hits the launcher or a rank, at a random moment or while a checkpoint is written."""
    rng = random.Random(0)
    kills = while_writing = 0
    checkpoints = tmp_path / "checkpoint/run"
    while True:
        began = time.time()
        run = Run(toy, weights, tmp_path, *LONG, "--resume")
        done = max(run.steps(), default=0)
        if kills == 10:
            break
        run.wait_for(lambda run=run, done=done: max(run.steps(), default=0) > done)
        if kills % 3 == 0:
            run.wait_for(lambda: list(checkpoints.glob("*.tmp")), pause=0.005)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 1))
        family, victim = run.family(), run.process
        if kills % 2:
            victim = rng.choice(run.ranks())
        victim.kill()
        assert run.wait() in (1, -signal.SIGKILL)
        assert_all_gone(family)
        kills += 1
        while_writing += any(p.stat().st_mtime > began for p in checkpoints.glob("*.tmp"))
    assert run.wait() == 0, text(tmp_path)
    print(f"{kills} kills, {while_writing} of them while a checkpoint was written")
    assert while_writing > 0
    assert not list(checkpoints.glob("*.tmp"))
    assert_same_end(uninterrupted, tmp_path)


def test_a_signal_in_validation_ends_it_and_a_resumed_run_validates_again(toy, weights, tmp_path):
    """The run's logs end in half a line, as those of a machine that lost its power may."""
    (tmp_path / "log").mkdir()
    (tmp_path / "log/run.jsonl").write_text('{"epoch": 1, "R1": 0')
    (tmp_path / "log/run.bad.csv").write_text('path,reason\n"a, b.mp4","no su')
    flags = [f"--eval_video_root={toy}/youcook", f"--eval_csv={toy}/validation_youcook.csv"]
    flags += ["--evaluate", "--epochs=2", "--num_windows_test=8", "--batch_size_val=8"]
    run = Run(toy, weights, tmp_path, *flags)
    run.wait_for(lambda: "epoch0001.pth.tar" in text(tmp_path))
    for rank in run.ranks():
        rank.terminate()
    assert run.wait() == 75, text(tmp_path)
    assert not any("R1" in record for record in records(tmp_path))
    assert Run(toy, weights, tmp_path, *flags, "--resume").wait() == 0, text(tmp_path)
    validated = [record["epoch"] for record in records(tmp_path) if "R1" in record]
    assert validated == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_writes_a_checkpoint_and_exits_with_75(
    number, uninterrupted, toy, weights, tmp_path
):
    flags = [*LONG, "--checkpoint_every=0", "--tensorboard"]
    run = Run(toy, weights, tmp_path, *flags)
    run.wait_for_step(21)
    family = run.family()
    # As a launcher does: all processes get it, including data workers, and more than once.
    for process in family:
        process.send_signal(number)
    assert run.wait() == 75, text(tmp_path)
    assert_all_gone(family)
    assert f"stopped by {number.name}" in text(tmp_path)
    (_, step), path = list_checkpoints(tmp_path / "checkpoint/run")[-1]
    assert step == run.steps()[-1] >= 21, path
    assert Run(toy, weights, tmp_path, *flags, "--resume").wait() == 0, text(tmp_path)
    assert_same_end(uninterrupted, tmp_path)
    assert scalars(tmp_path / "log/run.tensorboard")["training/loss"].keys() == set(range(1, 41))


def test_a_run_from_tar_shards_stops_resumes_and_evaluates_as_one_from_files(
    uninterrupted, toy, weights, tmp_path
):
    """The list has the videos of the shards in the same order. Captions are found by video id."""
    names = [name for [name] in csv.reader((toy / "howto100m_videos.csv").open())][1:]
    assert names == sorted(names)
    shards, half = tmp_path / "shards", len(names) // 2
    pack_folder(toy / "videos", shards / "00000.tar", names[:half])
    pack_folder(toy / "videos", shards / "00001.tar", names[half:])
    prepare, store = "data/howto100m/prepare.py", f"--caption_root={tmp_path}/captions"
    out = f"--out={tmp_path}/captions"
    run_python(prepare, "pack", f"--caption_root={toy}/captions", "--by_id", out)
    out = f"--out={tmp_path}/list.csv"
    run_python(prepare, "list", f"--video_path={shards}", store, out)
    listed = (tmp_path / "list.csv").read_text().splitlines()[1:]
    assert [name.split("/", 1)[1] for name in listed] == names
    flags = [*LONG, f"--train_csv={tmp_path}/list.csv", f"--video_path={shards}", store]
    run = Run(toy, weights, tmp_path, *flags)
    run.wait_for_step(21)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75, text(tmp_path)
    assert Run(toy, weights, tmp_path, *flags, "--resume").wait() == 0, text(tmp_path)
    assert_same_end(uninterrupted, tmp_path)
    assert not (tmp_path / "log/run.bad.csv").exists()

    metrics = {}
    for root in (toy / "youcook", pack_folder(toy / "youcook", tmp_path / "youcook.tar")):
        run_python(
            "eval_youcook.py",
            f"--pretrain_cnn_path={list_checkpoints(tmp_path / 'checkpoint/run')[-1][1]}",
            f"--token_to_word_path={toy}/dict.npy",
            f"--eval_csv={toy}/validation_youcook.csv",
            f"--eval_video_root={root}",
            *("--num_frames=4", "--video_size=32", "--num_windows_test=2"),
            f"--metrics_json={tmp_path}/metrics.json",
        )
        found = json.loads((tmp_path / "metrics.json").read_text())
        metrics[root.name] = without_command(found)
    assert metrics["youcook.tar"] == metrics["youcook"] and metrics["youcook"]["num_missing"] == 0


def test_torchrun_restarts_a_killed_rank_and_the_run_resumes(uninterrupted, toy, weights, tmp_path):
    """Without --resume: the run knows from torchrun that this is a restart."""
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = Run(toy, weights, tmp_path, *LONG, before=[*before, "--max-restarts=1"])
    run.wait_for_step(13)
    random.Random(1).choice(run.process.children()).kill()
    assert run.wait() == 0, text(tmp_path)
    assert "resumed from" in text(tmp_path) and "torchrun: 1 x 2" in text(tmp_path)
    assert_same_end(uninterrupted, tmp_path)


def test_a_restart_by_torchrun_does_not_resume_from_another_runs_checkpoints(
    uninterrupted, toy, weights, tmp_path
):
    shutil.copytree(uninterrupted / "checkpoint", tmp_path / "checkpoint")
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = Run(toy, weights, tmp_path, *LONG, before=[*before, "--max-restarts=1"])
    assert run.wait() == 1
    assert text(tmp_path).count("holds the checkpoints of another run") >= 2
    assert "resumed from" not in text(tmp_path)


def test_nothing_outlives_a_killed_torchrun(toy, weights, tmp_path):
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = Run(toy, weights, tmp_path, *LONG, before=before)
    run.wait_for_step(3)
    family = run.family()
    run.process.kill()
    run.wait()
    assert_all_gone(family)


def test_torchrun_on_two_nodes_restarts_both(uninterrupted, toy, weights, tmp_path):
    """torchrun reports the restart only to the node whose rank failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    before = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    before += ["--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--max-restarts=3"]
    flags = [*LONG, "--batch_size=2"]  # of a node
    cores = sorted(os.sched_getaffinity(0))[:2]  # one each, as the uninterrupted run's ranks have
    pins = [partial(os.sched_setaffinity, 0, {core}) for core in cores]
    runs = [Run(toy, weights, tmp_path, *flags, before=before, preexec_fn=pin) for pin in pins]
    runs[0].wait_for_step(7)
    runs[0].process.children()[0].kill()
    assert [run.wait() for run in runs] == [0, 0], text(tmp_path)
    assert "resumed from" in text(tmp_path) and "torchrun: 2 x 1" in text(tmp_path)
    assert_same_end(uninterrupted, tmp_path)


@pytest.mark.parametrize(("silent", "rank"), [(False, 1), (True, 1), (True, 0)])
def test_a_rank_that_hangs_ends_the_run_and_is_named(silent, rank, toy, weights, tmp_path):
    """Rank 0 is a special case: it holds the store that all ranks report to."""
    faults = {} if silent else {"stuck": [rank, 7]}
    flags = [*LONG, "--dist_timeout=10", "--sample_timeout=5"]
    run = Run(toy, weights, tmp_path, *flags, faults=faults)
    run.wait_for_step(6)
    family = run.family()
    if silent:
        run.rank(rank).suspend()
    began = time.monotonic()
    assert run.wait() == 1
    assert time.monotonic() - began < 60  # 10 s, with a margin for a busy machine
    assert_all_gone(family)
    lines = [line for line in text(tmp_path).splitlines() if "stopping: " in line]
    assert lines  # one from each rank that still runs
    for line in lines:
        assert f"rank {rank} " in line and f"rank {1 - rank}" not in line
        if rank == 0:
            assert "has not responded for 10 s" in line
        else:
            assert "no rank made progress for 1" in line
            assert ("no longer responds" if silent else "step 7, faulty_training.py") in line


def test_a_job_that_was_suspended_for_long_continues(toy, weights, tmp_path):
    run = Run(toy, weights, tmp_path, "--epochs=15", "--dist_timeout=10", "--sample_timeout=5")
    run.wait_for_step(5)
    family = run.family()
    for process in family:
        process.suspend()
    time.sleep(15)
    for process in family:
        process.resume()
    assert run.wait() == 0, text(tmp_path)
    assert not (tmp_path / "log/run.bad.csv").exists()


def test_a_rank_that_dies_ends_the_run_and_is_named(toy, weights, tmp_path):
    run = Run(toy, weights, tmp_path, *LONG)
    run.wait_for_step(3)
    family = run.family()
    run.rank(1).kill()
    assert run.wait() == 1
    assert_all_gone(family)
    assert "rank 1 was killed by SIGKILL" in text(tmp_path)


FAULTY = {"crash": "toy00003", "hang": "toy00005"}
MESSY = ["--max_bad_fraction=1", "--sample_timeout=3", "--epochs=12", "--num_thread_reader=4"]


@pytest.fixture(scope="module")
def messy(toy, tmp_path_factory):
    """The toy set with an absent video, one that is a text file, and an empty caption file."""
    folder = tmp_path_factory.mktemp("messy")
    shutil.copytree(toy / "videos", folder / "videos")
    shutil.copytree(toy / "captions", folder / "captions")
    (folder / "videos/toy00000.mp4").unlink()
    (folder / "videos/toy00001.mp4").write_text("no video")
    (folder / "captions/toy00002.csv").write_text("start,end,text\n")
    return [*MESSY, f"--video_path={folder}/videos", f"--caption_root={folder}/captions"]


def test_bad_samples_are_replaced_one_by_one_and_the_same_after_a_resume(
    messy, toy, weights, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    run = Run(toy, weights, one, *messy, faults=FAULTY)
    assert run.wait() == 0, text(one)
    assert run.steps() == list(range(1, 25))
    reasons = bad_samples(one)
    assert sorted(reasons) == [f"toy0000{i}.mp4" for i in (0, 1, 2, 3, 5)]
    assert len((one / "log/run.bad.csv").read_text().splitlines()) == 6
    assert "SIGSEGV" in reasons["toy00003.mp4"] and "more than 3 s" in reasons["toy00005.mp4"]
    assert "No such file" in reasons["toy00000.mp4"] and "caption" in reasons["toy00002.mp4"]
    assert records(one)[-1]["bad_samples"] == 12 * 5  # once per visit

    run = Run(toy, weights, two, *messy, faults=FAULTY)
    run.wait_for_step(9)
    run.process.terminate()
    assert run.wait() == 75, text(two)
    assert Run(toy, weights, two, *messy, "--resume", faults=FAULTY).wait() == 0, text(two)
    assert_same_end(one, two)
    assert sorted(bad_samples(two)) == sorted(reasons)
    before, after = text(two).split("resumed from")
    assert "quarantined toy00003.mp4" in before and "quarantined" not in after


def test_too_many_bad_samples_end_the_run(messy, toy, weights, tmp_path):
    run = Run(toy, weights, tmp_path, *messy, "--max_bad_fraction=0.3")
    assert run.wait() == 2
    assert text(tmp_path).count("error: --max_bad_fraction: 3 of the 8 samples of epoch 1 ") == 1
    assert len(bad_samples(tmp_path)) == 3
    # Its checkpoint can be resumed from once a larger fraction is allowed.
    assert Run(toy, weights, tmp_path, *messy, "--resume").wait() == 0
    assert final(tmp_path)["epoch"] == 12


def test_steps_that_are_not_finite_are_skipped_on_all_ranks(toy, weights, tmp_path):
    run = Run(toy, weights, tmp_path, "--epochs=4", faults={"nan": [1, 3, 4]})
    assert run.wait() == 0, text(tmp_path)
    shown = records(tmp_path)
    assert [r["loss"] is None for r in shown] == [s in (3, 4) for s in range(1, 9)]
    assert shown[-1]["skipped_steps"] == 2
    assert all(torch.isfinite(v).all() for v in final(tmp_path)["state_dict"].values())
    assert "skipped 1 of the steps up to 4:" in text(tmp_path)
    assert "(2 in a row so far)" in text(tmp_path)


def test_many_skipped_steps_in_a_row_end_the_run_and_keep_its_checkpoints(toy, weights, tmp_path):
    flags = ["--epochs=4", "--max_bad_steps=3", "--checkpoint_every=1"]
    run = Run(toy, weights, tmp_path, *flags, faults={"nan": [1, 4, 8]})
    assert run.wait() == 2
    assert text(tmp_path).count("error: --max_bad_steps: ") == 1
    assert "of 3 steps in a row was not finite, at or shortly before step 6;" in text(tmp_path)
    assert all(torch.isfinite(v).all() for v in final(tmp_path)["state_dict"].values())


def test_a_checkpoint_that_cannot_be_written_is_reported_and_training_continues(
    toy, weights, tmp_path
):
    """The size of files is limited to less than a checkpoint, which fails as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 20, 50 << 20))

    run = Run(toy, weights, tmp_path, "--epochs=3", processes=1, preexec_fn=limit)
    assert run.wait() == 0, text(tmp_path)
    assert run.steps() == [1, 2, 3, 4, 5, 6]
    assert text(tmp_path).count("could not write") == 3
    assert not list((tmp_path / "checkpoint/run").iterdir())


def test_memory_and_open_files_do_not_grow_over_two_thousand_steps(toy, weights, tmp_path):
    # Epochs of 100 steps leave time between checkpoints, each of which opens a file.
    _, *videos = (toy / "howto100m_videos.csv").read_text().split()
    (tmp_path / "videos.csv").write_text("\n".join(["video_path", *videos * 25]))
    flags = ["--batch_size=2", "--num_frames=2", "--video_size=16", "--n_display=20"]
    flags += [f"--train_csv={tmp_path}/videos.csv", "--epochs=21", "--checkpoint_every=0"]
    flags += ["--amp=none", "--channels_last=0"]  # the quickest at this size
    run = Run(toy, weights, tmp_path, *flags, processes=1)
    samples = []
    for step in range(250, 2051, 200):
        run.wait_for_step(step)
        family = run.family()
        assert all(p.status() != psutil.STATUS_ZOMBIE for p in family)
        # Including shared memory: a garbage collection in a rank writes to pages that it shares
        # with its workers, and so turns them into private ones.
        memory = sum(p.memory_info().rss for p in family)
        counts = []
        for _ in range(50):  # now and then a worker has a video open
            counts.append(sum(p.num_fds() for p in family))
            time.sleep(0.01)
        samples.append((step, memory / 2**20, min(counts), len(family)))
        print("step {}: {:.0f} MiB, {} open files, {} processes".format(*samples[-1]))
    run.process.terminate()
    run.wait()
    _, memory, files, processes = zip(*samples, strict=True)
    assert max(memory[-3:]) < memory[1] + 25, samples
    assert len(set(files)) == len(set(processes)) == 1, samples
