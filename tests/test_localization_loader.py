"""CrossTask and HTM-Align: which of their videos have files, and where."""

import pytest

from annotations.crosstask import AnnotatedVideo
from annotations.htm_align import Sentence
from crosstask_loader import CrossTask
from htm_align_loader import HTMAlign
from utils import DataError

PAIRS = [("1", "a"), ("1", "b"), ("2", "a"), ("2", "c.x"), ("2", "d")]
STEPS = [AnnotatedVideo(task, video, []) for task, video in PAIRS]
SENTENCES = {name: [Sentence(True, 0, 1, "cut")] for name in ("b", "a", "c")}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_crosstasks_files_are_flat_or_by_task(tmp_path):
    touch(tmp_path, "a.webm", "2/a.mp4", "1/b.mkv", "1/b.mp4", "c.x.mp4", "1/d.mp4")
    dataset = CrossTask(STEPS, tmp_path)
    assert dataset.names == ["1/a", "1/b", "2/a", "2/c.x"]
    found = [path.relative_to(tmp_path).as_posix() for path in dataset.paths]
    assert found == ["a.webm", "1/b.mp4", "a.webm", "c.x.mp4"]
    assert dataset.absent == ["2/d"]
    assert dataset.videos["2/a"] == STEPS[2]


def test_htm_aligns_files_are_flat_and_keep_the_files_order(tmp_path):
    touch(tmp_path, "a.mp4", "b.mkv", "c.avi")
    dataset = HTMAlign(SENTENCES, tmp_path)
    assert (dataset.names, dataset.absent) == (["b", "a"], ["c"])
    assert [path.name for path in dataset.paths] == ["b.mkv", "a.mp4"]
    assert dataset.sentences["a"] == [Sentence(True, 0, 1, "cut")]


def test_without_a_folder_all_videos_are_named():
    assert HTMAlign(SENTENCES, None).names == ["b", "a", "c"]
    assert len(CrossTask(STEPS, None).names) == 5


def test_a_folder_without_any_of_the_videos_is_refused(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    for data_set, annotations in ((CrossTask, STEPS), (HTMAlign, SENTENCES)):
        with pytest.raises(DataError, match="has no video of the annotations; give their folder"):
            data_set(annotations, tmp_path)
