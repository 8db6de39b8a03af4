"""CrossTask's release folder: tasks, lists of videos, annotations."""

import pytest

from annotations.crosstask import AnnotatedVideo, Task, crosstask_videos
from utils import DataError

TASKS = """\
101
Make Pancakes
toy:101
3
pour milk,whisk mixture,flip pancake

202
Change a Tire
toy:202
2
jack up, put things back
"""
LISTS = {
    "videos.csv": "101,a_0,toy:a\n101,b,toy:b,c\n202,a_0,toy:a\n999,r,toy:r\n101,bare,toy:bare\n",
    "videos_val.csv": "101,b,toy:b\n",
}
LINES = {
    "101_a_0": "1,0,2.5\n3,10.25,12\n1,30,31\n",
    "101_b": "2,1,1\n",
    "202_a_0": "",
    "303_unlisted": "1,0,1\n",
}


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "crosstask_release"
    (folder / "annotations").mkdir(parents=True)
    (folder / "tasks_primary.txt").write_text(TASKS)
    for name, text in LISTS.items():
        (folder / name).write_text(text)
    for name, text in LINES.items():
        (folder / "annotations" / f"{name}.csv").write_text(text)
    return folder


A = AnnotatedVideo("101", "a_0", [(1, 0, 2.5), (3, 10.25, 12), (1, 30, 31)])
B = AnnotatedVideo("101", "b", [(2, 1, 1)])
OTHER_A = AnnotatedVideo("202", "a_0", [])


@pytest.mark.parametrize(
    ("subset", "expected"), [("test", [A, OTHER_A]), ("val", [B]), ("all", [A, B, OTHER_A])]
)
def test_the_annotated_videos_of_a_subset_are_read(release, subset, expected):
    tasks, videos, notes = crosstask_videos(release, subset)
    assert tasks == {
        "101": Task("Make Pancakes", ["pour milk", "whisk mixture", "flip pancake"]),
        "202": Task("Change a Tire", ["jack up", "put things back"]),
    }
    assert videos == expected
    unlisted = "skipped: 1 video with annotations that videos.csv does not list"
    if subset == "val":
        assert notes == [unlisted]
    else:
        assert notes == [
            "skipped: 1 video of related tasks",
            "skipped: 1 video without annotations",
            unlisted,
        ]


@pytest.mark.parametrize("ends", ["", "\n", "\n\n", "\r\n\r\n"])
def test_the_last_task_need_not_end_with_an_empty_line(release, ends):
    text = TASKS.strip().replace("\n", "\r\n" if "\r" in ends else "\n") + ends
    (release / "tasks_primary.txt").write_bytes(text.encode())
    assert list(crosstask_videos(release, "all")[0]) == ["101", "202"]


def test_a_video_that_is_listed_twice_is_read_once(release):
    (release / "videos.csv").write_text("101,a_0,x\n101,a_0,x\n")
    assert crosstask_videos(release, "test")[1] == [A]


def test_blank_first_lines_and_separators_in_a_title_do_not_shift_tasks(release):
    title = "Make\u2028Pan\x0bcakes\x85"
    (release / "tasks_primary.txt").write_text("\n" + TASKS.replace("Make Pancakes", title))
    tasks, _, _ = crosstask_videos(release, "all")
    assert list(tasks) == ["101", "202"] and tasks["101"].title == title.strip()


def refusal(release, subset="all"):
    with pytest.raises(DataError) as refused:
        crosstask_videos(release, subset)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", ["tasks_primary.txt", "videos.csv", "videos_val.csv"])
def test_a_missing_file_is_named(release, name):
    (release / name).unlink()
    assert f"has no {name}; " in refusal(release)


def test_a_folder_without_annotations_is_refused_and_so_is_a_file(release):
    assert "is not a folder" in refusal(release / "videos.csv")
    (release / "annotations").rename(release / "elsewhere")
    assert "has no annotations; " in refusal(release)
    (release / "annotations").write_text("a file")
    assert "annotations: is not a folder" in refusal(release)
    (release / "annotations").unlink()
    (release / "annotations").mkdir()
    assert "has no annotated video of the subset val" in refusal(release, "val")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("0,1,2", "'0' is not a step from 1 to 3"),
        ("4,1,2", "'4' is not a step from 1 to 3"),
        ("-1,1,2", "'-1' is not a step"),
        ("1.5,1,2", "'1.5' is not a step"),
        ("1,-1,2", "'-1' is not a time"),
        ("1,nan,2", "'nan' is not a time"),
        ("1,0,inf", "'inf' is not a time"),
        ("1,2,1.5", "ends at 1.5, before it starts"),
        ("1,2", "'1,2' has fewer than 3 cells"),
        ("1,2,3,4", "'3,4' is not a time"),
    ],
)
def test_a_bad_segment_is_named_with_its_line(release, line, fault):
    (release / "annotations" / "101_b.csv").write_text(f"1,0,1\n\n{line}\n")
    message = refusal(release)
    assert "101_b.csv, line 3: " in message and fault in message and message.endswith("fix it")


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("3\npour", "4\npour", "line 1: the task '101' has 3 steps, not '4' as stated"),
        ("2\njack up, put things back", "0\n", "line 7: a task is five lines"),
        ("3\npour milk,whisk mixture,flip pancake", "0\n", "line 1: a step of task '101' is empty"),
        ("jack up,", "jack up,,", "line 7: a step of task '202' is empty"),
        ("\n202\n", "\n101\n", "line 7: the task '101' is duplicated"),
        ("pancake\n\n", "pancake\n", "line 1: a task is five lines"),
        ("\n202\n", "\n../x\n", "leads out of the data's folder"),
        (TASKS, "\n", "has no tasks"),
    ],
)
def test_a_bad_task_is_named_with_its_line(release, old, new, fault):
    assert TASKS.count(old) == 1
    (release / "tasks_primary.txt").write_text(TASKS.replace(old, new))
    assert fault in refusal(release)


def test_a_list_with_a_bad_row_or_an_unknown_task_is_refused(release):
    (release / "videos_val.csv").write_text("101,b,x\n101\n")
    assert "videos_val.csv, line 2: '101' has fewer than 3 cells" in refusal(release)
    (release / "videos_val.csv").write_text("101,../b,x\n")
    assert "videos_val.csv, line 1: '../b' leads out" in refusal(release)
    (release / "videos_val.csv").write_text("101,b,x\n303,unlisted,x\n")
    assert "line 2: video 'unlisted' is annotated, but its task '303' is not in" in refusal(release)
