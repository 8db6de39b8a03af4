"""annotations and data/{youcook,msrvtt,hmdb}/prepare.py: official files to the tables."""

import csv
import importlib.util
import json
import random

import pandas as pd
import pytest

from annotations.hmdb import hmdb_table
from annotations.msrvtt import msrvtt_table, read_ids
from annotations.tables import read_table
from annotations.youcook import youcook_table
from hmdb_loader import HMDB51
from msrvtt_loader import MSRVTT
from s3dg import Tokenizer
from tests.helpers import ROOT, write_csv
from utils import DataError, InputError
from youcook_loader import YouCook2

TOKENIZER = Tokenizer(["cut", "the", "tomato"], 30)
TABLES = {"youcook": "validation_youcook.csv", "msrvtt": "msrvtt_test.csv", "hmdb": "hmdb51.csv"}
READERS = {"youcook": youcook_table, "msrvtt": msrvtt_table, "hmdb": hmdb_table}


def script(name):
    """Load data/<name>/prepare.py as a module."""
    path = ROOT / "data" / name / "prepare.py"
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(name, annotations, out, *flags):
    """Run data/<name>/prepare.py and return the table that it wrote."""
    script(name).main(["--annotations", str(annotations), "--out", str(out), *map(str, flags)])
    numbers = {"youcook": ["start", "end"], "msrvtt": [], "hmdb": ["split1", "split2", "split3"]}
    return read_table(out, [], numbers=numbers[name])


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ---- the official formats, written from our tables -----------------------------------------------


def youcook_json(rows):
    """Make youcookii_annotations_trainval.json with these segments, and a training video."""
    train = [{"segment": [1, 2], "id": 0, "sentence": "stir"}]
    database = {"t0": entry("training", "101", train)}
    for row in rows:
        video = database.setdefault(row["video_id"], entry("validation", row["task"], []))
        segment = [int(row["start"]), int(row["end"])]
        number = len(video["annotations"])
        video["annotations"].append({"segment": segment, "id": number, "sentence": row["text"]})
    return {"database": database}


def entry(subset, recipe, annotations):
    return {
        "duration": 241.62,
        "subset": subset,
        "recipe_type": recipe,
        "annotations": annotations,
        "video_url": "https://www.youtube.com/watch?v=GLd3aX16zBg",
    }


def msrvtt_json(rows, others=2):
    """Make test_videodatainfo.json with these sentences, and a second one for each video."""
    videos = [{"video_id": row["video_id"], "split": "test"} for row in rows]
    videos += [{"video_id": f"video{n}", "split": "train"} for n in range(others)]
    sentences = []
    for kind in (lambda text: text, lambda text: f"not {text}"):
        for row in rows:
            sentences.append({"caption": kind(row["sentence"]), "video_id": row["video_id"]})
    for n in range(others):
        sentences.append({"caption": "to train on", "video_id": f"video{n}"})
    return {
        "info": {"year": "2016"},
        "videos": [
            {"category": 9, "url": "", "id": n, "start time": 1.5, "end time": 9.5, **video}
            for n, video in enumerate(videos)
        ],
        "sentences": [{**sentence, "sen_id": n} for n, sentence in enumerate(sentences)],
    }


def hmdb_splits(folder, rows):
    """Write the folder of split files, in another order than that of the table."""
    folder.mkdir()
    rows = random.Random(1).sample(rows, len(rows))
    for row in rows:
        for k in (1, 2, 3):
            with open(folder / f"{row['label']}_split{k}.txt", "a") as file:
                file.write(f"{row['video_id']} {row[f'split{k}']} \n")
    (folder / "._brush_hair_test_split1.txt").write_bytes(b"\0\xff")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def official(name, folder, rows):
    if name == "hmdb":
        return hmdb_splits(folder / "splits", rows)
    content = youcook_json(rows) if name == "youcook" else msrvtt_json(rows)
    return write_json(folder / f"{name}.json", content)


SAMPLE = {
    "youcook": [
        {"end": "60", "start": "47", "task": "226", "text": "cut", "video_id": "xHr8X2Wpmno"},
        {
            "end": "89",
            "start": "67",
            "task": "226",
            "text": "the tomato",
            "video_id": "xHr8X2Wpmno",
        },
        {"end": "9", "start": "2", "task": "101", "text": "the", "video_id": "-a_b"},
    ],
    "msrvtt": [
        {"key": "ret0", "vid_key": "msr9770", "video_id": "video9770", "sentence": "cut"},
        {"key": "ret1", "vid_key": "msr7020", "video_id": "video7020", "sentence": "the tomato"},
    ],
    "hmdb": [
        {"video_id": n, "label": f"{c}_test", "split1": a, "split2": b, "split3": "0"}
        for n, c, a, b in (
            ("(Rad)_#2!_[x]_0.avi", "climb_stairs", "1", "2"),
            ("a.avi", "climb", "2", "1"),
            ("b.avi", "climb", "0", "1"),
        )
    ],
}


@pytest.fixture(params=TABLES)
def sample(request, tmp_path):
    """Return (name, official file or folder, table) of a small data set."""
    rows = SAMPLE[request.param]
    write_csv(tmp_path / "table.csv", rows[0], *(row.values() for row in rows))
    return request.param, official(request.param, tmp_path, rows), tmp_path / "table.csv"


def test_the_official_files_give_the_table(sample, tmp_path, capsys):
    name, path, table = sample
    written = prepare(name, path, tmp_path / "out.csv")
    pd.testing.assert_frame_equal(written, READERS[name](table)[0])
    pd.testing.assert_frame_equal(written, READERS[name](path)[0])
    assert [p.name for p in tmp_path.glob("out*")] == ["out.csv"]
    assert {
        "youcook": "3 segments of 2 validation videos\nskipped: 1 video of the subset 'train",
        "msrvtt": "2 videos with a sentence each\nskipped: 2 videos not in the test split",
        "hmdb": "3 clips of 2 classes\nsplit1: 1 to train on, 1 to test, 1 in neither\nsplit2: 2",
    }[name] in capsys.readouterr().out


def test_a_table_goes_through_prepare_unchanged(sample, tmp_path):
    """MSRVTT_JSFUSION_test.csv, for example, already has the format."""
    name, _, table = sample
    prepare(name, table, tmp_path / "out.csv")
    assert rows_of(tmp_path / "out.csv") == rows_of(table)


def test_an_existing_table_is_not_overwritten(sample, tmp_path):
    name, path, _ = sample
    (tmp_path / "out.csv").write_text("an earlier table")
    with pytest.raises(InputError, match=r"^--out: .*out\.csv already exists"):
        prepare(name, path, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "an earlier table"


@pytest.mark.parametrize("name", TABLES)
def test_the_real_tables_are_reproduced_to_the_byte(name, tmp_path, shared_csv, capsys):
    table = shared_csv / TABLES[name]
    path = official(name, tmp_path, rows_of(table))
    prepare(name, path, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == table.read_bytes()
    expected = {
        "youcook": "3350 segments of 436 validation videos",
        "msrvtt": "1000 videos with a sentence each",
        "hmdb": "split3: 3570 to train on, 1530 to test, 1666 in neither",
    }
    assert expected[name] in capsys.readouterr().out
    pd.testing.assert_frame_equal(READERS[name](path)[0], READERS[name](table)[0])


ODD = ['say "hi", then cut', "two\nlines", "return\rof carriage", "é 日本", " spaces  ", "null", ""]


@pytest.mark.parametrize("name", ["youcook", "msrvtt"])
def test_captions_with_quotes_newlines_or_no_text_are_preserved(name, tmp_path, capsys):
    text = {"youcook": "text", "msrvtt": "sentence"}[name]
    rows = [{**SAMPLE[name][0], "video_id": f"video{n + 7}", text: t} for n, t in enumerate(ODD)]
    content = youcook_json(rows) if name == "youcook" else msrvtt_json(rows)
    if name == "msrvtt":  # otherwise the second sentence of the video replaces the empty one
        content["sentences"] = content["sentences"][: len(rows)]
    path = write_json(tmp_path / "a.json", content)
    table = prepare(name, path, tmp_path / "out.csv")
    assert table[text].tolist()[:-1] == [t.replace("\r", "\n") for t in ODD[:-1]]
    assert table[text].isna().tolist() == [False] * (len(ODD) - 1) + [True]
    pd.testing.assert_frame_equal(table, READERS[name](path)[0])
    assert "1 empty sentence" in capsys.readouterr().out


# ---- MSR-VTT's lists -----------------------------------------------------------------------------


@pytest.fixture
def msrvtt(tmp_path):
    return write_json(tmp_path / "videodatainfo.json", msrvtt_json(SAMPLE["msrvtt"]))


def test_a_list_picks_the_videos_in_its_order_with_their_first_sentences(msrvtt, tmp_path):
    (tmp_path / "list.txt").write_text("video7020\n\nvideo1\n")  # video1 is a training video
    table, notes = msrvtt_table(msrvtt, read_ids(tmp_path / "list.txt"))
    assert table.to_numpy().tolist() == [
        ["ret0", "msr7020", "video7020", "the tomato"],
        ["ret1", "msr1", "video1", "to train on"],
    ]
    assert notes[0] == "skipped: 2 videos not in the list"
    assert "skipped: 1 sentence, all but the first" in notes[1]


def test_a_list_may_select_the_sentences(msrvtt, tmp_path):
    write_csv(tmp_path / "list.csv", ("video_id", "sentence"), ("video9770", "not cut"))
    table, notes = msrvtt_table(msrvtt, read_ids(tmp_path / "list.csv"))
    assert table["sentence"].tolist() == ["not cut"]
    assert "1 sentence from the list" in notes


def test_the_jsfusion_table_can_be_the_list(msrvtt, tmp_path):
    rows = SAMPLE["msrvtt"]
    write_csv(tmp_path / "list.csv", rows[0], *(row.values() for row in rows))
    table = prepare("msrvtt", msrvtt, tmp_path / "out.csv", "--ids", tmp_path / "list.csv")
    assert table.to_dict("records") == rows


def test_without_a_list_a_note_warns_that_the_videos_are_not_1k_a(msrvtt):
    assert any("not the 1,000 of most papers" in note for note in msrvtt_table(msrvtt)[1])


def test_the_first_sentence_that_is_not_empty_is_used(tmp_path):
    content = msrvtt_json(SAMPLE["msrvtt"])
    content["sentences"][0]["caption"] = ""
    table, _ = msrvtt_table(write_json(tmp_path / "a.json", content))
    assert table["sentence"].tolist() == ["not cut", "the tomato"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("video7020\nvideo9770\nvideo7020\n", r"list, line 3: 'video7020' is duplicated"),
        ("video7020\nvideo5\nvideo6\n", "json: .* 2 of the 3 videos .* first is 'video5'"),
        (
            '{"some": "' + "long line" * 10_000 + '"}',
            "json: .* 1 of the 1 videos .* first is .{100}; give",
        ),
        ("video7020\n../video5\n", r"list, line 2: '../video5' leads out"),
        ("video_id\nvideo7020\n/video5\n", r"list, line 3: column video_id: '/video5' leads out"),
        ("video_id\nvideo7020\nvideo7020\n", "list, line 3: .*duplicated"),
        ("video_id,sentence\n,cut\n", "list, line 2: .*is empty"),
        ("\n\n", "lists no videos"),
        ("video\udcff", "not a text file"),
    ],
)
def test_unusable_lists_are_refused(content, complaint, msrvtt, tmp_path):
    (tmp_path / "list").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=complaint) as caught:
        msrvtt_table(msrvtt, read_ids(tmp_path / "list"))
    assert len(str(caught.value)) < 800


def test_a_list_is_refused_with_a_table(tmp_path):
    rows = SAMPLE["msrvtt"]
    write_csv(tmp_path / "table.csv", rows[0], *(row.values() for row in rows))
    with pytest.raises(DataError, match=r"table\.csv: .* give a list with a JSON only"):
        msrvtt_table(tmp_path / "table.csv", {"video1": None})


# ---- evaluations take the official files ---------------------------------------------------------


def test_the_data_sets_take_the_official_files(sample, tmp_path):
    name, path, table = sample
    root = tmp_path / "root"
    one_video = {
        "youcook": "root/validation/226/xHr8X2Wpmno.mkv",
        "msrvtt": "root/video7020.mp4",
        "hmdb": "root/climb/b.avi",
    }[name]
    (tmp_path / one_video).parent.mkdir(parents=True)
    (tmp_path / one_video).touch()
    if name == "hmdb":
        found, expected = (HMDB51(READERS[name](source)[0], root) for source in (path, table))
        assert found.names == expected.names == ["climb/b.avi"]
        assert len(found.absent) == len(expected.absent) == 2
        assert found.labels.tolist() == ["climb"]
        assert found.splits.tolist() == expected.splits.tolist() == [[0, 1, 0]]
    else:
        kind = {"youcook": YouCook2, "msrvtt": MSRVTT}[name]
        found, expected = (
            kind(READERS[name](source)[0], root, TOKENIZER) for source in (path, table)
        )
        assert found.pairs == expected.pairs
        assert found.num_missing == expected.num_missing == 1  # in the table, but absent


# ---- invalid files -------------------------------------------------------------------------------


def change(content, *keys, to=None):
    """Return the content with one nested value replaced, or removed if `to` is None."""
    content = json.loads(json.dumps(content))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if to is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = to
    return json.dumps(content).encode()


Y, M = youcook_json(SAMPLE["youcook"]), msrvtt_json(SAMPLE["msrvtt"])
FIRST = ("database", "xHr8X2Wpmno")
SEGMENT = (*FIRST, "annotations", 1)
BAD_JSON = {
    "empty": (b"", "not JSON"),
    "a web page": (b"<html>", "not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "not JSON"),
    "nested to the bottom": (b"[" * 100_000, "not JSON"),
    "a list": (b"[]", "has no '(database|videos)'"),
    "a number": (b"3", "has no '(database|videos)'"),
    "another object": (b'{"a\\nb": 1}', r"has no '(database|videos)' \(its keys: .*a"),
}
BAD_YOUCOOK = {
    **BAD_JSON,
    "cut short": (json.dumps(Y).encode()[:-9], "not JSON"),
    "MSR-VTT's": (json.dumps(M).encode(), "has no 'database'"),
    "a list of videos": (change(Y, "database", to=[]), "'database' is '.*', not an object"),
    "a video that is a text": (change(Y, *FIRST, to="x"), "video 'xHr8X2Wpmno': has no 'subset'"),
    "no subset": (change(Y, *FIRST, "subset"), "video 'xHr8X2Wpmno': has no 'subset'"),
    "no recipe": (change(Y, *FIRST, "recipe_type"), "video 'xHr8X2Wpmno': has no 'recipe_type'"),
    "recipe that is true": (change(Y, *FIRST, "recipe_type", to=True), "'recipe_type' is 'True'"),
    "no annotations": (change(Y, *FIRST, "annotations"), "has no 'annotations'"),
    "no sentence": (change(Y, *SEGMENT, "sentence"), "annotation 2: has no 'sentence'"),
    "invalid sentence": (
        change(Y, *SEGMENT, "sentence", to=[]),
        "'sentence' is '.*not a string",
    ),
    "half a character": (change(Y, *SEGMENT, "sentence", to="\ud800"), "annotation 2: .*Unicode"),
    "one time": (change(Y, *SEGMENT, "segment", to=[1]), r"annotation 2: 'segment' is '\[1\]'"),
    "times as texts": (change(Y, *SEGMENT, "segment", to=["1", "2"]), "annotation 2: 'segment'"),
    "time before": (change(Y, *SEGMENT, "segment", to=[-1, 2]), "annotation 2: 'segment'"),
    "endless time": (change(Y, *SEGMENT, "segment", to=[1, 10**400]), "annotation 2: 'segment'"),
    "time not a number": (
        b'{"database": {"a": {"subset": "validation", "recipe_type": "1", '
        b'"annotations": [{"segment": [NaN, 1], "sentence": "a"}]}}}',
        "annotation 1: 'segment'",
    ),
    "no validation": (
        change({"database": {"a": entry("training", "1", [])}, "b": 1}, "b"),
        "no annotations of val",
    ),
    "duplicate id": (b'{"database": {"a": {}, "b": {}, "a": {}}}', "key 'a' is duplicated"),
    "absolute id": (
        json.dumps(youcook_json([{**SAMPLE["youcook"][0], "video_id": "/a"}])).encode(),
        "video '/a': '/a' leads out",
    ),
    "id that climbs": (
        json.dumps(youcook_json([{**SAMPLE["youcook"][0], "video_id": "a/../b"}])).encode(),
        "'a/../b' leads out",
    ),
    "recipe that climbs": (change(Y, *FIRST, "recipe_type", to=".."), "'..' leads out"),
    "empty recipe": (change(Y, *FIRST, "recipe_type", to=""), "a name is empty"),
}
BAD_MSRVTT = {
    **BAD_JSON,
    "YouCook2's": (json.dumps(Y).encode(), "has no 'videos'"),
    "no sentences": (change(M, "sentences"), "has no 'sentences'"),
    "videos by name": (change(M, "videos", to={}), "'videos' is '{}', not a list"),
    "video without id": (
        change(M, "videos", 1, "video_id"),
        "entry 2 of videos: has no 'video_id'",
    ),
    "number as id": (change(M, "videos", 1, "video_id", to=7), "entry 2 of videos: .* not a str"),
    "no split": (change(M, "videos", 1, "split"), "entry 2 of videos: has no 'split'"),
    "sentence without video": (change(M, "sentences", 2, "video_id"), "entry 3 of sentences: has"),
    "sentence without text": (change(M, "sentences", 2, "caption"), "entry 3 of sentences: has no"),
    "duplicate id": (change(M, "videos", 1, "video_id", to="video9770"), "entry 2 .*dupl"),
    "absolute id": (change(M, "videos", 1, "video_id", to="/etc/x"), "'/etc/x' leads out"),
    "id that climbs": (change(M, "videos", 1, "video_id", to="../x"), "'../x' leads out"),
    "video without sentences": (
        change(M, "videos", 1, "video_id", to="v"),
        r"1 of .*first is 'v'\)",
    ),
    "nothing to test": (json.dumps(msrvtt_json([])).encode(), "no video of the test split"),
}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        *(
            pytest.param("youcook", *case, id=f"youcook: {why}")
            for why, case in BAD_YOUCOOK.items()
        ),
        *(pytest.param("msrvtt", *case, id=f"msrvtt: {why}") for why, case in BAD_MSRVTT.items()),
    ],
)
def test_an_invalid_json_is_refused_in_one_line_with_the_place(name, content, complaint, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: .*{complaint}") as caught:
        READERS[name](path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    with pytest.raises(InputError, match=rf"^--annotations: .*a\.json.*{complaint}"):
        prepare(name, path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


BAD_SPLITS = {
    "invalid part": ({"wave_test_split2.txt": "a.avi 3\n"}, "split2.txt, line 1: 'a.avi 3'"),
    "no part": ({"wave_test_split2.txt": "b.avi 1\na.avi\n"}, "split2.txt, line 2: 'a.avi'"),
    "twice": ({"wave_test_split1.txt": "a.avi 1\n\na.avi 1\n"}, "split1.txt, line 3: .*duplicated"),
    "lists differ": ({"wave_test_split3.txt": "b.avi 1\n"}, "split3.txt: lacks 'a.avi'"),
    "one too few": (
        {"wave_test_split1.txt": "b.avi 1\na.avi 1"},
        "split2.txt: lacks 'b.avi'",
    ),
    "empty": ({"wave_test_split1.txt": ""}, "split1.txt: has no clips"),
    "no text": ({"wave_test_split1.txt": "a\udcff.avi 1"}, "split1.txt: is not a text file"),
    "file missing": ({"wave_test_split2.txt": None}, "has no wave_test_split2.txt"),
    "absolute": ({"wave_test_split1.txt": "/etc/a.avi 1"}, "line 1: '/etc/a.avi' leads out"),
    "climbs": ({"wave_test_split1.txt": "../a.avi 1"}, "line 1: '../a.avi' leads out"),
    "class that climbs": ({".._test_split1.txt": "a.avi 1"}, None),  # a hidden file is skipped
}


@pytest.mark.parametrize(("files", "complaint"), BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_invalid_split_files_are_refused(files, complaint, tmp_path):
    good = {f"wave_test_split{k}.txt": "a.avi 1 \n" for k in (1, 2, 3)}
    for name, content in {**good, **files}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    if complaint is None:
        assert len(hmdb_table(tmp_path)[0]) == 1
        return
    with pytest.raises(DataError, match=complaint) as caught:
        hmdb_table(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_split_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="no files such as"):
        hmdb_table(tmp_path)
    with pytest.raises(IsADirectoryError):
        youcook_table(tmp_path)


# ---- tables stay in their folders ----------------------------------------------------------------

OUTSIDE = ["/etc/passwd", "..", "../x", "a/../../x", "a/..", "/", "a\0b"]
COLUMNS = {
    "youcook": [("video_id", "{}"), ("task", "{}")],
    "msrvtt": [("video_id", "{}")],
    "hmdb": [("video_id", "{}"), ("label", "{}_test"), ("label", "{}")],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_rows_is_refused(name, tmp_path):
    write_csv(tmp_path / "t.csv", SAMPLE[name][0])
    with pytest.raises(DataError, match=r"t\.csv: has no rows"):
        READERS[name](tmp_path / "t.csv")


def test_a_class_without_a_name_is_refused(tmp_path):
    """Otherwise its clips would be looked up at the root of the file system."""
    row = {**SAMPLE["hmdb"][0], "label": "_test"}
    write_csv(tmp_path / "t.csv", row, row.values())
    with pytest.raises(DataError, match="line 2: column label: the cell is empty"):
        hmdb_table(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "column", "form"),
    [(name, *column) for name, columns in COLUMNS.items() for column in columns],
)
def test_a_table_cannot_name_files_outside_the_folder(name, column, form, tmp_path):
    rows = SAMPLE[name]
    for outside in OUTSIDE:
        bad = {**rows[1], column: form.format(outside)}
        write_csv(tmp_path / "t.csv", rows[0], rows[0].values(), bad.values())
        match = rf"t\.csv, line 3: column {column}: .* leads out of"
        with pytest.raises(DataError, match=match) as caught:
            READERS[name](tmp_path / "t.csv")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("video_id", ["a..b", "..a", "a/b", "...", "-a", "~", "a b", "日本"])
def test_odd_names_inside_the_folder_are_accepted(video_id, tmp_path):
    rows = [{**SAMPLE["msrvtt"][0], "video_id": video_id}]
    write_csv(tmp_path / "t.csv", rows[0], *(row.values() for row in rows))
    assert msrvtt_table(tmp_path / "t.csv")[0]["video_id"].tolist() == [video_id]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_with_an_empty_id_is_refused(name, tmp_path):
    rows = SAMPLE[name]
    write_csv(tmp_path / "t.csv", rows[0], {**rows[1], "video_id": ""}.values())
    with pytest.raises(DataError, match="line 2: column video_id: the cell is empty"):
        READERS[name](tmp_path / "t.csv")


@pytest.mark.parametrize("name", ["msrvtt", "hmdb"])
def test_a_table_with_a_duplicate_video_is_refused(name, tmp_path):
    rows = [*SAMPLE[name], SAMPLE[name][0]]
    write_csv(tmp_path / "t.csv", rows[0], *(row.values() for row in rows))
    line = len(rows) + 1
    with pytest.raises(DataError, match=rf"t\.csv, line {line}: column video_id: .*duplicated"):
        READERS[name](tmp_path / "t.csv")
