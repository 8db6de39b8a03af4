"""The two data sets of action recognition: which clips, of which class, at which windows."""

import pandas as pd
import pytest

from annotations.clips import COLUMNS
from annotations.hmdb import hmdb_table
from annotations.ucf import ucf_table
from hmdb_loader import HMDB51
from tests.helpers import frames_digest, golden_frames, write_csv
from ucf_loader import UCF101
from utils import DataError
from video_decoder import ClipSpec


def hmdb(path, root, **settings):
    return HMDB51(hmdb_table(path)[0], root, **settings)


@pytest.mark.parametrize("row", golden_frames("hmdb"), ids=lambda row: row["video"])
def test_items_match_the_golden_windows(row, tmp_path, shared_videos):
    (tmp_path / "wave").mkdir()
    (tmp_path / "wave" / row["video"]).symlink_to(shared_videos / row["video"])
    write_csv(tmp_path / "t.csv", COLUMNS, (row["video"], "wave_test", 1, 2, 0))
    clip = ClipSpec(row["num_frames"], row["size"])
    dataset = hmdb(tmp_path / "t.csv", tmp_path, clip=clip, num_windows=row["num_clip"])
    assert dataset.labels.tolist() == ["wave"] and dataset.splits.tolist() == [[1, 2, 0]]
    video = dataset[0]["video"]
    assert dataset.item_spec == {"video": (video.shape, video.dtype)}
    assert [frames_digest(window) for window in video] == row["sha256"]


def test_the_class_is_the_folder_with_its_own_capitals(tmp_path):
    """This holds for HMDB-51 too, whose tables add a suffix to the class."""
    clips = [("a.avi", "wave_test", 1, 1, 1), ("b.avi", "wave_test", 2, 2, 2)]
    write_csv(tmp_path / "t.csv", COLUMNS, *clips)
    assert hmdb(tmp_path / "t.csv", None).names == ["wave/a.avi", "wave/b.avi"]
    clip = ("v_HandStandPushups_g08_c01.avi", "HandstandPushups", 1, 2, 0)
    write_csv(tmp_path / "t.csv", COLUMNS, clip, ("a.avi", "wave_test", 2, 2, 2))
    dataset = UCF101(ucf_table(tmp_path / "t.csv")[0], None)
    assert dataset.names == ["HandstandPushups/v_HandStandPushups_g08_c01.avi", "wave_test/a.avi"]
    assert dataset.labels.tolist() == ["HandstandPushups", "wave_test"]
    assert dataset.splits.tolist() == [[1, 2, 0], [2, 2, 2]]


def test_absent_clips_are_counted_and_broken_ones_are_errors(tmp_path):
    (tmp_path / "wave").mkdir()
    (tmp_path / "wave" / "a.avi").write_text("no video")
    rows = [("a.avi", "wave_test", 1, 1, 1), ("b.avi", "wave_test", 2, 2, 2)]
    write_csv(tmp_path / "t.csv", COLUMNS, *rows)
    dataset = hmdb(tmp_path / "t.csv", tmp_path)
    assert (dataset.names, dataset.absent) == (["wave/a.avi"], ["wave/b.avi"])
    assert len(dataset) == 1
    assert "a.avi" in dataset[0]["error"]
    assert dataset.path(0) == tmp_path / "wave" / "a.avi"


def test_without_a_folder_all_clips_of_the_table_are_listed(tmp_path):
    rows = [("a.avi", "wave_test", 1, 1, 1), ("b.avi", "wave_test", 2, 2, 0)]
    write_csv(tmp_path / "t.csv", COLUMNS, *rows)
    dataset = hmdb(tmp_path / "t.csv", None)
    assert (dataset.names, dataset.absent) == (["wave/a.avi", "wave/b.avi"], [])
    assert dataset.labels.tolist() == ["wave", "wave"]
    assert dataset.splits.tolist() == [[1, 1, 1], [2, 2, 0]]


def test_an_invalid_part_of_a_split_is_refused(tmp_path):
    write_csv(tmp_path / "t.csv", COLUMNS, ("a.avi", "wave_test", 1, 3, 1))
    with pytest.raises(DataError, match="splits"):
        hmdb(tmp_path / "t.csv", tmp_path)


def test_the_official_table_is_read_completely(shared_csv, tmp_path):
    table = pd.read_csv(shared_csv / "hmdb51.csv")
    for row in table.itertuples():
        path = tmp_path / row.label.removesuffix("_test") / row.video_id
        path.parent.mkdir(exist_ok=True)
        path.touch()
    dataset = hmdb(shared_csv / "hmdb51.csv", tmp_path)
    assert len(dataset) == 6766 and len(set(dataset.labels)) == 51
    for split in range(3):
        parts = dataset.splits[:, split]
        assert ((parts == 1).sum(), (parts == 2).sum()) == (3570, 1530)
