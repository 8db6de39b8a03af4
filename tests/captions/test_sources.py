"""Captions of many videos: folders of any format, and files for all videos."""

import json

import pytest

from captions.readers import CaptionError
from captions.sources import OtherLanguage, find_caption_files, iter_captions
from tests.helpers import pack_folder, rolling_vtt, write_csv
from utils import DataError
from video_loader import clip_window

WHISPER = {"language": "en", "segments": [{"start": 1, "end": 2.5, "text": " from json"}]}
SRT = "1\n00:00:01,000 --> 00:00:02,500\nfrom {}\n\n"


def write(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def read(root, **options):
    """Return the captions of a source by video: the texts, or the error."""
    outcomes = list(iter_captions(str(root), 1, **options))
    found = {name: captions for name, captions, _ in outcomes}
    assert len(found) == len(outcomes)
    return {n: c if isinstance(c, CaptionError) else c[2] for n, c in found.items()}


def test_captions_in_shards_are_found_beside_their_videos(tmp_path):
    write(
        tmp_path / "loose",
        {"a.json": WHISPER, "b.en.vtt": "WEBVTT\n", "sub/c.srt": SRT.format("c")},
    )
    pack_folder(tmp_path / "loose", tmp_path / "root" / "00000.tar")
    write(tmp_path / "root", {"d.csv": "start,end,text\n1,2.5,from csv\n"})
    found = read(tmp_path / "root")
    assert found.keys() == {"00000.tar/a", "00000.tar/b", "00000.tar/sub/c", "d"}
    assert found["00000.tar/a"] == ["from json"] and found["00000.tar/sub/c"] == ["from c"]
    assert isinstance(found["00000.tar/b"], CaptionError)


def test_a_shard_gives_the_captions_of_its_folder(tmp_path):
    write(tmp_path / "in", {"a.json": WHISPER, "b.en.vtt": rolling_vtt([(0, 1, "b")])})
    shard = pack_folder(tmp_path / "in", tmp_path / "s.tar")
    assert read(shard) == read(tmp_path / "in") == {"a": ["from json"], "b": ["b"]}


# ---- a folder ------------------------------------------------------------------------------------


def test_a_folder_may_have_captions_of_any_format_whatever_their_suffix(tmp_path):
    write(
        tmp_path,
        {
            "a.csv": "start,end,text\n1,2.5,from csv\n",
            "b.json": WHISPER,
            "c/d.en.vtt": rolling_vtt([(1, 2.5, "from vtt")]),
            "e.srt": SRT.format("srt"),
            "f.vtt": SRT.format("srt, too"),
            "f.info.json": {"title": "of yt-dlp"},
            "notes.txt": "",
        },
    )
    assert read(tmp_path) == {
        "a": ["from csv"],
        "b": ["from json"],
        "c/d": ["from vtt"],
        "e": ["from srt"],
        "f": ["from srt, too"],
    }
    formats = {name: kind for name, _, kind in iter_captions(str(tmp_path), 1)}
    assert formats == {
        "a": "CSV",
        "b": "Whisper JSON",
        "c/d": "WebVTT",
        "e": "SubRip",
        "f": "SubRip",
    }


def test_a_videos_files_are_preferred_by_language_and_then_by_format(tmp_path):
    srt = {
        tag: SRT.format(tag or "none") for tag in ("de.", "en-GB.", "en-orig.", "en.", "enm.", "")
    }
    write(tmp_path, {f"a.{tag}srt": text for tag, text in srt.items()})
    [(name, paths)] = find_caption_files(tmp_path)
    assert name == "a"
    assert paths[:4] == ("a.en.srt", "a.srt", "a.en-GB.srt", "a.en-orig.srt")
    assert read(tmp_path) == {"a": ["from en."]}
    assert read(tmp_path, language="de") == {"a": ["from de."]}
    write(tmp_path, {"a.json": WHISPER})
    assert read(tmp_path) == {"a": ["from json"]}


def test_if_a_file_cannot_be_used_the_videos_next_one_is_read(tmp_path):
    write(tmp_path, {"a.json": {"width": 640}, "a.vtt": "<html>", "a.en.srt": SRT.format("srt")})
    write(tmp_path, {"b.json": {**WHISPER, "language": "de"}, "b.en.srt": SRT.format("srt")})
    assert read(tmp_path) == {"a": ["from srt"], "b": ["from srt"]}


def test_captions_in_another_language_are_an_error_with_that_language(tmp_path):
    write(
        tmp_path,
        {
            "json.json": {**WHISPER, "language": "de"},
            "name.pt-BR.vtt": "is not opened",
            "header.vtt": rolling_vtt([(1, 2, "hallo")]).replace("Language: en", "Language: de"),
            "worse.de.vtt": "",
            "worse.vtt": "",
        },
    )
    found = read(tmp_path)
    others = {n: error.language for n, error in found.items() if isinstance(error, OtherLanguage)}
    assert others == {"json": "de", "name": "pt-BR", "header": "de"}
    assert str(found["json"]).endswith("json.json: its language is 'de', not en")
    assert str(found["worse"]).endswith("worse.vtt: is empty")
    assert read(tmp_path, language="de")["header"] == ["hallo"]


def test_a_dot_in_a_name_need_not_precede_a_language(tmp_path):
    names = ["Mr. X", "v1.5", "a.part1", "dots.in.it"]
    write(tmp_path, {f"{name}.en.vtt": rolling_vtt([(0, 1, name)]) for name in names})
    write(tmp_path, {"b.c.csv": "start,end,text\n0,1,b.c\n", ".en.srt": SRT.format("a file")})
    expected = {name: [name] for name in (*names, "b.c")} | {".en": ["from a file"]}
    assert read(tmp_path) == expected


def test_a_name_that_ends_like_a_language_belongs_to_a_video_of_that_name(tmp_path):
    write(tmp_path, {"x/fix.it.mp4": "", "x/fix.mp4": "", "x/fix.it.srt": SRT.format("fix.it")})
    write(tmp_path, {"x/fix.it.it.vtt": "", "x/fix.en.srt": SRT.format("fix"), "day.de.srt": ""})
    pack_folder(tmp_path / "x", tmp_path / "s.tar", ["fix.it.mp4", "fix.it.srt"])
    found = read(tmp_path)
    assert isinstance(found.pop("day"), OtherLanguage)
    assert found == {
        "x/fix.it": ["from fix.it"],
        "x/fix": ["from fix"],
        "s.tar/fix.it": ["from fix.it"],
    }
    assert read(tmp_path / "x", by_id=True) == {"fix.it": ["from fix.it"], "fix": ["from fix"]}


def test_languages_and_suffixes_may_be_written_in_several_ways(tmp_path):
    tags = ["en-eEY6_EpapPo", "en_US", "en-", "en"]
    write(tmp_path, {f"{n}.{tag}.VTT": rolling_vtt([(0, 1, tag)]) for n, tag in enumerate(tags)})
    write(tmp_path, {"J.JSON": {**WHISPER, "language": "English"}, "i.INFO.json": {}})
    expected = {str(n): [tag] for n, tag in enumerate(tags)}
    assert read(tmp_path) == {**expected, "J": ["from json"]}


def test_a_bad_file_affects_only_its_own_video(tmp_path):
    good = rolling_vtt([(0, 1, "good")])
    write(tmp_path, {"html.en.vtt": "<!doctype html>", "empty.srt": "", "good.en.vtt": good})
    write(tmp_path, {"other.json": [1], "time.vtt": good.replace("00:00:0", "00:00:x")})
    (tmp_path / "latin.srt").write_bytes(SRT.format("caf\xe9").encode("latin-1"))
    (tmp_path / "secret.srt").symlink_to("/proc/self/mem")
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(1 << 30)
    found = read(tmp_path)
    assert found.pop("good") == ["good"]
    assert sorted(found) == ["empty", "html", "huge", "latin", "other", "secret", "time"]
    for name, error in found.items():
        assert f"{tmp_path}/{name}." in str(error) and "\n" not in str(error)


# ---- a file for all videos -----------------------------------------------------------------------


def test_the_sentencified_file_may_have_a_list_of_sentences_per_video(tmp_path):
    sentences = [{"start": 1, "end": 2, "text": "one"}, {"text": "two", "start": 3.5, "end": 9}]
    columns = {"start": [1, 3.5], "end": [2, 9], "text": ["one", "two"]}
    write(tmp_path, {"all.json": {"a": sentences, "b": columns}})
    [(_, first, _), (_, second, _)] = iter_captions(str(tmp_path / "all.json"), 1)
    for starts, ends, texts in (first, second):
        assert (starts.tolist(), ends.tolist(), texts) == ([1, 3.5], [2, 9], ["one", "two"])


def test_htm_aas_sentences_start_and_end_at_their_timestamp(tmp_path):
    rows = [
        ("b", 9.5, "two"),
        ("a", 30, "x"),
        ("b", 1.25, "one"),
        ("b", "", "never"),
        ("a", 31, ""),
    ]
    write_csv(tmp_path / "htm_aa.csv", ("vid", "timestamp", "text"), *rows)
    outcomes = list(iter_captions(str(tmp_path / "htm_aa.csv"), 1))
    assert [(name, kind) for name, _, kind in outcomes] == [
        ("b", "HTM-AA CSV"),
        ("a", "HTM-AA CSV"),
    ]
    starts, ends, texts = outcomes[0].captions
    assert starts.tolist() == ends.tolist() == [1.25, 9.5] and texts == ["one", "two"]
    assert outcomes[1].captions[2] == ["x", ""]
    assert clip_window(9.5, 9.5, 5) == (7, 12)


def test_an_invalid_timestamp_in_htm_aa_affects_only_its_video(tmp_path):
    rows = [("a", "1s", "x"), ("b", 2, "y"), ("c", 2e6, "z")]
    write_csv(tmp_path / "htm_aa.csv", ("vid", "timestamp", "text"), *rows)
    found = read(tmp_path / "htm_aa.csv")
    assert found["b"] == ["y"]
    assert str(found["a"]).endswith("htm_aa.csv, video 'a': the timestamp '1s' is not a number")
    assert "no caption with usable times" in str(found["c"])


@pytest.mark.parametrize(
    ("content", "reason"),
    {
        "vid,timestamp,text\n,1,a\n": r"line 2: column vid: the cell is empty",
        "vid,timestamp,text\na,1,a,4,5\n": "rows have more cells",
        "vid,timestamp,text\na,1,caf\xe9\n": "is not a CSV table",
        "vid,time,text\na,1,a\n": "is not a JSON file of captions .* or HTM-AA's CSV file",
    }.items(),
)
def test_a_table_of_another_structure_is_refused(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=rf"a\.csv.*{reason}"):
        read(tmp_path / "a.csv")
