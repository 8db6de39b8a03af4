"""data/own/prepare.py: prepare a folder of videos with captions beside them for training."""

import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from annotations.tables import read_table
from captions.readers import CaptionStore
from data.own import prepare
from data.word2vec.prepare import write_pair
from s3dg import WORD_DIM, load_word_vectors, load_words
from tests.helpers import ROOT, make_video, rolling_vtt
from utils import InputError, run_script

LINES = [
    (0.2, 1.4, "first you cut the tomato"),
    (1.4, 2.6, "then you stir the tomato"),
    (2.6, 3.8, "and cut it again"),
]
SEGMENTS = [{"start": start, "end": end, "text": f" {text}"} for start, end, text in LINES]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    make_video(path, 4)
    return path


def fill(folder, video, names, captions):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / name)
    for name, content in captions.items():
        (folder / name).write_text(content)


def printed_command(output):
    [line] = [line for line in output.splitlines() if line.startswith("    python ")]
    return shlex.split(line)


def test_usable_videos_are_prepared_and_the_others_skipped_with_a_reason(tmp_path, video, capsys):
    folder = tmp_path / "my talks"
    vtt = rolling_vtt(LINES)
    captions = {
        "a.en.vtt": vtt,
        "b.json": json.dumps({"segments": SEGMENTS, "language": "en"}),
        "german.de.vtt": vtt,
        "html.vtt": "<html>",
        "broken.vtt": vtt,
        "gone.en.srt": "1\n00:00:01,000 --> 00:00:02,000\nhello\n",
    }
    videos = ["a.mp4", "a.webm", "sub/b [x].webm", "german.mp4", "html.mp4", "silent.mp4"]
    fill(folder, video, videos, captions)
    (folder / "b.json").rename(folder / "sub" / "b [x].json")
    (folder / "broken.mp4").write_bytes(b"not a video")
    prepare.main([str(folder), "--out", str(tmp_path / "out")])

    output = capsys.readouterr().out
    skipped = [line for line in output.splitlines() if line.startswith("skipped: ")]
    silent = (
        "none of these files exists: silent.en.vtt, silent.csv, silent.json, silent.vtt, silent.srt"
    )
    for line, expected in zip(
        skipped,
        [
            f"german.mp4: {folder}/german.de.vtt: its language is 'de', not en",
            f"html.mp4: {folder}/html.vtt: is HTML or XML, not captions; download it again",
            f"silent.mp4: it has no captions; {silent}",
            "a.webm: a.mp4 has the same captions",
            f"broken.mp4: {folder}/broken.mp4: ",
            "the captions of gone: there is no such video",
        ],
        strict=True,
    ):
        assert line.startswith(f"skipped: {expected}")
    assert f"{tmp_path}/out: 2 of 7 videos, " in output

    listed = read_table(tmp_path / "out" / "videos.csv", ["video_path"])["video_path"].tolist()
    assert listed == ["a.mp4", "sub/b [x].webm"]
    store = CaptionStore(tmp_path / "out" / "captions")
    texts = [text for _, _, text in LINES]
    assert [store.read(name)[2] for name in listed] == [texts, texts]
    words = load_words(tmp_path / "out" / "dict.npy").tolist()
    assert {"tomato", "stir", "hello"} <= set(words)
    assert len(load_word_vectors(tmp_path / "out" / "word2vec.pth")) == len(words) + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my talks", "out"]

    command = printed_command(output)
    assert command[:2] == ["python", "main_distributed.py"]
    assert {f"--video_path={folder}", f"--train_csv={tmp_path}/out/videos.csv"} <= set(command)
    name = f"{tmp_path}/out".strip("/").replace(
        "/", "-"
    )  # unique, even if another folder is called `out`
    assert f"--checkpoint_dir={name}" in command


def test_without_usable_captions_every_reason_is_printed(tmp_path, video, capsys):
    captions = {"a.vtt": "<html>", "b.srt": "", "c.de.vtt": "", "d.de.vtt": "", "e.ja.vtt": ""}
    fill(tmp_path / "in", video, [f"{name}.mp4" for name in "abcde"], captions)
    languages = r"3 videos in other languages \(de 2, ja 1\); give another source or --language"
    with pytest.raises(InputError, match=languages):
        prepare.main([str(tmp_path / "in"), f"--out={tmp_path}/out"])
    errors = capsys.readouterr().err
    assert "a.vtt: is HTML" in errors and "b.srt: is empty" in errors


def test_given_word_vectors_are_checked_and_used(tmp_path, video, capsys):
    fill(tmp_path / "in", video, ["a.mp4"], {"a.vtt": rolling_vtt(LINES)})
    write_pair(tmp_path, ["cut", "stir"], np.ones((2, WORD_DIM)))
    vectors = f"--word2vec_path={tmp_path}/word2vec.pth"
    words = f"--token_to_word_path={tmp_path}/dict.npy"
    prepare.main([str(tmp_path / "in"), f"--out={tmp_path}/out", vectors, words])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["captions", "videos.csv"]
    assert {vectors, words} <= set(printed_command(capsys.readouterr().out))
    np.save(tmp_path / "dict.npy", np.array(["cut", "stir", "mix"]))
    with pytest.raises(InputError, match=r"--token_to_word_path: .*dict\.npy"):
        prepare.main([str(tmp_path / "in"), f"--out={tmp_path}/other", vectors, words])
    assert not (tmp_path / "other").exists()


def broken(folder, video):
    fill(folder, video, [], {"a.en.vtt": rolling_vtt(LINES)})
    (folder / "a.mp4").write_bytes(b"not a video")


WRONG = {
    "no folder": (lambda folder, video: folder.rmdir(), "FOLDER: there is no folder {folder}"),
    "no video": (lambda folder, video: None, "FOLDER: there is no video in {folder}"),
    "no captions": (
        lambda folder, video: fill(folder, video, ["a.mp4"], {}),
        "FOLDER: {folder}: has no caption file",
    ),
    "no usable captions": (
        lambda folder, video: fill(folder, video, ["a.mp4"], {"a.vtt": "<html>"}),
        "FOLDER: {folder}: has no captions that can be used: 1 video with invalid captions",
    ),
    "no word": (
        lambda folder, video: fill(folder, video, ["a.mp4"], {"a.vtt": rolling_vtt([(0, 1, "-")])}),
        "has words",
    ),
    "no intact video": (broken, "FOLDER: no video of 1 can be trained on"),
    "an existing output": (
        lambda folder, video: (folder.parent / "out").mkdir(),
        "--out: {folder}/../out already exists",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_folder_that_cannot_be_trained_on_is_one_line_and_leaves_nothing(
    tmp_path, video, monkeypatch, capsys, fault
):
    make, message = WRONG[fault]
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder, video)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["prepare.py", str(folder), "--out", f"{folder}/../out"])
    with pytest.raises(SystemExit) as stopped:
        run_script(prepare.main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1 and message.format(folder=folder) in lines[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_five_videos_with_subtitles_train_with_two_commands(tmp_path, video):
    names = [f"talk {number}" for number in range(5)]
    subtitles = {f"{name}.en.vtt": rolling_vtt(LINES) for name in names}
    fill(tmp_path / "videos", video, [f"{name}.mp4" for name in names], subtitles)
    script = [sys.executable, ROOT / "data" / "own" / "prepare.py", tmp_path / "videos"]
    first = subprocess.run(script, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "skipped" not in first.stdout
    assert f"data/own/videos: 5 of 5 videos, {5 * len(LINES)} captions" in first.stdout

    _, main, *flags = printed_command(first.stdout)
    tiny = ["--num_frames=4", "--video_size=32", "--epochs=2", "--n_display=1", "--device=cpu"]
    second = [sys.executable, ROOT / main, *flags, *tiny]
    subprocess.run(second, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    lines = (tmp_path / "log" / "data-own-videos.txt").read_text()
    origin = f"packed from {tmp_path}/videos: 5 WebVTT; language en"
    assert f"captions of data/own/videos/captions: {origin}" in lines
    records = [
        json.loads(x) for x in (tmp_path / "log" / "data-own-videos.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["loss"] > 0 and record["bad_samples"] == 0 for record in records)
    assert (tmp_path / "checkpoint" / "data-own-videos" / "epoch0002.pth.tar").is_file()
