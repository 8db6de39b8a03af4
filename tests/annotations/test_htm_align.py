"""HTM-Align's official JSON."""

import json

import pytest

from annotations.htm_align import Sentence, htm_align_sentences
from utils import DataError

GOOD = {
    "vid-2": [[0, 1.5, 2, "hello there"], [1, 10, 12.25, "cut the\nonion"]],
    "vid_1": [[1, 3, 3, ""]],
}


def write(folder, content):
    path = folder / "htm_align.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_videos_and_sentences_keep_the_files_order(tmp_path):
    videos, notes = htm_align_sentences(write(tmp_path, GOOD))
    assert list(videos) == ["vid-2", "vid_1"]
    first = [Sentence(False, 1.5, 2, "hello there"), Sentence(True, 10, 12.25, "cut the\nonion")]
    assert videos["vid-2"] == first
    assert notes == ["1 empty sentence"]


def test_sentences_that_end_before_they_start_are_noted(tmp_path):
    _, notes = htm_align_sentences(write(tmp_path, {"v": [[1, 5, 4, "cut"]]}))
    assert notes == ["1 sentence with the end before the start"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (json.dumps(GOOD)[:-20], "is not JSON"),
        ('{"v": [[1, 0, 1, "a"]], "v": []}', "the key 'v' is duplicated"),
        ("[]", "is not an object of videos"),
        ("{}", "has no videos"),
        ({"v": []}, "video 'v': '[]' is not a list of sentences"),
        ({"v": {"a": 1}}, "is not a list of sentences"),
        ({"v": [[1, 0, 1, "a"], [1, 0, "a"]]}, "video 'v', sentence 2: "),
        ({"v": [[2, 0, 1, "a"]]}, "alignable is '2', not 0 or 1"),
        ({"v": [["1", 0, 1, "a"]]}, "alignable is '1', not 0 or 1"),
        ({"v": [[1, -1, 1, "a"]]}, "'[-1, 1]' are not times"),
        ({"v": [[1, "0", 1, "a"]]}, "are not times"),
        ('{"v": [[1, 0, NaN, "a"]]}', "are not times"),
        ({"v": [[1, 0, 1, None]]}, "'None' is not a string"),
        ({"\ud800": [[1, 0, 1, "a"]]}, "htm_align.json: '\\ud800' is not Unicode"),
        ({"../v": [[1, 0, 1, "a"]]}, "leads out of the data's folder"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line(tmp_path, content, fault):
    path = write(tmp_path, content)
    with pytest.raises(DataError) as refused:
        htm_align_sentences(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and fault in message
