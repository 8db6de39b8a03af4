"""data/howto100m/prepare.py: make a caption store and a video list from published captions."""

import importlib.util
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tracemalloc

import psutil
import pytest

from annotations.tables import read_table
from captions import sources as caption_source
from captions.readers import CaptionFolder, CaptionStore, open_captions
from tests.helpers import ROOT, make_video, pack_folder, write_csv
from utils import InputError, run_script

SCRIPT = ROOT / "data" / "howto100m" / "prepare.py"
sys.path.insert(0, str(SCRIPT.parent))  # of transcode.py
spec = importlib.util.spec_from_file_location("howto100m_prepare", SCRIPT)  # other data sets have
prepare = importlib.util.module_from_spec(spec)  # a prepare.py, too
sys.modules["howto100m_prepare"] = prepare  # where its processes look for what to run
spec.loader.exec_module(prepare)

ROWS = {
    "v-1": [(0, 1.5, "hi"), (3.8999999999999986, 3, 'say "hi",\nthere'), (5, 6, ""), (-1, 2, "x")],
    "_B2": [(0.1, 0.30000000000000004, "null"), (2, 3, "größe 🙂 nan"), (None, 3, "no start")],
    "none": [(-1, 2, "before"), (3, None, "no end")],
}
USABLE = ["v-1", "_B2"]


@pytest.fixture
def captions(tmp_path):
    """Write the same captions as a folder and as the JSON file, of videos in one folder."""
    (tmp_path / "csv").mkdir()
    for name, rows in ROWS.items():
        write_csv(tmp_path / "csv" / f"{name}.csv", ("", "start", "end", "text"), *numbered(rows))
    columns = {name: dict(zip(("start", "end", "text"), zip(*ROWS[name]))) for name in ROWS}  # noqa: B905
    (tmp_path / "all.json").write_text(json.dumps(columns))
    return tmp_path


def numbered(rows):
    return [(number, *row) for number, row in enumerate(rows)]


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_captions(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_csv(root / f"{name}.csv", ("start", "end", "text"), (0, 1, name))


def pack(source, out, *more):
    prepare.main(["pack", "--caption_root", str(source), "--out", str(out), *more])
    return CaptionStore(out)


def list_videos(videos, captions, out, *more):
    flags = ["--video_path", videos, "--caption_root", captions, "--out", out, *more]
    prepare.main(["list", *map(str, flags)])
    return read_table(out, ["video_path"])["video_path"].tolist()


def lists(captions):
    starts, ends, texts = captions
    return starts.tolist(), ends.tolist(), texts


def written(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["csv", "all.json"])
def test_a_store_has_the_same_captions_as_the_folder(captions, source, capsys):
    folder, store = CaptionFolder(captions / "csv"), pack(captions / source, captions / "store")
    assert len(store) == 2
    for name in USABLE:
        assert lists(store.read(f"{name}.mp4")) == lists(folder.read(f"{name}.mp4"))
    assert not store.has("none.mp4")
    printed = capsys.readouterr()
    assert printed.out.endswith("5 captions of 2 videos; 1 video without usable captions\n")
    assert "skipped: " in printed.err and "none" in printed.err


def test_missing_values_in_json_are_nan_or_null(tmp_path):
    for missing in ("NaN", "null"):
        times, texts = f'"start": [1, 2, {missing}], "end": [3, 4, 5]', f'["x", {missing}, "y"]'
        (tmp_path / "all.json").write_text(f'{{"a": {{{times}, "text": {texts}}}}}')
        store = pack(tmp_path / "all.json", tmp_path / missing)
        assert lists(store.read("a.mp4")) == ([1, 2], [3, 4], ["x", ""])


def test_a_lone_surrogate_is_replaced(tmp_path):
    text = r'{"a": {"start": [1], "end": [2], "text": ["one\ud83dtwo \ud83d\ude42"]}}'
    (tmp_path / "all.json").write_text(text)
    assert pack(tmp_path / "all.json", tmp_path / "out").read("a.mp4")[2] == ["one?two 🙂"]


def test_captions_of_videos_in_folders_are_found_by_path_and_with_by_id_by_name(tmp_path):
    write_captions(tmp_path / "csv", "a", "x/b")
    strict = pack(tmp_path / "csv", tmp_path / "strict")
    by_id = pack(tmp_path / "csv", tmp_path / "by_id", "--by_id")
    for video, found in {
        "a.mp4": (1, 1),
        "x/b.mp4": (1, 1),
        "b.mp4": (0, 1),
        "y/a.mp4": (0, 1),
    }.items():
        folder = CaptionFolder(tmp_path / "csv")
        assert (strict.has(video), by_id.has(video)) == found
        assert folder.has(video) == strict.has(video)


def test_captions_of_the_json_file_are_found_by_id(captions):
    store = pack(captions / "all.json", captions / "store")
    assert store.has("v-1.mp4") and store.has("some/folder/v-1.webm")


def test_unreadable_caption_files_are_reported_and_skipped(captions, capsys):
    (captions / "csv" / "latin.csv").write_bytes(b"start,end,text\n0,1,caf\xe9\n")
    (captions / "csv" / "empty.csv").touch()
    (captions / "csv" / "notes.txt").touch()
    with open(os.fsencode(captions / "csv") + b"/caf\xe9.csv", "w") as file:
        file.write("start,end,text\n0,1,a\n")
    assert len(pack(captions / "csv", captions / "store", "--num_workers", "2")) == 2
    printed = capsys.readouterr()
    assert "4 videos without usable captions" in printed.out
    for named in ("latin.csv", "empty.csv", "none.csv", r"caf\xe9.csv"):
        assert named in printed.err
    assert printed.err.count("skipped: ") == 4


WHISPER = {"segments": [{"start": 1, "end": 2, "text": "hi"}]}


def test_a_store_records_its_origin_and_skipped_videos_are_counted(tmp_path, capsys):
    write_captions(tmp_path / "in", "csv")
    for name, language in {"a": "en", "b": "en", "c": "de", "d": "ja", "e": "de"}.items():
        content = json.dumps({**WHISPER, "language": language})
        (tmp_path / "in" / f"{name}.json").write_text(content)
    (tmp_path / "in" / "f.en.vtt").write_text("<html>")
    store = pack(tmp_path / "in", tmp_path / "store", "--num_workers", "1")
    assert sorted(store.names) == ["a", "b", "csv"]
    origin = json.loads((tmp_path / "store" / "caption_store.json").read_text())["origin"]
    formats = {"Whisper JSON": 2, "CSV": 1}
    assert origin == {"source": str(tmp_path / "in"), "formats": formats, "language": "en"}
    assert store.origin == f"packed from {tmp_path}/in: 2 Whisper JSON, 1 CSV; language en"
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"{tmp_path}/store: 3 captions of 3 videos; 1 video without usable captions",
        "skipped: 3 videos in other languages (de 2, ja 1)",
    ]
    assert printed.err.count("skipped: ") == 1 and "f.en.vtt: is HTML" in printed.err
    assert len(pack(tmp_path / "in", tmp_path / "german", "--language", "de")) == 3  # and the CSV


def test_a_source_without_captions_in_the_language_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_text(json.dumps({**WHISPER, "language": "de"}))
    with pytest.raises(
        InputError, match=r"--caption_root: .*1 video in other languages \(de 1\); .* --language"
    ):
        pack(tmp_path / "in", tmp_path / "store")
    assert written(tmp_path) == ["in"]


def test_htm_aas_file_is_packed_by_id(tmp_path):
    rows = [("a", 4.5, "x"), ("b", 1, "y"), ("a", 2, "z")]
    write_csv(tmp_path / "htm_aa.csv", ("vid", "timestamp", "text"), *rows)
    store = pack(tmp_path / "htm_aa.csv", tmp_path / "store")
    assert lists(store.read("some/folder/a.mp4")) == ([2, 4.5], [2, 4.5], ["z", "x"])


def test_file_names_may_have_any_characters(tmp_path):
    names = [
        "a b",
        "-x",
        "größe/日本🙂",
        "q\"u,o'te",
        "line\nend",
        "dots.in.it",
        ".hidden",
        "a%20#?*",
    ]
    write_captions(tmp_path / "csv", *names)
    store = pack(tmp_path / "csv", tmp_path / "store")
    assert [store.read(f"{name}.mp4")[2] for name in names] == [[name] for name in names]


def test_by_id_two_files_with_the_same_id_are_refused(tmp_path):
    write_captions(tmp_path / "csv", "x/a", "y/a")
    assert len(pack(tmp_path / "csv", tmp_path / "store")) == 2
    with pytest.raises(InputError, match=r"--caption_root: .*csv: x/a\.csv and y/a\.csv"):
        pack(tmp_path / "csv", tmp_path / "other", "--by_id")


GOOD = '"a": {"start": [1], "end": [2], "text": ["x"]}'
WRONG = {
    "": "cut short, at character 0",
    "{": "cut short",
    f"{{{GOOD}": "cut short, at character 47",
    f"{{{GOOD},": "cut short",
    f'{{{GOOD}, "b': "cut short",
    f'{{{GOOD}, "b": {{"start": [1, 2, 3.5], "end": ["': "cut short",
    f'{{{GOOD}, "b": {{"start": [1, 2, 3.': "Expecting ',' delimiter, at character 72",
    "PK\3\4": "Expecting '{', at character 0",
    "start,end,text\n0,1,a\n": "Expecting '{'",
    f"[{{{GOOD}}}]": "Expecting '{'",
    '"a"': "Expecting '{'",
    f"{{{GOOD},}}": "name in quotes, at character 48",
    f"{{{GOOD} {GOOD}}}": "Expecting ',' or '}', at character 48",
    f"{{{GOOD}}} {{": "text follows",
    f"{{{GOOD}, b: 1}}": "name in quotes",
    '{"a" 1}': "Expecting ':'",
    '{"a": [1}': "Expecting ',' delimiter",
    '{"a": ' + "[" * 100_000 + "}": "recursion",
    '{"a": {"start": [' + "1" * 5000 + '], "end": [2], "text": ["x"]}}': "4300 digits",
    f"{{{GOOD}, {GOOD}}}": "video 'a' is duplicated",
    '{"a": 1}': "video 'a' lacks the lists",
    '{"a": null}': "video 'a' lacks the lists",
    '{"a": [1, 2]}': "video 'a' lacks the lists",
    '{"a": {"start": [1], "end": [2]}}': "video 'a' lacks the lists",
    '{"a": {"start": 1, "end": 2, "text": "x"}}': "video 'a' lacks the lists",
    '{"a": {"start": [1, 2], "end": [2], "text": ["x"]}}': "video 'a' have lengths 2, 1, 1",
    '{"a": {"start": [[1]], "end": [2], "text": ["x"]}}': "a time of video 'a'",
    '{"a": {"start": ["1s"], "end": [2], "text": ["x"]}}': "a time of video 'a'",
    '{"a": {"start": [{}], "end": [2], "text": ["x"]}}': "a time of video 'a'",
    '{"a": {"start": [1' + "0" * 400 + '], "end": [2], "text": ["x"]}}': "a time of video 'a'",
    '{"a": {"start": [1], "end": [2], "text": [3]}}': "a text of video 'a'",
    '{"a": {"start": [1], "end": [2], "text": [["x"]]}}': "a text of video 'a'",
    r'{"\ud83d": {"start": [1], "end": [2], "text": ["x"]}}': "surrogates not allowed",
}


@pytest.mark.parametrize(("text", "reason"), WRONG.items(), ids=range(len(WRONG)))
def test_an_invalid_json_file_is_refused_in_one_line_with_the_reason(tmp_path, text, reason):
    (tmp_path / "all.json").write_text(text)
    with pytest.raises(InputError, match=r"^--caption_root: .*all\.json: is not a JSON") as refused:
        pack(tmp_path / "all.json", tmp_path / "store")
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert written(tmp_path) == ["all.json"]


def test_a_json_file_that_is_not_utf_8_is_refused(tmp_path):
    (tmp_path / "all.json").write_bytes(b'{"a": {"start": [1], "end": [2], "text": ["\xff"]}}')
    with pytest.raises(InputError, match=r"--caption_root: .*not UTF-8"):
        pack(tmp_path / "all.json", tmp_path / "store")


@pytest.mark.parametrize("source", ["{}", '{"a": {"start": [], "end": [], "text": []}}'])
def test_a_json_file_without_captions_is_refused(tmp_path, source):
    (tmp_path / "all.json").write_text(source)
    with pytest.raises(InputError, match=r"--caption_root: .*all\.json: has no captions"):
        pack(tmp_path / "all.json", tmp_path / "store")
    with pytest.raises(InputError, match=r"--caption_root: .*all\.json: has no captions"):
        touch(tmp_path, "a.mp4")
        list_videos(tmp_path, tmp_path / "all.json", tmp_path / "list.csv")
    assert written(tmp_path) == ["a.mp4", "all.json"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_json_file_may_be_cut_into_chunks_anywhere(captions, monkeypatch, chunk):
    text = json.dumps(json.loads((captions / "all.json").read_text()), indent=2, ensure_ascii=False)
    text = f"\n {text}\r\n\t "
    whole = list(caption_source.json_members(io.StringIO(text)))
    assert dict(whole) == json.loads(text) and len(whole) == len(ROWS)
    monkeypatch.setattr(caption_source, "JSON_CHUNK", chunk)
    assert list(caption_source.json_members(io.StringIO(text))) == whole


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "all.json").write_text(f"\ufeff{{{GOOD}}}")
    assert pack(tmp_path / "all.json", tmp_path / "store").has("a.mp4")


def test_one_video_of_a_json_file_is_in_memory_at_a_time(monkeypatch):
    monkeypatch.setattr(caption_source, "JSON_CHUNK", 1 << 16)
    value = {"start": [0.5] * 100, "end": [1.5] * 100, "text": ["one two three"] * 100}
    text = io.StringIO(json.dumps({f"video{i}": value for i in range(3000)}))
    tracemalloc.start()
    try:
        assert sum(1 for _ in caption_source.json_members(text)) == 3000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(text.getvalue()) / 8


def test_an_error_at_the_beginning_is_found_without_reading_the_whole_file(monkeypatch):
    monkeypatch.setattr(caption_source, "JSON_CHUNK", 1 << 10)
    monkeypatch.setattr(caption_source, "LARGEST_VIDEO", 1 << 12)
    file = io.StringIO('{"a": [1}' + " " * (1 << 20))
    with pytest.raises(ValueError, match="Expecting ',' delimiter, at character 8"):
        list(caption_source.json_members(file))
    assert file.tell() < 1 << 14


# ---- list ----------------------------------------------------------------------------------------

VIDEOS = ["x/b.webm", "a.mp4", "x/y/c.MKV", "d.mp4", "notes.txt", "e.mp4.part", "f.csv"]


@pytest.fixture
def pairs(tmp_path):
    touch(tmp_path / "videos", *VIDEOS)
    write_captions(tmp_path / "csv", "a", "x/b", "x/y/c", "y/d", "z")
    pack(tmp_path / "csv", tmp_path / "store")
    return tmp_path


@pytest.mark.parametrize("captions", ["csv", "store"])
def test_the_list_has_the_videos_with_captions_in_order_and_counts_the_rest(
    pairs, captions, capsys
):
    capsys.readouterr()
    listed = list_videos(pairs / "videos", pairs / captions, pairs / "list.csv")
    assert listed == ["a.mp4", "x/b.webm", "x/y/c.MKV"]
    captions = open_captions(pairs / captions)
    assert all(map(captions.has, listed))
    assert capsys.readouterr().out.splitlines() == [
        f"{pairs / 'list.csv'}: 3 videos with captions",
        "skipped: 1 video without captions, such as d.mp4",
        "skipped: 2 videos with captions but without a file, such as y/d",
    ]


@pytest.mark.parametrize("by_id", ["all.json", "store"])
def test_by_id_videos_in_any_folder_are_paired(captions, capsys, by_id):
    touch(captions / "videos", "0/v-1.mp4", "1/2/_B2.webm", "none.mp4", "other.mp4")
    pack(captions / "all.json", captions / "store")
    capsys.readouterr()
    listed = list_videos(captions / "videos", captions / by_id, captions / "list.csv")
    assert listed == ["0/v-1.mp4", "1/2/_B2.webm"]
    printed = capsys.readouterr().out
    assert "2 videos without captions, such as none.mp4\n" in printed
    assert ("1 video whose captions are unusable, such as none" in printed) == (by_id != "store")


def test_captions_that_only_by_id_would_find_are_reported(tmp_path, capsys):
    touch(tmp_path / "videos", "0/a.mp4", "b.mp4", "c.mp4")
    write_captions(tmp_path / "csv", "a", "b")
    assert list_videos(tmp_path / "videos", tmp_path / "csv", tmp_path / "list.csv") == ["b.mp4"]
    hint = "2 videos without captions, such as 0/a.mp4 (1 would match by file name alone; pack"
    assert hint in capsys.readouterr().out
    (tmp_path / "videos" / "b.mp4").unlink()
    with pytest.raises(InputError, match=r"--caption_root: none of 2 videos .*--by_id"):
        list_videos(tmp_path / "videos", tmp_path / "csv", tmp_path / "other.csv")


def test_videos_in_tar_files_are_listed_and_paired_by_their_ids(tmp_path, milnce_log):
    videos, ids = tmp_path / "videos", ["a", "b", "c"]
    touch(tmp_path / "files", *(f"{name}.{kind}" for name in ids for kind in ("mp4", "json")))
    pack_folder(tmp_path / "files", videos / "00000.tar", ["b.mp4", "b.json", "a.mp4"])
    pack_folder(tmp_path / "files", videos / "sub/00001.tar", ["c.mp4", "c.json", "c.mp4"])
    pack_folder(tmp_path / "files", videos / "00002.tar", ["c.mp4"])
    touch(videos, "d.mp4", "empty.tar")
    write_captions(tmp_path / "csv", *ids, "d")
    pack(tmp_path / "csv", tmp_path / "store", "--by_id")
    found = list_videos(videos, tmp_path / "store", tmp_path / "list.csv")
    assert found == ["00000.tar/a.mp4", "00000.tar/b.mp4", "00002.tar/c.mp4", "d.mp4"]
    assert "sub/00001.tar/c.mp4: is in the shard more than once" in milnce_log.text
    assert "empty.tar: is not a tar file" in milnce_log.text
    found = list_videos(videos / "00000.tar", tmp_path / "csv", tmp_path / "one.csv")
    assert found == ["a.mp4", "b.mp4"]


def test_links_to_files_and_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "disk1", "a.mp4")
    touch(tmp_path / "disk2", "b/c.mp4")
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").symlink_to(tmp_path / "disk1" / "a.mp4")
    (videos / "x").symlink_to(tmp_path / "disk2")
    (videos / "x" / "b" / "up").symlink_to(tmp_path / "videos")
    (videos / "self.mp4").symlink_to(videos / "self.mp4")
    (videos / "gone.mp4").symlink_to(tmp_path / "gone.mp4")
    write_captions(tmp_path / "csv", "a", "x/b/c", "gone", "self")
    listed = list_videos(videos, tmp_path / "csv", tmp_path / "list.csv")
    assert listed == ["a.mp4", "x/b/c.mp4"]


def test_odd_file_names_are_preserved_in_the_list(tmp_path, capsys):
    names = [
        "a b",
        "-x",
        "größe/日本🙂",
        "q\"u,o'te",
        '"q"',
        " space ",
        "NA",
        "null",
        "dots.in.it",
        "a%20#?*",
    ]
    unlistable = ["line\nend", "car\rriage"]
    touch(tmp_path / "videos", *(f"{name}.mp4" for name in names + unlistable))
    open(os.fsencode(tmp_path / "videos") + b"/caf\xe9.mp4", "w").close()
    write_captions(tmp_path / "csv", *names, *unlistable)
    listed = list_videos(tmp_path / "videos", tmp_path / "csv", tmp_path / "list.csv")
    assert listed == sorted(f"{name}.mp4" for name in names)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "not UTF-8" in line]
    assert "skipped: 3 videos whose name" in line


def test_two_videos_with_the_same_captions_are_refused_and_named(tmp_path, capsys):
    touch(tmp_path / "videos", "a.mp4", "a.webm", "x/b.mp4", "y/b.mp4")
    write_captions(tmp_path / "csv", "a", "b")
    pack(tmp_path / "csv", tmp_path / "store", "--by_id")
    with pytest.raises(InputError, match="--video_path: 2 videos with the captions of another"):
        list_videos(tmp_path / "videos", tmp_path / "store", tmp_path / "list.csv")
    printed = capsys.readouterr().err
    assert "duplicate: a.mp4 and a.webm\n" in printed
    assert "duplicate: x/b.mp4 and y/b.mp4\n" in printed
    assert not (tmp_path / "list.csv").exists()


def skipped(printed):
    lines = printed.out.splitlines()
    return [line.removeprefix("skipped: ") for line in lines if line.startswith("skipped: ")]


def test_videos_of_evaluations_can_be_excluded_and_are_counted_by_file(tmp_path, capsys):
    videos = ["a-1.mp4", "x/_b.webm", "How to [c_3].mp4", "d [of c_3] e.mp4", "e.mp4"]
    touch(tmp_path / "videos", *videos)
    write_captions(tmp_path / "csv", *(os.path.splitext(video)[0] for video in videos))
    (tmp_path / "align.json").write_text('{"a-1": [], "c_3": [], "elsewhere": []}')
    (tmp_path / "videos_val.csv").write_text("1,_b,https://host\n1,a-1,https://host\n")
    (tmp_path / "none.txt").write_text("E\n")
    files = [tmp_path / name for name in ("align.json", "videos_val.csv", "none.txt")]
    listed = list_videos(
        tmp_path / "videos", tmp_path / "csv", tmp_path / "list.csv", "--exclude", *files
    )
    assert listed == ["d [of c_3] e.mp4", "e.mp4"]
    printed = capsys.readouterr()
    assert skipped(printed) == [
        f"2 videos of {tmp_path}/align.json, such as How to [c_3].mp4",
        f"2 videos of {tmp_path}/videos_val.csv, such as a-1.mp4",
    ]
    assert f"--exclude: no video has an id in {tmp_path}/none.txt" in printed.err


@pytest.mark.parametrize("source", ["csv", "store", "all.json"])
def test_videos_with_few_captions_can_be_skipped(captions, capsys, source):
    touch(captions / "videos", "v-1.mp4", "_B2.mp4", "none.mp4")
    pack(captions / "csv", captions / "store")
    capsys.readouterr()
    found = captions / "videos", captions / source
    listed = list_videos(*found, captions / "list.csv", "--min_captions", 3)
    assert listed == ["v-1.mp4"]
    assert "1 video with fewer than 3 captions, such as _B2.mp4" in skipped(capsys.readouterr())
    with pytest.raises(InputError, match=r"no video is left for the list: .*2 videos with fewer"):
        list_videos(*found, captions / "other.csv", "--min_captions", 4)
    assert not (captions / "other.csv").exists()


def test_videos_that_are_too_short_or_long_can_be_skipped(tmp_path, capsys):
    for seconds in (1, 2, 3):
        make_video(tmp_path / "videos" / f"{seconds}.mp4", seconds)
    touch(tmp_path / "videos", "empty.mp4")
    write_captions(tmp_path / "csv", "1", "2", "3", "empty")
    limits = ["--min_duration", 1.5, "--max_duration", 2.5]
    listed = list_videos(tmp_path / "videos", tmp_path / "csv", tmp_path / "list.csv", *limits)
    assert listed == ["2.mp4"]
    short, long, unknown = skipped(capsys.readouterr())
    assert short == "1 video shorter than 1.5 s, such as 1.mp4"
    assert long == "1 video longer than 2.5 s, such as 3.mp4"
    assert unknown.startswith("1 video whose duration cannot be read, such as empty.mp4 (")


def test_the_list_of_a_folder_counts_subtitles_in_other_languages(tmp_path, capsys):
    touch(tmp_path, "a.mp4", "a.en.vtt", "b.mp4", "b.de.vtt", "b.fr.vtt")
    assert list_videos(tmp_path, tmp_path, tmp_path / "list.csv") == ["a.mp4"]
    assert "1 video whose captions are in another language, such as b" in skipped(
        capsys.readouterr()
    )


def test_metadata_in_a_shard_is_not_taken_for_captions(tmp_path, capsys):
    """video2dataset leaves `<key>.json` beside each video."""
    touch(tmp_path / "in", "a.mp4", "b.mp4")
    (tmp_path / "in" / "a.json").write_text(json.dumps(WHISPER))
    (tmp_path / "in" / "b.json").write_text('{"url": "b", "status": "success"}')
    shard = pack_folder(tmp_path / "in", tmp_path / "s.tar")
    for videos in (tmp_path / "in", shard):
        (tmp_path / "list.csv").unlink(missing_ok=True)
        assert list_videos(videos, videos, tmp_path / "list.csv") == ["a.mp4"]
        unusable = "1 video whose captions are unusable, such as b"
        assert unusable in skipped(capsys.readouterr())


# ---- the command ---------------------------------------------------------------------------------

PACK, LIST = ["pack", "--caption_root", "{pairs}/csv"], ["list", "--video_path", "{pairs}/videos"]
WRONG_CALLS = {
    "no command": ([], "pack|list"),
    "no source": (["pack", "--out", "x"], "--caption_root"),
    "a missing source": (
        ["pack", "--caption_root", "no", "--out", "x"],
        "no: is not an existing",
    ),
    "a folder without captions": (
        ["pack", "--caption_root", "{pairs}/videos/x", "--out", "x"],
        "--caption_root: {pairs}/videos/x: has no caption file",
    ),
    "a store": (["pack", "--caption_root", "{pairs}/store", "--out", "x"], "is already a store"),
    "an existing store": ([*PACK, "--out", "{pairs}/store"], "--out: "),
    "a store inside a file": (
        [*PACK, "--out", "{pairs}/csv/a.csv/store"],
        "--out: {pairs}/csv/a.csv/store: cannot be written",
    ),
    "no process": ([*PACK, "--out", "x", "--num_workers", "0"], "--num_workers"),
    "missing videos": (
        ["list", "--video_path", "no", "--caption_root", "{pairs}/csv"],
        "--video_path: there is no folder no",
    ),
    "no videos": (
        ["list", "--video_path", "{pairs}/csv", "--caption_root", "{pairs}/csv"],
        "--video_path: there is no video",
    ),
    "no captions": ([*LIST, "--caption_root", "{pairs}/videos/x"], "--caption_root: "),
    "captions of other videos": (
        ["list", "--video_path", "{pairs}/videos/x", "--caption_root", "{pairs}/csv"],
        "none of 2 videos has captions",
    ),
    "an existing list": (
        [*LIST, "--caption_root", "{pairs}/csv", "--out", "{pairs}/csv"],
        "--out",
    ),
    "a shortest duration above the longest": (
        [*LIST, "--caption_root", "{pairs}/csv", "--min_duration", "9", "--max_duration", "8"],
        "--min_duration is above --max_duration",
    ),
    "missing ids": (
        [*LIST, "--caption_root", "{pairs}/csv", "--exclude", "no.json"],
        "--exclude: no.json: No such file",
    ),
    "a list in no folder": (
        [*LIST, "--caption_root", "{pairs}/csv", "--out", "no/l.csv"],
        "--out: ",
    ),
}


@pytest.mark.parametrize("fault", WRONG_CALLS)
def test_an_invalid_call_is_refused_in_one_line_that_names_the_flag(
    pairs, monkeypatch, capsys, fault
):
    monkeypatch.chdir(pairs)
    (pairs / "data").mkdir()  # where the list goes by default
    flags, message = WRONG_CALLS[fault]
    before = written(pairs)
    monkeypatch.setattr("sys.argv", ["prepare.py", *(flag.format(pairs=pairs) for flag in flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_script(prepare.main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and message.format(pairs=pairs) in lines[0]
    assert written(pairs) == before


def test_the_script_runs_as_a_command(captions):
    command = [sys.executable, SCRIPT, "pack", "--caption_root", captions / "csv", "--out"]
    done = subprocess.run([*command, captions / "store"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    again = subprocess.run([*command, captions / "store"], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1


def test_captions_of_many_files_are_read_in_parallel_in_order(tmp_path):
    names = [f"{number:03d}" for number in range(3 * caption_source.FILES_PER_TASK + 5)]
    random.Random(1).shuffle(names)
    write_captions(tmp_path, *names)
    files = [caption_source.CaptionFiles(name, (f"{name}.csv",)) for name in names]
    read = list(caption_source.read_folder(str(tmp_path), files, 2, "en"))
    assert [(name, texts) for name, (_, _, texts), _ in read] == [(name, [name]) for name in names]


def kill_before_a_result(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle_of_a_result(folder, tasks, language, results):
    os.write(results.fileno(), struct.pack("!i", 1000) + b"not 1000 bytes")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kill", [kill_before_a_result, kill_in_the_middle_of_a_result])
def test_if_a_reader_process_is_killed_packing_ends_with_one_line(
    tmp_path, monkeypatch, kill, workers
):
    write_captions(tmp_path / "csv", *map(str, range(20)))
    monkeypatch.setattr(caption_source, "FILES_PER_TASK", 1)
    monkeypatch.setattr(caption_source, "read_files", kill)
    before = set(psutil.Process().children())
    with pytest.raises(InputError, match=r"--caption_root: .*csv: a process .* was killed"):
        pack(tmp_path / "csv", tmp_path / "store", "--num_workers", str(workers))
    assert written(tmp_path) == ["csv"] and set(psutil.Process().children()) <= before
