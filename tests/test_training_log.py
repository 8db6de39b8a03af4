import csv
import math
from types import SimpleNamespace

import pytest

from training_log import BadSamples, append_record, read_records
from utils import append


class Alone:
    """The only process of a run."""

    rank = 0

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value


def listed(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_each_bad_video_is_listed_once_over_restarts(tmp_path):
    path = tmp_path / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.found = [("a.mp4", "absent"), ("b, c.mp4", 'says "no"\nand more'), ("a.mp4", "again")]
    bad.write()
    again = BadSamples(path, Alone())
    again.found = [("a.mp4", "absent"), ("日本.mp4", "absent")]
    again.write()
    expected = [("a.mp4", "absent"), ("b, c.mp4", 'says "no" and more'), ("日本.mp4", "absent")]
    assert listed(path) == expected


def test_quarantine_is_read_back_and_learnt_from_other_ranks(tmp_path):
    path = tmp_path / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.process = SimpleNamespace(
        rank=0, gather=lambda own: [own, [("b.mp4", "quarantined: it crashed")]]
    )
    bad.found = [("a.mp4", "absent")]
    bad.write()
    assert bad.quarantined == BadSamples(path, Alone()).quarantined == {"b.mp4"}


def test_what_could_not_be_written_is_tried_again(tmp_path, milnce_log):
    path = tmp_path / "absent folder" / "run.bad.csv"
    bad = BadSamples(path, Alone())
    bad.found = [("a.mp4", "absent")]
    bad.write()
    assert "could not write" in milnce_log.text
    path.parent.mkdir()
    bad.found = [("a.mp4", "absent")]  # met again
    bad.write()
    assert listed(path) == [("a.mp4", "absent")]


@pytest.mark.parametrize("half", ["a.mp4", '"a, b.mp4","no su', "a.mp4,"])
def test_half_a_line_of_a_killed_run_costs_that_line_only(tmp_path, half):
    path = tmp_path / "run.bad.csv"
    path.write_text(f"path,reason\nc.mp4,absent\n{half}")
    bad = BadSamples(path, Alone())
    assert "c.mp4" in bad.listed
    bad.found = [("d.mp4", "absent")]
    bad.write()
    assert "d.mp4" in BadSamples(path, Alone()).listed


def test_json_lines_survive_half_a_line_and_numbers_that_are_none(tmp_path):
    path = tmp_path / "run.jsonl"
    assert read_records(path) == []
    append_record(path, {"loss": math.nan, "step": 1})
    append(path, '{"loss": 0')
    append_record(path, {"loss": 2.5, "step": 2})
    assert read_records(path) == [{"loss": None, "step": 1}, {"loss": 2.5, "step": 2}]
