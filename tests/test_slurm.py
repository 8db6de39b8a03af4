"""Trainings on two nodes of a SLURM cluster, which .ci/slurm_cluster.sh starts on one machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from s3dg import read_weights
from tests.helpers import ROOT, toy_flags

pytestmark = pytest.mark.slow
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for jobs to find this python
STEPS = 30  # of an epoch


class Slurm:
    """Start jobs from the repository's folder, all with the same name."""

    name = f"--job-name=test-{os.getpid()}"

    def ask(self, *command):
        command = [str(word) for word in command]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def start(self, program, *args):
        return subprocess.run(
            [program, self.name, *map(str, args)],
            **{"cwd": ROOT, "env": {**os.environ, "PATH": PATH}, "timeout": 300},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )

    def srun(self, *args):
        done = self.start("srun", "--nodes=2", "--kill-on-bad-exit=1", *args)
        assert done.returncode == 0, done.stdout

    def sbatch(self, *args):
        done = self.start("sbatch", "--parsable", "--nodes=2", *args)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def job(self, job):
        """Return what SLURM reports about a job: JobState, Restarts, ExitCode, .."""
        words = self.ask("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, job):
        """Wait until a job has left the queue; return what SLURM reports about it."""
        wait_for(lambda: not self.ask("squeue", "--noheader", f"--name={self.name[11:]}"))
        return self.job(job)


def wait_for(condition):
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def slurm():
    cluster = Slurm()
    try:
        config = cluster.ask("scontrol", "show", "config")
    except (OSError, subprocess.CalledProcessError):
        config = ""
    if not any(line.split() == ["ClusterName", "=", "milnce"] for line in config.splitlines()):
        why = "the cluster of .ci/slurm_cluster.sh is not running, or not found (SLURM_CONF)"
        if os.environ.get("MILNCE_REQUIRE_SLURM"):
            pytest.fail(why)
        pytest.skip(why)
    yield cluster
    cluster.ask("scancel", f"--name={cluster.name[11:]}")


@pytest.fixture(scope="module")
def flags(toy, weights, tmp_path_factory):
    """Flags of a training by four ranks on two nodes, 8 clips per step, STEPS steps per epoch."""
    table = tmp_path_factory.mktemp("list") / "long.csv"
    header, *videos = (toy / "howto100m_videos.csv").read_text().splitlines()
    table.write_text("\n".join([header, *videos * STEPS]) + "\n")
    return [
        *(*toy_flags(toy), f"--train_csv={table}", f"--pretrain_cnn_path={weights}"),
        *("--checkpoint_dir=run", "--epochs=1", "--lr=1e-5"),
    ]


def folders(folder):
    return [f"--checkpoint_root={folder}/checkpoint", f"--log_root={folder}/log"]


def records(folder):
    path = folder / "log/run.jsonl"
    return [json.loads(line) for line in path.open()] if path.exists() else []


def steps(folder):
    return [record["step"] for record in records(folder)]


def submit(slurm, flags, folder, *more):
    """Submit the script that users copy."""
    folder.mkdir(exist_ok=True)  # otherwise SLURM cannot write the output
    return slurm.sbatch(
        *("--cpus-per-task=2", f"--output={folder}/output.txt"),
        *("scripts/slurm/train.sbatch", *flags, *folders(folder), "--nproc_per_node=2"),
        *more,
    )


def follow(slurm, job, folder, condition):
    """Wait until a condition holds for a job that submit() started."""

    def reached():
        assert slurm.job(job)["JobState"] != "FAILED", (folder / "output.txt").read_text()
        return condition()

    wait_for(reached)


def follow_to_step(slurm, job, folder, step):
    follow(slurm, job, folder, lambda: max(steps(folder), default=0) >= step)


def test_a_task_per_node_and_a_task_per_process_train_alike(slurm, flags, toy, tmp_path):
    losses = []
    for name, tasks, more in (("node", 1, ["--nproc_per_node=2"]), ("process", 2, [])):
        command = [sys.executable, "main_distributed.py", *flags, *folders(tmp_path / name), *more]
        short = f"--train_csv={toy}/howto100m_videos.csv"
        slurm.srun(f"--ntasks-per-node={tasks}", *command, short, "--epochs=3")
        log = (tmp_path / name / "log/run.txt").read_text()
        assert f"SLURM, a task per {name}: 2 x 2 processes, on cpu, rendezvous at tcp://n1:" in log
        losses.append([record["loss"] for record in records(tmp_path / name)])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_several_tasks_without_srun_are_rejected(slurm, flags, tmp_path):
    command = " ".join([sys.executable, "main_distributed.py", *flags, *folders(tmp_path)])
    output = tmp_path / "output.txt"
    job = slurm.sbatch("--ntasks-per-node=2", f"--output={output}", f"--wrap={command}")
    assert slurm.wait_for_end(job)["ExitCode"] == "2:0"
    text = output.read_text()
    assert text.startswith("error: ") and "srun" in text and text.count("\n") == 1


def test_a_job_resumes_to_the_bit_after_a_preemption_and_at_its_time_limit(slurm, flags, tmp_path):
    """The time limit is simulated by the signal that SLURM would send the shell."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = submit(slurm, flags, stopped, "--epochs=2")
    follow_to_step(slurm, job, stopped, 10)
    slurm.sbatch("--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    follow(slurm, job, stopped, lambda: slurm.job(job)["Restarts"] == "1")
    preempted = max(steps(stopped))
    assert preempted < 2 * STEPS
    follow_to_step(slurm, job, stopped, preempted + 10)
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait_for_end(job)
    output = (stopped / "output.txt").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), output
    assert steps(stopped) == [*range(1, 2 * STEPS + 1)]  # none is lost or repeated
    log = (stopped / "log/run.txt").read_text()
    assert f"run/epoch{preempted // STEPS:04d}_step{preempted:08d}.pth.tar" in log
    assert log.count("stopped by SIGTERM") == log.count("stopped by SIGUSR1") == 1

    job = submit(slurm, flags, whole, "--epochs=2")
    assert slurm.wait_for_end(job)["Restarts"] == "0"
    weights, expected = (
        read_weights(folder / "checkpoint/run/epoch0002.pth.tar")["state_dict"]
        for folder in (stopped, whole)
    )
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_a_cancelled_job_writes_a_checkpoint_and_stays_cancelled(slurm, flags, tmp_path):
    job = submit(slurm, flags, tmp_path)
    follow_to_step(slurm, job, tmp_path, 10)
    slurm.ask("scancel", job)
    ended = slurm.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert list(tmp_path.glob("checkpoint/run/epoch0000_step*.pth.tar"))
