"""Compare trainings with 1 and with 4 candidate captions by their held-out retrieval.

    python data/toy/prepare.py --out data/toy
    python benchmarks/candidates.py --out log/candidates    # about 45 minutes on two quiet cores
    python benchmarks/candidates.py --out log/bf16 -- --amp=bf16    # passed to main_distributed.py

The paper claims that a bag of candidates makes it easier to learn from captions that are displaced
in time (section 3.1, table 2). Here the toy set's narration is aligned with the actions that it
describes, or displaced from them by three seconds (standard deviation, clipped at four seconds).
When aligned, seven captions in ten describe their clip; when displaced, three do. Captions that
describe no action stay. The toy set's own narration is in between (`--drift 1`, six in ten).

Videos, sentences, word vectors, evaluation sets and steps are the same in every condition. Runs of
one seed also have the same initial weights, order and (for one displacement) clips. With 1, a clip
has the caption that it was drawn for; with 4, also three neighbours, so 4 sees more text per clip.

FOLDER/log gets the logs of the trainings and the metrics of the evaluations. FOLDER itself gets
candidates.json, with the metrics of all runs, and candidates.png. The tables are printed. A run
whose metrics exist is skipped, and one that was stopped resumes from its last epoch.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import torch
from bench_decode import processor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "toy")]
import prepare  # noqa: E402

from args import Parser, make_folder, not_negative, positive  # noqa: E402
from utils import InputError, atomic_write, die_with_parent, run_script  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CLIPS = ("--num_frames=8", "--video_size=64", "--num_thread_reader=2", "--verbose=0")
TRAINING = (
    *("--crop_only=0", "--centercrop=1", "--batch_size=32", "--min_time=3", "--warmup_steps=50"),
    *("--n_display=5", "--checkpoint_every=0", "--nproc_per_node=2", "--amp=none"),
)
SETS = {"youcook": "YouCook2-like", "msrvtt": "MSR-VTT-like"}
TABLES = {"youcook": "validation_youcook.csv", "msrvtt": "msrvtt_test.csv"}
RECALLS = {"R1": 1, "R5": 5, "R10": 10}


def run(script, *flags):
    """Run a script of the project. Exits with its status if it fails; it dies with this process."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    quiet = {"stdout": subprocess.DEVNULL, "preexec_fn": die_with_parent}
    status = subprocess.run(command, **quiet).returncode
    if status:
        sys.exit(status)


def make_captions(options, drift):
    """Make a folder of the toy set's captions with this drift."""
    stamp = prepare.read_stamp(Path(options.toy))
    folder = options.out / f"drift{drift:g}"
    prepare.plan_training(folder, stamp["seed"], stamp["num_videos"], drift)
    return folder / "captions"


def run_condition(options, candidates, drift, seed):
    """Train and evaluate one run, or read its metrics: {set: metrics}."""
    name = f"k{candidates}_drift{drift:g}_seed{seed}"
    scored = {task: options.out / "log" / f"{name}.{task}.json" for task in SETS}
    if not all(path.exists() for path in scored.values()):
        began = time.monotonic()
        checkpoints = options.out / "checkpoint"
        words = f"--token_to_word_path={options.toy}/dict.npy"
        run(
            *("main_distributed.py", *CLIPS, *TRAINING, words),
            f"--train_csv={options.toy}/howto100m_videos.csv",
            f"--video_path={options.toy}/videos",
            f"--caption_root={make_captions(options, drift)}",
            f"--word2vec_path={options.toy}/word2vec.pth",
            *(f"--num_candidates={candidates}", f"--seed={seed}", f"--epochs={options.epochs}"),
            *(f"--checkpoint_root={checkpoints}", f"--checkpoint_dir={name}", "--resume"),
            *(f"--log_root={options.out}/log", *options.flags),
        )
        for task, path in scored.items():
            run(
                *(f"eval_{task}.py", *CLIPS, words, f"--metrics_json={path}"),
                f"--pretrain_cnn_path={checkpoints}/{name}/epoch{options.epochs:04d}.pth.tar",
                f"--eval_csv={options.toy}/{TABLES[task]}",
                f"--eval_video_root={options.toy}/{task}",
            )
        shutil.rmtree(checkpoints / name)  # more than a gigabyte
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {task: json.loads(path.read_text()) for task, path in scored.items()}


def check_settings(options):
    """Raise InputError if the folder has runs of other settings, which cannot be compared."""
    stamp = prepare.read_stamp(Path(options.toy)) or {}
    if "num_videos" not in stamp:
        raise InputError(f"--toy: {options.toy} is not a toy data set; make one with prepare.py")
    make_folder(options.out, "out")
    settings = {
        "toy": stamp,
        "training": [*CLIPS, *TRAINING, *options.flags],
        "epochs": options.epochs,
    }
    path = options.out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"--out: {options.out} has runs of other settings; give another folder")
    path.write_text(json.dumps(settings, indent=2) + "\n")


def describe_drift(drift):
    return f"displaced by {drift:g} s" if drift else "aligned"


def spread(values):
    """Return the mean and the standard deviation over the seeds, 0 for one seed."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs, task):
    """Yield the Markdown table of one evaluation set. runs: {(drift, candidates): [metrics]}."""
    videos = next(iter(runs.values()))[0][task]["num_videos"]
    yield f"| {SETS[task]}, {videos} clips | candidates | R@1 | R@5 | R@10 | MedR |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (drift, candidates), results in runs.items():
        cells = []
        for metric, scale in (*((name, 100) for name in RECALLS), ("MR", 1)):
            mean, deviation = spread([scale * result[task][metric] for result in results])
            cells.append(f"{mean:.1f} ± {deviation:.1f}")
        yield f"| {describe_drift(drift)} | {candidates} | {' | '.join(cells)} |"
    chance = [f"{100 * k / videos:.1f}" for k in RECALLS.values()]
    yield f"| chance | | {' | '.join(chance)} | {(videos + 1) / 2:.1f} |"


def draw(runs, path):
    """Plot R@10 and MedR of each set: a dot per seed, and the mean with its deviation."""
    drifts, counts = (sorted(set(column)) for column in zip(*runs, strict=True))
    figure, panels = plt.subplots(2, len(SETS), figsize=(8, 5.5), sharex=True, squeeze=False)
    for column, task in enumerate(SETS):
        videos = next(iter(runs.values()))[0][task]["num_videos"]
        for panel, metric, scale, chance in (
            (panels[0][column], "R10", 100, 1000 / videos),
            (panels[1][column], "MR", 1, (videos + 1) / 2),
        ):
            for (drift, candidates), results in runs.items():
                number = counts.index(candidates)
                values = [scale * result[task][metric] for result in results]
                mean, deviation = spread(values)
                place = drifts.index(drift) + 0.24 * (number - (len(counts) - 1) / 2)
                colour = f"C{number}"
                label = f"{candidates} candidate{'s' * (candidates > 1)}, mean ± std"
                panel.bar(
                    *(place, mean, 0.2),
                    **{"yerr": deviation, "capsize": 4, "color": colour, "alpha": 0.45},
                    label=label if drift == drifts[0] else None,
                )
                panel.plot([place] * len(values), values, "o", color=colour, ms=4, mec="white")
            panel.axhline(chance, color="gray", linestyle="--", linewidth=1, label="chance")
            panel.grid(axis="y", alpha=0.3)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(f"{SETS[task]}, {videos} clips", fontsize=10)
        panels[1][column].set_xticks(
            range(len(drifts)), [describe_drift(drift) for drift in drifts]
        )
        panels[1][column].set_xlabel("captions")
    panels[0][0].set_ylabel("R@10 (%), higher is better")
    panels[1][0].set_ylabel("median rank, lower is better")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--toy", default=ROOT / "data" / "toy", help="prepare.py's --out")
    parser.add_argument("--seeds", type=positive(int), default=3, help="run seeds 1 to this one")
    parser.add_argument("--epochs", type=positive(int), default=32, help="of 160 clips, 5 steps")
    parser.add_argument("--candidates", type=positive(int), nargs="+", default=[1, 4])
    parser.add_argument("--drift", type=not_negative(float), nargs="+", default=[0.0, 3.0])
    parser.add_argument("flags", nargs="*", help="after --: more flags of main_distributed.py")
    options = parser.parse_args()
    check_settings(options)
    runs = {}
    # Run every condition with a seed before the next seed: a stopped run can then be compared.
    for seed in range(1, options.seeds + 1):
        for condition in itertools.product(options.drift, options.candidates):
            drift, candidates = condition
            results = run_condition(options, candidates, drift, seed)
            runs.setdefault(condition, []).append(results)
    rows = [
        {"drift": drift, "candidates": candidates, "seed": seed, **results}
        for (drift, candidates), seeds in runs.items()
        for seed, results in enumerate(seeds, 1)
    ]
    (options.out / "candidates.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(runs, options.out / "candidates.png")
    flags = f", {' '.join(options.flags)}" if options.flags else ""
    print(f"{processor()}; torch {torch.__version__}")
    print(f"{options.epochs} epochs{flags}; mean ± standard deviation of {options.seeds} seeds")
    for task in SETS:
        print("", *table(runs, task), sep="\n")


if __name__ == "__main__":
    run_script(main)
