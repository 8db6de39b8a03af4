"""What an evaluation reports: its metrics, the counts behind them and their 95% intervals."""

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from utils import FilePath, atomic_write

LEVEL = 0.95  # of an interval
RESAMPLES = 1000
MEDIAN_RANK = "MR"  # all other metrics that are not counts are fractions
NOTES = {  # caveats that are shown wherever the metric is shown
    "recall": "not the published list of videos",
    "R1_64": "reads the alignable flags",
    "AUC_64": "reads the alignable flags",
}


class Results(NamedTuple):
    """The metrics of an evaluation, with the counts and intervals of some, by metric name."""

    # Fractions, the median rank and counts; None if undefined. Metrics of parts, such as tasks, are
    # dicts, which only the JSON file has.
    metrics: Mapping[str, float | int | dict | None]
    counts: Mapping[str, tuple[int, int]] = {}
    intervals: Mapping[str, tuple[float, float]] = {}


def bootstrap_interval(
    units: np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95% interval of a statistic: percentiles over resamples with replacement.

    units [n, ...]: one row per unit to resample, such as the hit (0 or 1) of each query. With a
    suitable statistic, a row may also be an index, or hits and a total. Resamples for which the
    statistic is NaN are dropped. The same units give the same interval.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(units), size=(resamples, len(units)))
    values = [statistic(units[rows]) for rows in drawn]
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def list_metrics(results: Results) -> list[tuple[str, str, str]]:
    """List the metrics for display: (name, value, details), see describe_metric."""
    return [
        (name, format_metric(name, value), describe_metric(results, name))
        for name, value in results.metrics.items()
        if not isinstance(value, dict)
    ]


def format_metric(name: str, value: float | int | None) -> str:
    """Format a metric for display: a fraction in per cent."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if name == MEDIAN_RANK else f"{100 * value:.1f}%"


def describe_metric(results: Results, name: str) -> str:
    """Format a metric's count, interval and note, those that it has."""
    parts = []
    if name in results.counts:
        parts.append("{} of {}".format(*results.counts[name]))
    if name in results.intervals:
        low, high = (format_metric(name, float(end)) for end in results.intervals[name])
        parts.append(f"95% interval {low} to {high}")
    if name in NOTES:
        parts.append(NOTES[name])
    return ", ".join(parts)


def print_results(title: str, results: Results) -> None:
    """Print an evaluation's metrics, one per line."""
    for name, value, details in list_metrics(results):
        print(f"{title} {name}: {value}{f' ({details})' * bool(details)}")


def write_results(path: FilePath, results: Results, **provenance: object) -> None:
    """Write the results to a JSON file: the metrics by name, then counts, intervals, provenance.

    Fractions stay fractions. An interval of NaN is not written. Raises OSError.
    """
    intervals = {n: ends for n, ends in results.intervals.items() if not np.isnan(ends).any()}
    content = {**results.metrics, "counts": results.counts, "intervals": intervals, **provenance}
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
