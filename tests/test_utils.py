import json

import numpy as np
import pytest
import torch
from conftest import golden_json

from args import get_args
from utils import (
    InputError,
    check_compiler,
    check_output,
    leads_outside,
    lr_multiplier,
    pick_device,
    read_table,
    read_words,
    report,
    run_script,
    to_unit_range,
    write_whole,
)


@pytest.mark.parametrize("case", golden_json("misc")["schedule"])
def test_schedule_matches_the_golden_multipliers(case):
    for step, expected in case["multiplier"].items():
        value = lr_multiplier(int(step), case["warmup_steps"], case["total_steps"])
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_input_error_is_one_line_and_status_2(capsys):
    def main():  # as a DataLoader passes on what its worker raised
        raise InputError("--flag: wrong")

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --flag: wrong\n"


def test_tables_keep_words_that_pandas_takes_for_missing(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('text,start\n"null",1\n"None",2.5\n,3\n"NA",4\n')
    table = read_table(path, ["text"], numbers=["start"])
    assert table["text"].tolist()[:2] == ["null", "None"] and table["text"][3] == "NA"
    assert table["text"].isna().tolist() == [False, False, True, False]
    assert table["start"].tolist() == [1, 2.5, 3, 4]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a,b\n1,2\n", "no column text"),
        (b"", "not a CSV"),
        (b"text,start\nhello,soon\n", "column start"),
        (b"text,start\nhello,\n", "column start"),
        (b"text,start\n\xff\xfe\x00,1\n", "not a CSV"),
    ],
)
def test_unusable_tables_are_refused_by_name(tmp_path, content, complaint):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"--eval_csv: .*table\.csv.*{complaint}"):
        read_table(path, ["text"], numbers=["start"])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("text,start\na,1\nb,soon\n", 3),
        ('text,start\n"two\nlines",1\nb,soon\n', 4),
        ('\n\ntext,start\r\n\r\na,1\r\n  \r\n"b\r\nc",soon\r\n', 7),
        ("\ufefftext,start\nb,soon\n", 2),
        (f"text,start\n{'a' * 200_000},1\nb,soon\n", 3),
    ],
)
def test_a_fault_is_told_by_its_line(content, line, tmp_path):
    (tmp_path / "table.csv").write_text(content, newline="")
    with pytest.raises(InputError, match=f"line {line}, column start: 'soon' is not"):
        read_table(tmp_path / "table.csv", ["text"], numbers=["start"])


def test_a_fault_is_one_line_whatever_the_cell_holds(tmp_path):
    (tmp_path / "table.csv").write_text(f'start\n"so\non{"!" * 500}"\n')
    with pytest.raises(InputError) as caught:
        read_table(tmp_path / "table.csv", [], numbers=["start"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_rows_with_more_cells_than_the_header_are_no_table(tmp_path):
    (tmp_path / "table.csv").write_text("video_id,sentence\na,cut, the tomato\nb,cut, it\n")
    with pytest.raises(InputError, match="more cells"):
        read_table(tmp_path / "table.csv", ["video_id", "sentence"])


@pytest.mark.parametrize("name", ["/x", "..", "../x", "x/../y", "x/..", "//", "x\0y"])
def test_a_path_that_leads_out_of_its_folder_is_refused_by_line(name, tmp_path):
    assert leads_outside(name)
    (tmp_path / "table.csv").write_text(f"video_path\na/b.mp4\n{name}\n")
    with pytest.raises(InputError, match=r"--train_csv: .*line 3, column video_path: .* leads out"):
        read_table(tmp_path / "table.csv", [], names=["video_path"], flag="train_csv")


@pytest.mark.parametrize("name", ["", "x", "x/y", "..x", "x..", "x/...", "./x", "~/x", "x y"])
def test_a_path_that_stays_in_its_folder_is_not(name):
    assert not leads_outside(name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="full"), write_whole(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with write_whole(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_absent_files_are_refused_by_flag_and_name(tmp_path):
    with pytest.raises(InputError, match=r"--eval_csv.*absent\.csv"):
        read_table(tmp_path / "absent.csv", [])
    args = get_args(argv=["--token_to_word_path", str(tmp_path / "absent.npy")])
    with pytest.raises(InputError, match=r"--token_to_word_path.*absent\.npy"):
        read_words(args)


def test_a_pickled_word_list_is_refused(tmp_path):
    np.save(tmp_path / "dict.npy", np.array(["a", None], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"--token_to_word_path.*dict\.npy"):
        read_words(get_args(argv=["--token_to_word_path", str(tmp_path / "dict.npy")]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    assert pick_device(get_args(argv=["--device", "auto"])).type == "cpu"
    with pytest.raises(InputError, match="--device"):
        pick_device(get_args(argv=["--device", "cuda"]))


def test_clips_travel_as_bytes_and_become_unit_floats():
    clips = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    torch.testing.assert_close(clips, torch.tensor([0, 0.2, 1.0]))


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="--compile"):
        check_compiler()


def test_figures_are_printed_and_written(tmp_path, capsys):
    figures = {"R1": 0.25, "num_videos": 4}
    report("Toy", figures, str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == figures
    assert "R1 0.25" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(InputError, match="--output"):
        check_output(str(tmp_path / "absent" / "out.json"))
    with pytest.raises(InputError, match="--out"):  # of a shell variable that is not set
        check_output("", "out")
    check_output(str(tmp_path / "out.json"))
