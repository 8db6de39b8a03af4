"""Draws trainings from their logs for programs: python scripts/plot_training.py log/milnce.jsonl

Several runs share the panels: loss, learning rate, clips per second, share of the time spent
waiting for data, and, where a run has validated, recalls and median rank, all over steps. The loss
is smoothed by a running mean over a twentieth of its records, above the loss as it is.
"""

import math
import sys
from pathlib import Path

import matplotlib
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import Parser, check_output
from training.log import read_records
from utils import InputError, atomic_write, run_script

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

PANELS = {  # field of a record: (title, factor)
    "loss": ("loss", 1),
    "lr": ("learning rate", 1),
    "clips_per_second": ("clips per second", 1),
    "data_wait": ("waiting for data (%)", 100),
}
RECALLS = {"R1": "-", "R5": "--", "R10": ":"}  # and their lines
FEW = 30  # points up to which each one is marked


def read_run(path):
    """A training's records as two tables by step: (training, validation).

    A resumed run says steps again: what the log had of them before, and of all later ones, is left
    out. A number that is absent or null is NaN. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file: give the .jsonl of a training")
    try:
        records = read_records(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    training, validation = [], []
    first = first_validated = math.inf
    for record in reversed(records):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if "loss" in record and step < first:
            training.append(record)
            first = step
        elif "R1" in record and step < min(first, first_validated):
            validation.append(record)
            first_validated = step
    if not training and not validation:
        raise InputError(f"{path}: no record of a training in it: give a training's .jsonl")
    return tuple(
        pd.DataFrame(rows[::-1], columns=["step", *names])
        .apply(pd.to_numeric, errors="coerce")
        .set_index("step")
        for rows, names in ((training, PANELS), (validation, (*RECALLS, "MR")))
    )


def draw_line(panel, values, **style):
    """A series over its steps, with gaps where it is NaN."""
    marker = "o" if len(values) <= FEW else None
    panel.plot(values.index, values, marker=marker, markersize=3, **style)


def draw(runs):
    """The figure of these runs: {name: (training, validation)}, see read_run."""
    validated = any(len(validation) for _, validation in runs.values())
    rows = 3 if validated else 2
    figure, grid = plt.subplots(rows, 2, figsize=(10, 3 * rows), sharex=True, squeeze=False)
    panels = dict(zip((*PANELS, "recall", "MR"), grid.flat, strict=False))
    for number, (name, (training, validation)) in enumerate(runs.items()):
        colour = f"C{number}"
        loss = training["loss"]
        smooth = loss.rolling(max(1, len(loss) // 20), center=True, min_periods=1).mean()
        panels["loss"].plot(loss.index, loss, color=colour, alpha=0.3, linewidth=1)
        draw_line(panels["loss"], smooth.where(loss.notna()), color=colour, label=name)
        for field in list(PANELS)[1:]:
            draw_line(panels[field], PANELS[field][1] * training[field], color=colour)
        if len(validation):
            for recall, line in RECALLS.items():
                draw_line(panels["recall"], 100 * validation[recall], color=colour, linestyle=line)
            draw_line(panels["MR"], validation["MR"], color=colour)
    for field, (title, _) in PANELS.items():
        panels[field].set_title(title)
    for field in ("clips_per_second", "data_wait"):
        panels[field].set_ylim(bottom=0)
    panels["data_wait"].set_ylim(top=100)
    if validated:
        panels["recall"].set_title("validation: recall (%)")
        panels["recall"].set_ylim(bottom=0)
        panels["MR"].set_title("validation: median rank")
        lines = [plt.Line2D([], [], color="gray", linestyle=line) for line in RECALLS.values()]
        panels["recall"].legend(lines, ["R@1", "R@5", "R@10"], frameon=False, loc="upper left")
    for panel in grid.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in grid[-1]:
        panel.set_xlabel("step")
    handles, names = panels["loss"].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=min(4, len(names)), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.09 * math.ceil(len(names) / 4) / rows))
    return figure


def main():
    parser = Parser(description=__doc__.partition(":")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN.jsonl", help="logs of trainings")
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="PNG file")
    options = parser.parse_args()
    check_output(options.out, "out")
    stems = [path.stem for path in options.runs]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in options.runs]
    figure = draw({name: read_run(path) for name, path in zip(names, options.runs, strict=True)})
    try:
        with atomic_write(options.out) as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"--out: {options.out} cannot be written: {error.strerror}") from None
    print(f"{options.out}: {', '.join(names)}")


if __name__ == "__main__":
    run_script(main)
