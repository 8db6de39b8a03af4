"""The toy data set has the layouts and formats of the real ones, and can be learned from."""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
import torch

from annotations.crosstask import crosstask_videos
from annotations.htm_align import htm_align_sentences
from annotations.ucf import ucf_table
from tests.helpers import ROOT
from utils import InputError

SCRIPT = ROOT / "data" / "toy" / "prepare.py"
VIDEOS = 6
SMALL = {  # fewer than the script's own, to save time
    "YOUCOOK_VIDEOS": 8,
    "MSRVTT_CLIPS": 10,
    "CROSSTASK_TASKS": 2,
    "CROSSTASK_VIDEOS": 2,
    "HTM_ALIGN_VIDEOS": 2,
}


def run(out, *flags):
    command = [sys.executable, str(SCRIPT), "--out", str(out), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def script():
    """Load the script, which is in no package, as a module."""
    spec = importlib.util.spec_from_file_location("toy_prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_prepare"] = module  # where its processes look for the function to run
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(script, name, value)
        script.prepare(out, VIDEOS, 1)
    return out


def first_frames(path, count=40):
    with av.open(str(path)) as container:
        decoded = itertools.islice(container.decode(video=0), count)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def captions(toy):
    return {path.stem: pd.read_csv(path) for path in sorted((toy / "captions").glob("*.csv"))}


def test_training_files_have_the_real_formats(toy):
    videos = pd.read_csv(toy / "howto100m_videos.csv")
    assert list(videos.columns) == ["video_path"]
    assert len(videos) == VIDEOS
    for path in videos.video_path:
        table = pd.read_csv(toy / "captions" / f"{Path(path).stem}.csv")
        assert list(table.columns) == ["start", "end", "text"]
        assert len(table) >= 6
        assert (table.start >= 0).all()
        assert (table.end > table.start).all()
        assert table.start.is_monotonic_increasing
        with av.open(str(toy / "videos" / path)) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (320, 240)
            assert stream.codec_context.name == "h264"
            assert container.duration / av.time_base >= table.end.max()


def test_the_vocabulary_has_all_words_and_a_vector_for_each(toy):
    words = np.load(toy / "dict.npy", allow_pickle=False)
    vectors = torch.load(toy / "word2vec.pth", weights_only=True)
    assert words.dtype.kind == "U"
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(words) + 1, 300)
    assert (vectors[0] == 0).all()
    assert len(set(words)) == len(words)

    said = {
        word for table in captions(toy).values() for text in table.text for word in text.split()
    }
    assert said == set(words)


def test_words_of_one_kind_have_different_vectors(script, tmp_path):
    """The model's word vectors are frozen, so it cannot learn to tell equal ones apart."""
    script.plan_training(tmp_path, 1, 24)
    script.write_word_vectors(tmp_path, 1)
    words = list(np.load(tmp_path / "dict.npy"))
    vectors = torch.load(tmp_path / "word2vec.pth", weights_only=True)
    for kind in (script.COLOURS, script.SHAPES, script.ACTIONS):
        rows = vectors[[words.index(word) + 1 for word in kind]]
        assert (rows.norm(dim=1) > 0.5).all()
        cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
        assert (cosines - torch.eye(len(rows))).max() < 0.93


def test_youcook_has_the_real_format(toy, script):
    table = pd.read_csv(toy / "validation_youcook.csv")
    assert list(table.columns) == ["end", "start", "task", "text", "video_id"]
    assert len(table) == SMALL["YOUCOOK_VIDEOS"] * script.YOUCOOK_STEPS
    assert table.text.is_unique
    assert (table.end > table.start).all()
    suffixes = set()
    for (task, name), segments in table.groupby(["task", "video_id"]):
        (path,) = (toy / "youcook" / "validation" / str(task)).glob(f"{name}.*")
        suffixes.add(path.suffix)
        with av.open(str(path)) as container:
            assert container.duration / av.time_base >= segments.end.max()
    assert suffixes == {".mp4", ".mkv", ".webm"}


def test_msrvtt_has_the_real_format(toy):
    table = pd.read_csv(toy / "msrvtt_test.csv")
    assert list(table.columns) == ["key", "vid_key", "video_id", "sentence"]
    assert len(table) == SMALL["MSRVTT_CLIPS"]
    assert table.sentence.is_unique
    files = {path.name for path in (toy / "msrvtt").iterdir()}
    assert files == {f"{name}.mp4" for name in table.video_id}


def test_hmdb_has_the_real_format(toy, script):
    table = pd.read_csv(toy / "hmdb51.csv")
    assert list(table.columns) == ["video_id", "label", "split1", "split2", "split3"]
    assert table.video_id.is_unique
    assert set(table.label) == {f"{label}_test" for label in script.HMDB_LABELS}
    for row in table.itertuples():
        assert (toy / "hmdb" / row.label.removesuffix("_test") / row.video_id).suffix == ".avi"
        assert (toy / "hmdb" / row.label.removesuffix("_test") / row.video_id).is_file()
    for split in ("split1", "split2", "split3"):
        counts = table.groupby("label")[split].value_counts().unstack()
        assert (counts[1] == script.HMDB_TRAIN).all()
        assert (counts[2] == script.HMDB_TEST).all()
        assert (counts[0] == script.HMDB_UNUSED).all()


def test_ucf_has_the_real_format(toy, script):
    """This includes the lists' line ends, and a class whose clips have other capitals."""
    lists = {path.stem: path.read_bytes() for path in (toy / "ucfTrainTestlist").iterdir()}
    assert len(lists) == 7
    for content in lists.values():
        assert content.endswith(b"\r\n") and content.count(b"\n") == content.count(b"\r\n")
    table, notes = ucf_table(toy / "ucfTrainTestlist")
    assert notes == [] and set(table.label) == set(script.UCF_CLASSES)
    assert any(label not in name for label, name in zip(table.label, table.video_id, strict=True))
    files = {path.relative_to(toy / "ucf").as_posix() for path in (toy / "ucf").glob("*/*.avi")}
    assert files == set(table.label + "/" + table.video_id)
    for split in ("split1", "split2", "split3"):
        counts = table.groupby("label")[split].value_counts().unstack()
        assert (counts[2] == script.UCF_CLIPS).all()
        assert (counts[1] == script.UCF_CLIPS * (script.UCF_GROUPS - 1)).all()


def duration(path):
    with av.open(str(path)) as container:
        return container.duration / av.time_base


def test_crosstask_has_the_real_format(toy, script):
    tasks, val, _ = crosstask_videos(toy / "crosstask_release", "val")
    _, videos, _ = crosstask_videos(toy / "crosstask_release", "all")
    assert len(tasks) == SMALL["CROSSTASK_TASKS"]
    assert len(videos) == SMALL["CROSSTASK_TASKS"] * SMALL["CROSSTASK_VIDEOS"]
    assert len(val) == SMALL["CROSSTASK_TASKS"] * script.CROSSTASK_VAL
    for video in videos:
        steps = [segment.step for segment in video.segments]
        assert steps == sorted(steps) and len(steps) >= 3  # in the task's order
        path = toy / "crosstask" / video.task / f"{video.video}.mp4"
        assert duration(path) >= max(segment.end for segment in video.segments)


def test_htm_align_has_the_real_format(toy):
    videos, notes = htm_align_sentences(toy / "htm_align.json")
    assert (len(videos), notes) == (SMALL["HTM_ALIGN_VIDEOS"], [])
    for video, sentences in videos.items():
        assert {sentence.alignable for sentence in sentences} == {True, False}
        seconds = duration(toy / "htm_align" / f"{video}.mp4")
        assert seconds > 32  # the length from which the 64 s variant has windows
        assert seconds >= max(sentence.end for sentence in sentences)


@pytest.mark.parametrize(
    "path",
    [
        "videos/toy00000.mp4",
        "youcook/validation/101/toycook0000.mp4",
        "youcook/validation/103/toycook0002.mkv",
        "youcook/validation/103/toycook0007.webm",
        "msrvtt/video0.mp4",
        "hmdb/spin/toy_spin_00.avi",
        "ucf/Slideacross/v_SlideAcross_g01_c01.avi",
        "crosstask/402/toytask402_1.mp4",
        "htm_align/toyalign01.mp4",
    ],
)
def test_files_decode_to_moving_pictures(toy, path):
    video = first_frames(toy / path).astype(np.int16)
    assert video.shape[1:] == (240, 320, 3)
    assert len(video) >= 8
    assert np.abs(np.diff(video, axis=0)).max(axis=(1, 2, 3)).mean() > 10


def test_evaluation_clips_are_held_out(toy):
    """No two files are equal, so no evaluation clip is a training clip."""
    seen = set()
    for path in sorted(toy.glob("**/*.*")):
        if path.suffix in (".mp4", ".mkv", ".webm", ".avi"):
            seen.add(path.read_bytes())
    clips = len(pd.read_csv(toy / "hmdb51.csv")) + len(ucf_table(toy / "ucfTrainTestlist")[0])
    clips += SMALL["YOUCOOK_VIDEOS"] + SMALL["MSRVTT_CLIPS"]
    long = SMALL["CROSSTASK_TASKS"] * SMALL["CROSSTASK_VIDEOS"] + SMALL["HTM_ALIGN_VIDEOS"]
    assert len(seen) == VIDEOS + clips + long


def test_the_same_seed_gives_the_same_files(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "YOUCOOK_VIDEOS", 3)
    monkeypatch.setattr(script, "MSRVTT_CLIPS", 4)
    monkeypatch.setattr(script, "HMDB_LABELS", {"grow": "blue"})
    monkeypatch.setattr(script, "UCF_CLASSES", {"SpinAround": ("SpinAround", "spin", "green")})
    monkeypatch.setattr(script, "CROSSTASK_TASKS", 1)
    monkeypatch.setattr(script, "CROSSTASK_VIDEOS", 1)
    monkeypatch.setattr(script, "HTM_ALIGN_VIDEOS", 1)
    trees = []
    for name, num_videos in ("one", 2), ("two", 2), ("more", 3):
        script.prepare(tmp_path / name, num_videos, 7)
        files = sorted(path for path in (tmp_path / name).glob("**/*") if path.is_file())
        trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    one, two, more = trees
    assert one.keys() == two.keys()
    assert [str(path) for path in one if one[path] != two[path]] == []
    # Nor does the number of training videos change what is evaluated, or the videos themselves.
    settings = {"howto100m_videos.csv", "word2vec.pth", "dict.npy", "settings.json"}
    assert {str(path) for path in one if one[path] != more[path]} <= settings


def test_seeds_and_videos_have_different_steps(script, tmp_path):
    plans = [script.plan_training(tmp_path / str(seed), seed, 2) for seed in (1, 2)]
    steps = [item[1] for plan in plans for item in plan]
    assert all(a != b for i, a in enumerate(steps) for b in steps[:i])


def test_captions_are_displaced_yet_mostly_right(script):
    """As in HowTo100M, a caption may miss its action, sometimes completely."""
    shifts, overlaps, idle = [], [], 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        steps = script.draw_steps(rng, 7)
        rows = script.narrate(rng, steps, steps[-1].end + 1)
        idle += sum(text in script.FILLERS for _, _, text in rows)
        spoken = {}
        for start, end, text in rows:
            spoken.setdefault(text, []).append((start, end))
        for step in steps:
            saying = [script.describe(step, template) for template in script.NARRATIONS]
            heard = [times for text in saying for times in spoken.get(text, ())]
            assert heard, step
            if len(heard) == 1:
                ((start, end),) = heard
                shifts.append((start + end - step.start - step.end) / 2)
                overlap = min(end, step.end) - max(start, step.start)
                overlaps.append(overlap / (end - start))
    assert 0.5 < np.std(shifts) < 2
    assert np.abs(shifts).max() < 5
    assert 0.6 < np.mean(np.array(overlaps) > 0.5) < 0.95
    assert 40 < idle < 40 * 7


def test_drift_moves_captions_and_changes_nothing_else(script, tmp_path):
    plans = {drift: script.plan_training(tmp_path / str(drift), 1, 3, drift) for drift in (0, 1, 3)}
    assert len({repr([item[1:] for item in plan]) for plan in plans.values()}) == 1  # the videos
    off, said = {}, []
    for drift, plan in plans.items():
        rows = [pd.read_csv(path) for path in sorted((tmp_path / str(drift)).glob("captions/*"))]
        said.append([sorted(table.text) for table in rows])
        off[drift] = []
        for table, (_, steps, _, _) in zip(rows, plan, strict=True):
            talk = table[~table.text.isin(script.FILLERS)]
            for step in steps:
                saying = [script.describe(step, template) for template in script.NARRATIONS]
                heard = talk[talk.text.isin(saying)]
                if len(heard) == 1:
                    middle = (heard.start.iloc[0] + heard.end.iloc[0]) / 2
                    off[drift].append(middle - (step.start + step.end) / 2)
    assert said[0] == said[1] == said[2]
    assert np.abs(off[0]).max() < 0.02  # whole hundredths of a second
    assert 0.5 < np.std(off[1]) < np.std(off[3])


def test_shapes_and_actions_look_different(script):
    """Compare a still of each shape and a clip of each action, which are otherwise alike."""

    def clip(action, shape):
        thing = ("red", shape)
        step = script.Step(action, thing, ("blue", "box"), 0.0, 2.0)
        drawn = script.draw_frames(np.random.default_rng(5), [step], 2.0, 8)
        return np.stack(list(drawn)).astype(int)

    stills = [clip("spin", shape)[0] for shape in script.SHAPES]
    clips = [clip(action, "box") for action in script.ACTIONS]
    for group in (stills, clips):
        for i, a in enumerate(group):
            for b in group[:i]:
                assert (np.abs(a - b).max(axis=-3) > 40).mean() > 0.002


def test_second_run_reuses_the_first(toy):
    before = {path: path.stat().st_mtime_ns for path in toy.glob("**/*")}
    done = run(toy, "--num_videos", VIDEOS)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in toy.glob("**/*")} == before


def test_an_incomplete_folder_is_completed_and_a_foreign_one_refused(script, tmp_path, monkeypatch):
    # Only whether it starts to draw matters here; the drawing itself is tested above.
    class Started(Exception):
        pass

    def start(*_):
        raise Started

    monkeypatch.setattr(script, "plan_youcook", start)

    mine = tmp_path / "mine"
    (mine / "videos").mkdir(parents=True)
    (mine / "settings.json").write_text("{}")  # a run that was stopped while it moved its files
    with pytest.raises(Started):
        script.prepare(mine, 1, 1)
    assert (mine / "videos").exists()  # nothing is removed before its replacement exists

    theirs = tmp_path / "theirs"
    (theirs / "videos").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--out: .*videos is not from this script"):
        script.prepare(theirs, 1, 1)
    assert list(theirs.iterdir()) == [theirs / "videos"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_videos", "0"], "--num_videos"),
        (["--num_videos", "many"], "--num_videos"),
        (["--seed", "-1"], "--seed"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(tmp_path, flags, named):
    done = run(tmp_path, *flags)
    assert done.returncode == 2
    assert named in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(tmp_path / "file" / "toy", "--num_videos", 1)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert done.stderr.count("\n") == 1
