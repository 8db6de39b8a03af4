import pytest

from annotations.tables import read_table
from utils import DataError, escapes_root


def test_tables_keep_words_that_pandas_reads_as_missing_values(tmp_path):
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
    with pytest.raises(DataError, match=rf"table\.csv.*{complaint}"):
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
def test_an_error_has_the_line_of_its_cell(content, line, tmp_path):
    (tmp_path / "table.csv").write_text(content, newline="")
    with pytest.raises(DataError, match=f"line {line}: column start: 'soon' is not"):
        read_table(tmp_path / "table.csv", ["text"], numbers=["start"])


def test_an_error_is_one_short_line_whatever_the_cell_contains(tmp_path):
    (tmp_path / "table.csv").write_text(f'start\n"so\non{"!" * 500}"\n')
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "table.csv", [], numbers=["start"])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_table_whose_rows_have_more_cells_than_the_header_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("video_id,sentence\na,cut, the tomato\nb,cut, it\n")
    with pytest.raises(DataError, match="more cells"):
        read_table(tmp_path / "table.csv", ["video_id", "sentence"])


@pytest.mark.parametrize("name", ["/x", "..", "../x", "x/../y", "x/..", "//", "x\0y"])
def test_a_path_that_leads_out_of_its_folder_is_refused_with_its_line(name, tmp_path):
    assert escapes_root(name)
    (tmp_path / "table.csv").write_text(f"video_path\na/b.mp4\n{name}\n")
    with pytest.raises(DataError, match=r"line 3: column video_path: .* leads out"):
        read_table(tmp_path / "table.csv", [], names=["video_path"])


@pytest.mark.parametrize("name", ["", "x", "x/y", "..x", "x..", "x/...", "./x", "~/x", "x y"])
def test_a_path_inside_its_folder_does_not_escape(name):
    assert not escapes_root(name)


def test_a_missing_table_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_table(tmp_path / "absent.csv", [])
    with pytest.raises(FileNotFoundError):  # which pandas would fetch
        read_table("https://localhost/table.csv", [])
