"""What an evaluation reports: intervals, per cent with counts, and the JSON file."""

import json

import numpy as np
import pytest

from evaluation.results import Results, bootstrap_interval, print_results, write_results


def test_an_interval_covers_the_true_fraction_about_19_times_in_20():
    rng = np.random.default_rng(1)
    draws = rng.random((200, 150)) < 0.3
    intervals = [bootstrap_interval(hits, resamples=400) for hits in draws]
    covered = np.mean([low <= 0.3 <= high for low, high in intervals])
    assert 0.9 < covered < 0.99


def test_an_interval_is_that_of_the_binomial_distribution():
    hits = np.arange(400) < 100
    width = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    low, high = bootstrap_interval(hits, resamples=4000)
    assert [low, high] == pytest.approx([0.25 - width, 0.25 + width], abs=6e-3)


def test_the_same_units_give_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(0).random(50)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_units_may_be_rows_with_a_suitable_statistic():
    """Such as the hits and steps of a video. A resample may have no steps."""
    rows = np.array([[1, 2], [2, 2], [0, 0]])

    def recall(rows):
        hits, steps = rows.sum(axis=0)
        return hits / steps if steps else np.nan

    low, high = bootstrap_interval(rows, recall)
    assert (low, high) == (0.5, 1)


RESULTS = Results(
    {"R1": 0.125, "AUC": None, "MR": 9.5, "num_videos": 24, "tasks": {"1": {"recall": 0.5}}},
    {"R1": (3, 24)},
    {"R1": (0.04, 0.25), "MR": (7.0, 12.0)},
)


def test_the_terminal_shows_per_cent_with_counts_and_intervals(capsys):
    print_results("Toy", RESULTS)
    assert capsys.readouterr().out.splitlines() == [
        "Toy R1: 12.5% (3 of 24, 95% interval 4.0% to 25.0%)",
        "Toy AUC: –",  # noqa: RUF001
        "Toy MR: 9.5 (95% interval 7 to 12)",
        "Toy num_videos: 24",
    ]


def test_a_nan_interval_is_not_written(tmp_path):
    write_results(tmp_path / "out.json", RESULTS._replace(intervals={"R1": (np.nan, np.nan)}))
    assert json.loads((tmp_path / "out.json").read_text())["intervals"] == {}


@pytest.mark.parametrize(
    ("name", "note"),
    [("R1_64", "reads the alignable flags"), ("recall", "not the published list of videos")],
)
def test_a_metric_that_needs_a_note_is_printed_with_it(name, note, capsys):
    print_results("Toy", Results({name: 0.5}, {name: (1, 2)}))
    assert capsys.readouterr().out == f"Toy {name}: 50.0% (1 of 2, {note})\n"


def test_the_file_has_fractions_and_the_provenance(tmp_path):
    write_results(tmp_path / "out.json", RESULTS, command="python x.py", weights_checksum=None)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        **RESULTS.metrics,
        "counts": {"R1": [3, 24]},
        "intervals": {"R1": [0.04, 0.25], "MR": [7.0, 12.0]},
        "command": "python x.py",
        "weights_checksum": None,
    }
