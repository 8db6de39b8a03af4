"""annotations.ucf and data/ucf/prepare.py: the clips and splits of the official lists."""

import importlib.util

import pandas as pd
import pytest

from annotations.clips import COLUMNS
from annotations.ucf import ucf_table
from tests.helpers import ROOT, golden_json, write_csv
from utils import DataError, InputError

GOLDEN = golden_json("evaluations")["ucf"]


def write_lists(folder, **changes):
    """Write the golden official files, with some contents changed or, if None, omitted."""
    folder.mkdir(exist_ok=True)
    for name, content in {**GOLDEN["files"], **changes}.items():
        if content is not None:
            path = folder / f"{name}.txt"
            path.write_bytes(content.encode(errors="surrogateescape"))
    return folder


def prepare(annotations, out):
    spec = importlib.util.spec_from_file_location("prepare_ucf", ROOT / "data/ucf/prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--annotations", str(annotations), "--out", str(out)])


def test_the_official_lists_give_the_golden_rows(tmp_path):
    table, notes = ucf_table(write_lists(tmp_path / "lists"))
    assert notes == []
    rows = [[f"{row.label}/{row.video_id}", row.label, row.split1, row.split2, row.split3]
            for row in table.itertuples()]  # fmt: skip
    assert rows == GOLDEN["rows"]


def test_prepare_writes_the_table_that_the_lists_give(tmp_path, capsys):
    folder = write_lists(tmp_path / "lists")
    prepare(folder, tmp_path / "out.csv")
    pd.testing.assert_frame_equal(ucf_table(tmp_path / "out.csv")[0], ucf_table(folder)[0])
    assert (
        "10 clips of 2 classes\nsplit1: 6 to train on, 4 to test, 0 in n" in capsys.readouterr().out
    )
    with pytest.raises(InputError, match=r"^--out: .*out\.csv already exists"):
        prepare(folder, tmp_path / "out.csv")


def test_a_clip_that_a_split_lacks_is_unused_and_noted(tmp_path):
    first, *rest = GOLDEN["files"]["testlist02"].splitlines(keepends=True)
    table, notes = ucf_table(write_lists(tmp_path / "lists", testlist02="".join(rest)))
    lacking = table[table["split2"] == 0]
    assert (lacking["label"] + "/" + lacking["video_id"]).tolist() == [first.strip()]
    assert notes == ["split2 lacks 1 clip"]


def test_numbers_in_a_test_list_are_accepted_and_checked(tmp_path):
    numbered = GOLDEN["files"]["testlist03"].replace("g15_c01.avi", "g15_c01.avi {}")
    right = numbered.format(1, 37)
    pd.testing.assert_frame_equal(
        ucf_table(write_lists(tmp_path / "right", testlist03=right))[0],
        ucf_table(write_lists(tmp_path / "plain"))[0],
    )
    with pytest.raises(DataError, match=r"testlist03\.txt, line 2: .* is 37 in classInd"):
        ucf_table(write_lists(tmp_path / "wrong", testlist03=numbered.format(1, 1)))


CLIP = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
BAD_LISTS = {
    "classes missing": ({"classInd": None}, r"has no classInd\.txt; give"),
    "list missing": ({"testlist02": None}, r"has no testlist02\.txt; give"),
    "no classes": ({"classInd": "\r\n"}, r"classInd\.txt: has no classes"),
    "class without a number": ({"classInd": "ApplyEyeMakeup\r\n"}, "classInd.txt, line 1: 'Apply"),
    "class twice": ({"classInd": "1 A\r\n2 A\r\n"}, "line 2: '2 A' is duplicated"),
    "number twice": ({"classInd": "1 A\r\n1 B\r\n"}, "line 2: '1 B' is duplicated"),
    "class that climbs": ({"classInd": "1 ..\r\n"}, "line 1: '..' leads out"),
    "unknown class": (
        {"trainlist01": f"{CLIP} 1\r\nJuggle/a.avi 1\r\n"},
        r"trainlist01\.txt, line 2: the class 'Juggle' is not in classInd\.txt",
    ),
    "another class's number": ({"trainlist01": f"{CLIP} 37\r\n"}, "is 1 in classInd.txt, not 37"),
    "no number": ({"trainlist01": f"{CLIP}\r\n"}, "line 1: .* lacks the number"),
    "no folder": ({"testlist01": "v_a.avi\r\n"}, "line 1: 'v_a.avi' is not <class>/<file>"),
    "twice in a list": ({"trainlist03": f"{CLIP} 1\r\n{CLIP} 1\r\n"}, "line 2: .* is duplicated"),
    "train and test": ({"testlist01": f"{CLIP}\r\n"}, r"testlist01\.txt, line 1: .* is duplicated"),
    "empty": ({"testlist01": ""}, r"testlist01\.txt: has no clips"),
    "no text": ({"testlist01": "a\udcff"}, r"testlist01\.txt: is not a text file"),
    "absolute": ({"testlist01": "/etc/a.avi"}, "line 1: '/etc/a.avi' leads out"),
    "climbs": ({"testlist01": "../a.avi"}, "line 1: '../a.avi' leads out"),
}


@pytest.mark.parametrize(("files", "complaint"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_invalid_lists_are_refused_in_one_line_with_the_place(files, complaint, tmp_path):
    with pytest.raises(DataError, match=complaint) as caught:
        ucf_table(write_lists(tmp_path / "lists", **files))
    assert "\n" not in str(caught.value)


def test_a_csv_table_is_checked(tmp_path):
    row = ("a.avi", "Juggling", 1, 2, 0)
    write_csv(tmp_path / "t.csv", COLUMNS, row)
    assert ucf_table(tmp_path / "t.csv")[0].to_numpy().tolist() == [[*row]]
    for bad, complaint in (
        (("a.avi", "..", 1, 2, 0), "line 3: column label: '..' leads out"),
        (("../a.avi", "B", 1, 2, 0), "line 3: column video_id: .* leads out"),
        (("b.avi", "B", 1, 2, 3), "splits are 0"),
        (row, "line 3: column video_id: 'a.avi' is duplicated"),
    ):
        write_csv(tmp_path / "t.csv", COLUMNS, row, bad)
        with pytest.raises(DataError, match=complaint):
            ucf_table(tmp_path / "t.csv")
