"""The search of one's own videos, run as a user runs it: index, query, serve."""

import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import search
from s3dg import S3D, load_model, to_unit_range
from tests.helpers import ROOT, golden_weight, make_video, pack_folder, use_search_server
from utils import InputError
from video_decoder import ClipSpec, decode_windows
from video_search.index import read_index, write_index

WORDS = ["cut", "tomato", "stir", "pan"]
NAMES = ["a.mp4", "short.mp4", "sub/b.mkv"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of golden weights that knows four words, with the list of them beside it."""
    path = tmp_path_factory.mktemp("weights") / "s3d.pth"
    state = S3D().state_dict() | {"text_module.word_embd.weight": torch.zeros(5, 300)}
    torch.save({name: golden_weight(name, v.shape).to(v.dtype) for name, v in state.items()}, path)
    np.save(path.with_name("dict.npy"), np.array(WORDS))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    for name, seconds in zip(NAMES, (4, 0.5, 2), strict=True):
        make_video(folder / name, seconds)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture
def videos(films, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(films, tmp_path / "videos")


@functools.cache
def loaded(path):
    """The weights are read once for all runs in this process."""
    return load_model(path)


@pytest.fixture
def embedded(monkeypatch):
    """The names of the videos that were embedded since the list was last cleared."""
    names = []

    def noted(model, paths, *args, **settings):
        names.extend(path.name for path in paths)
        return strided_features(model, paths, *args, **settings)

    strided_features = search.strided_features
    monkeypatch.setattr(search, "strided_features", noted)
    return names


@pytest.fixture
def run(weights, monkeypatch):
    """Runs the script in this process: its exit status. Without workers, which is quicker."""
    monkeypatch.setattr("evaluation.features.load_model", lambda path: loaded(weights))
    monkeypatch.setattr("search.load_model", lambda path: loaded(weights))
    monkeypatch.setattr(sys.stdout.__class__, "reconfigure", lambda *_, **__: None, raising=False)

    def run(*given):
        try:
            search.main(list(map(str, given)))
        except SystemExit as stopped:
            return stopped.code
        return 0

    return run


def flags(weights, folder, out, *more):
    """Of `search.py index`."""
    return [
        *("index", folder, f"--out={out}", f"--weights={weights}"),
        f"--token_to_word_path={weights.with_name('dict.npy')}",
        *("--num_frames=4", "--video_size=32", "--num_thread_reader=0", "--batch_size_val=8"),
        *more,
    ]


@pytest.fixture
def index(run, weights, tmp_path):
    """Brings tmp_path/index up to date with a folder: the exit status."""
    return lambda folder, *more: run(*flags(weights, folder, tmp_path / "index", *more))


@pytest.fixture(scope="module")
def made(weights, films, tmp_path_factory):
    """An index by the script in a process of its own, with a worker."""
    out = tmp_path_factory.mktemp("made") / "index"
    command = [sys.executable, ROOT / "search.py", *flags(weights, films, out)]
    subprocess.run([*command, "--num_thread_reader=1"], check=True, capture_output=True)
    return out


def contents(path):
    """{video: (starts, embeddings, reason)}"""
    return {
        video.path: (video.starts.tolist(), video.embeddings.clone(), video.reason)
        for video in read_index(path).videos
    }


# --- index --------------------------------------------------------------------------------------


def test_an_index_has_the_models_embeddings_of_overlapping_windows(made, weights, films):
    found = contents(made)
    assert list(found) == NAMES
    assert list(made.parent.iterdir()) == [made]
    assert found["short.mp4"][0] == [0.0]
    assert found["sub/b.mkv"][0] == [0.0, 0.4, 0.8, 1.2]  # of 0.8 seconds each
    for name in NAMES:
        starts, embeddings, reason = found[name]
        clips, _ = decode_windows(films / name, starts, ClipSpec(4, 32, 5))
        with torch.inference_mode():
            expected = loaded(weights)(to_unit_range(clips), mode="video")
        assert embeddings.shape == (len(starts), 512) and reason == ""
        torch.testing.assert_close(
            embeddings, expected.clone(), rtol=0, atol=1e-3 * expected.abs().max().item()
        )
    short = NAMES.index("short.mp4")
    ends = read_index(made).videos[short].ends.tolist()
    assert 0 < ends[0] < 0.8  # where the video ends
    metadata = read_index(made).metadata
    assert metadata.folder == str(films) and metadata.weights == str(weights)
    assert metadata.settings["stride"] == 0.4


def test_only_new_and_changed_videos_are_embedded(index, videos, tmp_path, embedded, capsys):
    assert index(videos) == 0 and sorted(embedded) == ["a.mp4", "b.mkv", "short.mp4"]
    before, times = contents(tmp_path / "index"), (tmp_path / "index").stat().st_mtime_ns
    embedded.clear()
    assert index(videos) == 0 and embedded == []
    assert (tmp_path / "index").stat().st_mtime_ns == times  # nothing to write

    make_video(videos / "new.mp4", 1)
    make_video(videos / "short.mp4", 1.2)
    shutil.rmtree(videos / "sub")
    capsys.readouterr()
    assert index(videos) == 0 and sorted(embedded) == ["new.mp4", "short.mp4"]
    assert "3 videos: 1 up to date, 1 to embed again, 1 new; 1 gone" in capsys.readouterr().out
    after = contents(tmp_path / "index")
    assert list(after) == ["a.mp4", "new.mp4", "short.mp4"]
    assert after["a.mp4"][0] == before["a.mp4"][0]
    assert torch.equal(after["a.mp4"][1], before["a.mp4"][1])
    assert after["short.mp4"][0] == [0.0, 0.4]

    embedded.clear()
    (videos / "new.mp4").unlink()  # only gone: the model is not needed
    assert index(videos) == 0 and embedded == []
    assert list(contents(tmp_path / "index")) == ["a.mp4", "short.mp4"]


def test_videos_in_a_tar_file_are_indexed_like_files(index, films, made, tmp_path, embedded):
    folder = tmp_path / "shards"
    shard = pack_folder(films, folder / "s.tar")
    assert index(folder) == 0
    plain, packed = read_index(made), read_index(tmp_path / "index")
    assert [video.path for video in packed.videos] == [f"s.tar/{name}" for name in NAMES]
    assert torch.equal(packed.starts, plain.starts)
    torch.testing.assert_close(packed.embeddings, plain.embeddings)
    embedded.clear()
    assert index(folder) == 0 and not embedded
    os.utime(shard, (1, 1))
    assert index(folder) == 0 and embedded == [name.split("/")[-1] for name in NAMES]


def test_a_touched_file_is_embedded_again(index, videos, embedded):
    assert index(videos) == 0
    embedded.clear()
    os.utime(videos / "a.mp4", ns=(1, 1))
    assert index(videos) == 0 and embedded == ["a.mp4"]


def test_an_unusable_video_is_recorded_and_retried_only_with_retry_failed(
    index, videos, tmp_path, embedded, capsys
):
    (videos / "broken.mp4").write_text("no video")
    assert index(videos) == 1  # the others are indexed
    assert "broken.mp4: Invalid data" in capsys.readouterr().out
    found = contents(tmp_path / "index")
    assert list(found) == ["a.mp4", "broken.mp4", *NAMES[1:]]
    assert "Invalid data" in found["broken.mp4"][2] and found["broken.mp4"][0] == []
    embedded.clear()
    capsys.readouterr()
    assert index(videos) == 0 and embedded == []
    told = capsys.readouterr().out
    assert "1 of them could not be used before; --retry_failed retries them" in told
    assert index(videos, "--retry_failed") == 1 and embedded == ["broken.mp4"]
    embedded.clear()
    make_video(videos / "broken.mp4", 1)  # mended: it has changed
    assert index(videos) == 0 and embedded == ["broken.mp4"]
    assert contents(tmp_path / "index")["broken.mp4"][2] == ""


def test_a_video_has_no_windows_if_the_ffmpeg_program_fails(
    index, videos, ffmpeg_in_path, tmp_path
):
    ffmpeg_in_path("echo 'no libx264' >&2; exit 127")
    assert index(videos, "--decoder=ffmpeg") == 1
    for starts, _, reason in contents(tmp_path / "index").values():
        assert starts == [] and reason.endswith("exited with status 127: no libx264")
    ffmpeg_in_path("echo 'no libx264' >&2; exit 127", version=False)
    with pytest.raises(InputError, match=r"--decoder ffmpeg: .* status 127: no libx264; repair"):
        index(videos, "--decoder=ffmpeg")


def test_the_decoder_is_a_setting_of_an_index(index, videos, tmp_path, embedded):
    assert index(videos) == 0
    with pytest.raises(InputError, match=r"--out: .* was made with --decoder pyav, not ffmpeg;"):
        index(videos, "--decoder=ffmpeg")
    found = read_index(tmp_path / "index")
    del found.metadata.settings["decoder"]  # as in an index from before it was one
    write_index(tmp_path / "index", found.metadata, found.videos)
    embedded.clear()
    assert index(videos, "--decoder=ffmpeg") == 0 and embedded == []


def test_black_windows_are_skipped(index, tmp_path):
    make_video(tmp_path / "videos/a.mp4", 3, "-vf", "fade=out:st=0.5:d=0.3", "-qp", "0")
    assert index(tmp_path / "videos") == 0
    starts = contents(tmp_path / "index")["a.mp4"][0]
    assert starts[0] == 0.0 and starts[-1] < 1.0


def test_a_stopped_run_keeps_its_videos_and_is_resumed(
    index, videos, tmp_path, embedded, monkeypatch
):
    def stopped(path, *rest):
        if path == "short.mp4":
            raise KeyboardInterrupt
        return make_video(path, *rest)

    make_video = search.make_video
    with monkeypatch.context() as patch:
        patch.setattr(search, "make_video", stopped)
        with pytest.raises(KeyboardInterrupt):
            index(videos)
    assert list(contents(tmp_path / "index")) == ["a.mp4"]
    assert not (tmp_path / "index.lock").exists()
    embedded.clear()
    assert index(videos) == 0 and sorted(embedded) == ["b.mkv", "short.mp4"]
    assert list(contents(tmp_path / "index")) == NAMES


def test_the_index_is_written_at_intervals(index, videos, made, tmp_path, monkeypatch):
    written, write_index = [], search.write_index
    monkeypatch.setattr(search, "SAVE_EVERY", 0)
    monkeypatch.setattr(search, "SAVE_FRACTION", 1e9)

    def noted(path, metadata, videos):
        videos = list(videos)
        written.append(len(videos))
        write_index(path, metadata, videos)

    monkeypatch.setattr(search, "write_index", noted)
    assert index(videos) == 0 and written == [1, 2, 3, 3]
    for name, (starts, embeddings, _) in contents(tmp_path / "index").items():
        assert starts == contents(made)[name][0]
        expected = contents(made)[name][1]
        torch.testing.assert_close(
            embeddings, expected, rtol=0, atol=1e-3 * expected.abs().max().item()
        )


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--stride=1"], "--stride 0.4, not 1.0"),
        (["--video_size=64"], "--video_size 32, not 64"),
        (["--num_frames=8"], "--num_frames 4, not 8"),
        (["--amp=bf16"], "--amp none, not bf16"),
    ],
)
def test_an_index_of_other_settings_is_rejected(
    more, named, index, films, made, tmp_path, embedded
):
    shutil.copy(made, tmp_path / "index")
    with pytest.raises(InputError, match=f"--out: .* was made with .*{named}") as refused:
        index(films, *more)
    assert "\n" not in str(refused.value) and embedded == []
    assert (tmp_path / "index").read_bytes() == made.read_bytes()


def test_an_index_of_another_folder_or_other_weights_is_rejected(
    index, run, films, made, weights, tmp_path
):
    shutil.copy(made, tmp_path / "index")
    make_video(tmp_path / "others/a.mp4", 1)
    with pytest.raises(InputError, match=r"--out: .* indexes the videos in "):
        index(tmp_path / "others")
    other = tmp_path / "other.pth"
    other.write_bytes(weights.read_bytes() + b" ")
    shutil.copy(weights.with_name("dict.npy"), tmp_path)
    with pytest.raises(InputError, match=r"--out: .* made with --weights sha256:"):
        run(*flags(other, films, tmp_path / "index"))


def test_the_index_of_a_moved_folder_is_updated(index, videos, tmp_path, embedded):
    assert index(videos) == 0
    embedded.clear()
    assert index(videos.rename(tmp_path / "moved")) == 0 and embedded == []
    assert read_index(tmp_path / "index").metadata.folder == str(tmp_path / "moved")


def test_the_index_of_a_folder_is_updated_through_a_link(index, videos, tmp_path, embedded):
    assert index(videos) == 0
    embedded.clear()
    (tmp_path / "link").symlink_to(videos)
    assert index(tmp_path / "link") == 0 and embedded == []


def test_videos_of_an_unmounted_disk_stay_in_the_index(index, videos, tmp_path):
    assert index(videos) == 0
    (videos / "sub/b.mkv").rename(tmp_path / "b.mkv")
    with pytest.raises(InputError, match=r"FOLDER: .*sub is empty, but the index has videos"):
        index(videos)
    (videos / "sub").rmdir()
    (videos / "sub").symlink_to(tmp_path / "unplugged")
    with pytest.raises(InputError, match=r"FOLDER: .*sub is empty, but the index has videos"):
        index(videos)
    assert list(contents(tmp_path / "index")) == NAMES
    (videos / "sub").unlink()
    assert index(videos) == 0
    assert list(contents(tmp_path / "index")) == ["a.mp4", "short.mp4"]


def test_unusable_arguments_of_index_are_rejected_in_one_line(index, run, weights, films, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="FOLDER: there are no videos in"):
        index(tmp_path / "empty")
    with pytest.raises(InputError, match="FOLDER: there is no folder"):
        index(tmp_path / "absent")
    with pytest.raises(InputError, match=r"--out: .* cannot be written"):
        run(*flags(weights, films, tmp_path / "no/index"))
    (tmp_path / "index").write_text("notes of mine")
    with pytest.raises(InputError, match=r"--out: .* is not a search index"):
        index(films)
    assert (tmp_path / "index").read_text() == "notes of mine"
    assert not (tmp_path / "index.lock").exists()


def test_two_processes_do_not_write_one_index(index, films, tmp_path):
    with open(tmp_path / "index.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"--out: .* is being written by another process"):
            index(films)
        assert (tmp_path / "index.lock").exists()
    assert index(films) == 0  # a lock that a killed process left is none


def test_a_vocabulary_of_other_weights_is_rejected(index, weights, films, tmp_path):
    np.save(tmp_path / "few.npy", np.array(WORDS[:2]))
    with pytest.raises(InputError, match=r"few.npy has 2 words, but the word embedding has 5 rows"):
        index(films, f"--token_to_word_path={tmp_path}/few.npy")


# --- query --------------------------------------------------------------------------------------


def test_a_query_prints_the_best_moments(run, made, weights, films, capsys):
    assert run("query", made, "cut the tomato", "--top=3") == 0
    note, *lines = capsys.readouterr().out.splitlines()
    assert note == "not in the vocabulary, ignored: the"
    with torch.inference_mode():
        vector = loaded(weights).text_module(torch.tensor([[1, 2] + [0] * 28]))[0]
    best = [
        (float((embeddings @ vector).max()), name)
        for name, (_, embeddings, _) in contents(made).items()
    ]
    shown = [re.fullmatch(r" *(-?\d+\.\d{2,9}) +(\d+:\d\d-\d+:\d\d)  (.+)", line) for line in lines]
    assert len(shown) == 3 and all(shown)
    scores = [float(match[1]) for match in shown]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(max(best)[0], abs=1e-2)
    assert shown[0][3] == str(films / max(best)[1])
    assert len({match[1] for match in shown}) == 3  # enough digits to tell them apart


def test_a_text_needs_no_quotes(run, made, capsys):
    assert run("query", made, "cut the tomato", "--top=3") == 0
    quoted = capsys.readouterr().out
    assert run("query", made, "cut", "the", "tomato", "--top=3") == 0
    assert capsys.readouterr().out == quoted


def test_a_query_is_also_machine_readable(run, made, films, capsys):
    assert run("query", made, "cut", "the", "tomato", "--top=3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"text", "notes", "moments"}
    assert found["text"] == "cut the tomato"
    assert found["notes"] == ["not in the vocabulary, ignored: the"]
    first, *_ = moments = found["moments"]
    assert len(moments) == 3 and first.keys() == {"score", "start", "end", "path"}
    scores = [moment["score"] for moment in moments]
    assert scores == sorted(scores, reverse=True)
    path = os.path.relpath(first["path"], films)
    (video,) = (video for video in read_index(made).videos if video.path == path)
    assert (first["start"], first["end"]) in zip(
        video.starts.tolist(), video.ends.tolist(), strict=True
    )


def test_videos_that_are_gone_are_named_before_their_paths(run, index, videos, tmp_path, capsys):
    assert index(videos) == 0
    (videos / "a.mp4").rename(tmp_path / "elsewhere.mp4")
    capsys.readouterr()
    assert run("query", tmp_path / "index", "stir") == 0
    fix = "give its present location with --video_path\n"
    assert capsys.readouterr().err == (
        f"warning: 1 of 3 listed videos cannot be found in {videos}; {fix}"
    )
    (tmp_path / "elsewhere.mp4").rename(videos / "a.mp4")
    moved = videos.rename(tmp_path / "moved")
    assert run("query", tmp_path / "index", "stir") == 0
    told = capsys.readouterr()
    assert told.err == (
        f"warning: there is no folder {videos}, where the videos were indexed; {fix}"
    )
    assert f"{videos}/a.mp4" in told.out
    assert run("query", tmp_path / "index", "stir", f"--video_path={moved}") == 0
    told = capsys.readouterr()
    assert told.err == "" and f"{moved}/a.mp4" in told.out
    with pytest.raises(InputError, match="--video_path: there is no folder"):
        run("query", tmp_path / "index", "stir", f"--video_path={tmp_path}/absent")


def test_a_query_prints_no_more_moments_than_exist(run, made, capsys):
    assert run("query", made, "stir", "--top=1000") == 0
    assert 3 <= len(capsys.readouterr().out.splitlines()) < 14  # those that do not overlap


def test_a_query_of_an_index_without_moments_explains_why(run, index, tmp_path, capsys):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_text("no video")
    assert index(tmp_path / "videos") == 1
    capsys.readouterr()
    assert run("query", tmp_path / "index", "stir") == 0
    shown = capsys.readouterr().out
    assert re.match(r"no moments found: 1 video could not be used \(.*a\.mp4.*\); repair", shown)
    assert shown.count("\n") == 1
    assert run("query", tmp_path / "index", "stir", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["moments"] == [] and "could not be used" in found["notes"][0]


def test_words_beyond_the_limit_are_reported(run, made, capsys):
    assert run("query", made, "stir " * 31) == 0
    assert "only the first 30 words count" in capsys.readouterr().out


def script(*given):
    command = [sys.executable, ROOT / "search.py", *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "there is no word in the text"),
        (" ?! \n", "there is no word in the text"),
        ("zebra  Zebra yak", r"none of the words is in the vocabulary \(zebra, yak\)"),
        ("\udcff zebra", r"none of the words is in the vocabulary \(zebra\)"),
        ("x" * 1001, "the text has more than 1000 characters"),
    ],
)
def test_a_text_that_cannot_be_searched_for_is_rejected_in_one_line(run, made, text, named):
    with pytest.raises(InputError, match=named) as refused:
        run("query", made, text)
    assert "\n" not in str(refused.value)


def test_an_input_error_is_one_line_and_exit_status_2(made, weights, films, tmp_path):
    out = tmp_path / "index"
    for given, named in (
        (("query", made, "zebra"), "none of the words is in the vocabulary (zebra)"),
        (("serve", made, "--host=no such host"), "--host, --port: cannot listen at"),
        (flags(weights.with_name("dict.npy"), films, out), "dict.npy"),
    ):
        ended = script(*given)
        assert ended.returncode == 2 and named in ended.stderr
        assert not ended.stdout or given[0] == "index"  # which says what is to do
        assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())  # neither an index nor a lock


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["serve", "INDEX", "--port=70000"], "--port: 70000 is above 65535"),
        (["serve", "INDEX", "--port=x"], "--port: invalid"),
        (["query", "INDEX", "stir", "--top=0"], "--top: 0 is not a number above zero"),
        (["index", "FOLDER", "--out=x"], "--weights"),
        ([], "index|query|serve"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(run, capsys, given, named):
    assert run(*given) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1


def test_absent_files_are_named(run, made, tmp_path):
    with pytest.raises(InputError, match="INDEX: there is no file"):
        run("query", tmp_path / "absent", "stir")
    with pytest.raises(InputError, match="--video_path: there is no folder"):
        run("serve", made, f"--video_path={tmp_path}/absent")


def test_serve_needs_video_path_if_the_folder_is_gone(run, index, videos, tmp_path):
    assert index(videos) == 0
    videos.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=f"--video_path: there is no folder {videos}"):
        run("serve", tmp_path / "index")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_the_output_silently(made, unbuffered):
    command = [sys.executable, ROOT / "search.py", "query", made, "stir zebra"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        process.stdout.close()
        assert process.wait() == 0 and process.stderr.read() == b""


def test_weights_and_words_may_have_moved_but_not_changed(run, made, weights, tmp_path, capsys):
    moved = tmp_path / "moved.pth"
    shutil.copy(weights, moved)
    assert run("query", made, "stir", f"--weights={moved}") == 0
    moved.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"--weights: .*moved.pth is not the file that"):
        run("query", made, "stir", f"--weights={moved}")
    np.save(tmp_path / "other.npy", np.array(WORDS[::-1]))
    with pytest.raises(InputError, match=r"--token_to_word_path: .*other.npy is not the file that"):
        run("query", made, "stir", f"--token_to_word_path={tmp_path}/other.npy")


# --- serve --------------------------------------------------------------------------------------


def test_the_server_prints_its_url_responds_and_stops_at_ctrl_c(made):
    line, errors, moments = use_search_server(made, text="stir", cwd=Path("/"))
    assert re.match(r"(http://127\.0\.0\.1:\d+/) searches \d+ moments; Ctrl-C stops it", line)
    assert b'"thumbnail"' in moments and "Traceback" not in errors
