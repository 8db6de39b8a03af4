"""The two retrieval data sets: which stretch of which file, at which windows."""

import pytest
import torch

from annotations.msrvtt import msrvtt_table
from annotations.youcook import youcook_table
from msrvtt_loader import MSRVTT
from retrieval_loader import window_starts
from s3dg import Tokenizer
from tests.helpers import frames_digest, golden_frames, write_csv
from utils import DataError
from video_decoder import ClipSpec
from youcook_loader import YouCook2

TOKENIZER = Tokenizer(["cut", "the", "tomato"], 30)
YOUCOOK = ("end", "start", "task", "text", "video_id")
MSRVTT_COLUMNS = ("key", "vid_key", "video_id", "sentence")


def test_windows_are_evenly_spaced_and_leave_a_margin_at_the_end():
    clip = ClipSpec(num_frames=16, fps=5)
    starts = window_starts(1, 8, clip=clip, num_windows=4)
    assert starts == pytest.approx([1, 1 + 3.4 / 3, 1 + 6.8 / 3, 4.4])
    assert window_starts(1, 3, clip=clip, num_windows=3) == [1, 1, 1]


def youcook(path, root, **settings):
    return YouCook2(youcook_table(path)[0], root, TOKENIZER, **settings)


def msrvtt(path, root, **settings):
    return MSRVTT(msrvtt_table(path)[0], root, TOKENIZER, **settings)


@pytest.fixture
def youcook_root(tmp_path, shared_videos):
    """Link the shared clips into the folders of YouCook2."""
    folder = tmp_path / "validation" / "101"
    folder.mkdir(parents=True)
    for clip in shared_videos.iterdir():
        (folder / clip.name).symlink_to(clip)
    return tmp_path


@pytest.mark.parametrize(
    "row", [r for r in golden_frames("windows") if r["video"].endswith(("mp4", "mkv"))], ids=str
)
def test_youcook_items_match_the_golden_windows(row, youcook_root):
    video_id = row["video"].split(".")[0]
    write_csv(youcook_root / "t.csv", YOUCOOK, (row["end"], row["start"], 101, "cut", video_id))
    clip = ClipSpec(row["num_frames"], row["size"], row["fps"])
    table = youcook_root / "t.csv"
    dataset = youcook(table, youcook_root, clip=clip, num_windows=row["num_clip"])
    item = dataset[0]
    assert dataset.pairs[0].text == "cut"
    assert dataset.item_spec == {"video": (item["video"].shape, item["video"].dtype)}
    assert item["video"].dtype == torch.uint8
    assert dataset.path(0) == youcook_root / "validation" / "101" / row["video"]
    assert [frames_digest(window) for window in item["video"]] == row["sha256"]


def test_msrvtt_windows_span_the_whole_video(tmp_path, shared_videos):
    (tmp_path / "video1.mp4").symlink_to(shared_videos / "v_GGSY1Qvo990.mp4")
    write_csv(tmp_path / "m.csv", MSRVTT_COLUMNS, ("ret0", "msr1", "video1", "cut"))
    settings = {"clip": ClipSpec(size=32), "num_windows": 2}
    whole = msrvtt(tmp_path / "m.csv", tmp_path, **settings)[0]["video"]
    folder = tmp_path / "validation" / "1"
    folder.mkdir(parents=True)
    (folder / "video1.mp4").symlink_to(shared_videos / "v_GGSY1Qvo990.mp4")
    write_csv(tmp_path / "y.csv", YOUCOOK, (18.04, 0, 1, "cut", "video1"))
    stated = youcook(tmp_path / "y.csv", tmp_path, **settings)[0]["video"]
    assert torch.equal(whole[0], stated[0])
    assert whole[1].float().mean() > 10  # the last window lies in the video


def test_absent_videos_are_counted_and_missing_sentences_are_empty(youcook_root):
    rows = [(4, 1, 101, "", "h265_video"), (4, 1, 101, "cut", "absent"), (4, 1, 9, "cut", "x")]
    write_csv(youcook_root / "t.csv", YOUCOOK, *rows)
    dataset = youcook(youcook_root / "t.csv", youcook_root)
    assert (len(dataset), dataset.num_missing) == (1, 2)
    assert dataset.tokenizer(dataset.pairs[0].text).tolist() == [0] * 30


def test_a_video_that_cannot_be_decoded_is_an_item_with_an_error(tmp_path):
    (tmp_path / "video1.mp4").write_text("no video")
    write_csv(tmp_path / "m.csv", MSRVTT_COLUMNS, ("ret0", "msr1", "video1", "cut"))
    item = msrvtt(tmp_path / "m.csv", tmp_path)[0]
    assert "video1.mp4" in item["error"] and "video" not in item


@pytest.mark.parametrize("times", [(5, -3), ("inf", 1), ("", 1), (1e12, 1), ("soon", 1)])
def test_invalid_times_are_refused_with_their_line(times, tmp_path):
    write_csv(tmp_path / "t.csv", YOUCOOK, (4, 1, 1, "cut", "a"), (*times, 1, "cut", "a"))
    with pytest.raises(DataError, match=r"t\.csv, line 3: column"):
        youcook_table(tmp_path / "t.csv")


def test_a_folder_without_any_video_of_the_table_is_refused(shared_csv, tmp_path):
    with pytest.raises(DataError, match="has no video of the table") as caught:
        youcook(shared_csv / "validation_youcook.csv", tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(DataError, match="has no video of the table"):
        msrvtt(shared_csv / "msrvtt_test.csv", tmp_path)
