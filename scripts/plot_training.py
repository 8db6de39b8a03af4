"""Plot trainings from their .jsonl logs: python scripts/plot_training.py log/milnce.jsonl

Several runs share the panels: loss, learning rate, clips per second, the fraction of the time spent
waiting for data and, if a run has validated, recalls and median rank, all over steps. The loss is
drawn faintly, under its running mean over a twentieth of the records, with the loss of chance as a
dotted line.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import Parser, check_output, check_packages
from utils import InputError, atomic_write, run_script


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.partition(":")[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN.jsonl", help="Logs of trainings."
    )
    parser.add_argument("--out", type=Path, default=Path("training.png"), help="The PNG file.")
    return parser.parse_args()


if __name__ == "__main__":  # --help should not wait for torch
    parse_arguments()
    run_script(lambda: check_packages("plot_training.py", "matplotlib"))

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from training.log import read_records

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

Run = tuple[pd.DataFrame, pd.DataFrame]  # training, validation: a row per step

PANELS = {  # field of a record: (title, factor)
    "loss": ("loss", 1),
    "lr": ("learning rate", 1),
    "clips_per_second": ("clips per second", 1),
    "data_wait": ("waiting for data (%)", 100),
}
RECALLS = {"R1": "-", "R5": "--", "R10": ":"}  # metric: line style
MARKED_POINTS = 30  # a line with at most this many points has markers
LEGEND_WIDTH = 100  # characters of the runs' names side by side


def read_run(path: Path) -> Run:
    """Read a training's records as two tables by step: losses and rates, validation metrics.

    A resumed run logs some steps again. Of those, and of all later ones, only the newest records
    count. Numbers that are absent or null are NaN. Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the .jsonl of a training")
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
        raise InputError(f"{path}: has no record of a training; give the .jsonl of one")
    return tuple(
        pd.DataFrame(rows[::-1], columns=["step", *names])
        .apply(pd.to_numeric, errors="coerce")
        .set_index("step")
        for rows, names in (
            (training, (*PANELS, "batch_size")),
            (validation, (*RECALLS, "MR")),
        )
    )


def draw_line(panel: plt.Axes, values: pd.Series, **style) -> None:
    """Draw a series over its steps, with gaps at NaN."""
    marker = "o" if len(values) <= MARKED_POINTS else None
    panel.plot(values.index, values, marker=marker, markersize=3, **style)


def add_legend(panel: plt.Axes, styles: dict[str, str]) -> None:
    """Explain line styles, {label: style}, above a panel, where they hide no curve."""
    lines = [plt.Line2D([], [], color="gray", linestyle=style) for style in styles.values()]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(lines)}
    panel.legend(lines, list(styles), frameon=False, fontsize="small", **place)


def chance_loss(batch_size: pd.Series) -> pd.Series:
    """Compute the MIL-NCE loss if all scores are equal, as those of a constant embedding.

    batch_size: the B clips of a step, over all processes and micro-batches. Of the 2BK terms of a
    denominator, see loss.MILNCELoss, K are the positives, so the loss is log(2B) for any K.
    """
    return np.log(2 * batch_size)


def draw(runs: dict[str, Run]) -> Figure:
    """Draw runs, by name, into one figure."""
    validated = any(len(validation) for _, validation in runs.values())
    rows = 3 if validated else 2
    size = {"figsize": (10, 3 * rows), "layout": "constrained"}
    figure, grid = plt.subplots(rows, 2, sharex=True, squeeze=False, **size)
    panels = dict(zip((*PANELS, "recall", "MR"), grid.flat, strict=False))
    for number, (name, (training, validation)) in enumerate(runs.items()):
        color = f"C{number}"
        loss = training["loss"]
        smooth = loss.rolling(max(1, len(loss) // 20), center=True, min_periods=1).mean()
        panels["loss"].plot(loss.index, loss, color=color, alpha=0.3, linewidth=1)
        draw_line(panels["loss"], smooth.where(loss.notna()), color=color, label=name)
        chance = chance_loss(training["batch_size"])
        panels["loss"].plot(chance.index, chance, color=color, linestyle=":")
        for field in list(PANELS)[1:]:
            draw_line(panels[field], PANELS[field][1] * training[field], color=color)
        if len(validation):
            for recall, line in RECALLS.items():
                draw_line(panels["recall"], 100 * validation[recall], color=color, linestyle=line)
            draw_line(panels["MR"], validation["MR"], color=color)
    for field, (title, _) in PANELS.items():
        panels[field].set_title(title, loc="left")
    if any(training["batch_size"].notna().any() for training, _ in runs.values()):
        add_legend(panels["loss"], {"chance": ":"})
    for field in ("clips_per_second", "data_wait"):
        panels[field].set_ylim(bottom=0)
    panels["data_wait"].set_ylim(top=100)
    if validated:
        panels["recall"].set_title("validation: recall (%)", loc="left")
        panels["recall"].set_ylim(bottom=0)
        panels["MR"].set_title("validation: median rank", loc="left")
        lines = dict(zip(("R@1", "R@5", "R@10"), RECALLS.values(), strict=True))
        add_legend(panels["recall"], lines)
    for panel in grid.flat:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in grid[-1]:
        panel.set_xlabel("step")
    handles, names = panels["loss"].get_legend_handles_labels()
    columns = min(4, len(names), max(1, LEGEND_WIDTH // max(map(len, names), default=1)))
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def main() -> None:
    options = parse_arguments()
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
