"""The two retrieval data sets: which stretch of which file, at which windows."""

import pytest
import torch

from msrvtt_loader import MSRVTT
from retrieval_loader import window_starts
from s3dg import Tokenizer
from tests.helpers import frames_digest, golden_frames, write_csv
from utils import InputError
from youcook_loader import YouCook2

TOKENIZER = Tokenizer(["cut", "the", "tomato"], 30)
YOUCOOK = ("end", "start", "task", "text", "video_id")
MSRVTT_COLUMNS = ("key", "vid_key", "video_id", "sentence")


def test_windows_are_evenly_spaced_and_spare_the_end():
    starts = window_starts(1, 8, num_frames=16, fps=5, num_windows=4)
    assert starts == pytest.approx([1, 1 + 3.4 / 3, 1 + 6.8 / 3, 4.4])
    assert window_starts(1, 3, num_frames=16, fps=5, num_windows=3) == [1, 1, 1]


@pytest.fixture
def youcook_root(tmp_path, shared_videos):
    """The shared clips in YouCook2's folders."""
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
    dataset = YouCook2(
        youcook_root / "t.csv",
        youcook_root,
        TOKENIZER,
        num_frames=row["num_frames"],
        size=row["size"],
        fps=row["fps"],
        num_windows=row["num_clip"],
    )
    item = dataset[0]
    assert item["text"].tolist() == [1] + [0] * 29
    assert dataset.item_spec == {"video": (item["video"].shape, item["video"].dtype)}
    assert item["video"].dtype == torch.uint8
    assert dataset.path(0) == youcook_root / "validation" / "101" / row["video"]
    assert [frames_digest(window) for window in item["video"]] == row["sha256"]


def test_msrvtt_windows_span_the_whole_video(tmp_path, shared_videos):
    (tmp_path / "video1.mp4").symlink_to(shared_videos / "v_GGSY1Qvo990.mp4")
    write_csv(tmp_path / "m.csv", MSRVTT_COLUMNS, ("ret0", "msr1", "video1", "cut"))
    whole = MSRVTT(tmp_path / "m.csv", tmp_path, TOKENIZER, size=32, num_windows=2)[0]["video"]
    folder = tmp_path / "validation" / "1"
    folder.mkdir(parents=True)
    (folder / "video1.mp4").symlink_to(shared_videos / "v_GGSY1Qvo990.mp4")
    write_csv(tmp_path / "y.csv", YOUCOOK, (18.04, 0, 1, "cut", "video1"))
    stated = YouCook2(tmp_path / "y.csv", tmp_path, TOKENIZER, size=32, num_windows=2)[0]["video"]
    assert torch.equal(whole[0], stated[0])
    assert whole[1].float().mean() > 10  # the last window lies in the video


def test_absent_videos_are_counted_and_missing_sentences_are_empty(youcook_root):
    rows = [(4, 1, 101, "", "h265_video"), (4, 1, 101, "cut", "absent"), (4, 1, 9, "cut", "x")]
    write_csv(youcook_root / "t.csv", YOUCOOK, *rows)
    dataset = YouCook2(youcook_root / "t.csv", youcook_root, TOKENIZER, size=16)
    assert (len(dataset), dataset.num_missing) == (1, 2)
    assert dataset[0]["text"].tolist() == [0] * 30


def test_a_video_that_cannot_be_decoded_is_an_item_with_an_error(tmp_path):
    (tmp_path / "video1.mp4").write_text("no video")
    write_csv(tmp_path / "m.csv", MSRVTT_COLUMNS, ("ret0", "msr1", "video1", "cut"))
    item = MSRVTT(tmp_path / "m.csv", tmp_path, TOKENIZER)[0]
    assert "video1.mp4" in item["error"] and "video" not in item


@pytest.mark.parametrize("times", [(5, -3), ("inf", 1), ("", 1), (1e12, 1), ("soon", 1)])
def test_times_that_are_none_are_refused_by_line(times, tmp_path):
    write_csv(tmp_path / "t.csv", YOUCOOK, (4, 1, 1, "cut", "a"), (*times, 1, "cut", "a"))
    with pytest.raises(InputError, match=r"t\.csv, line 3, column"):
        YouCook2(tmp_path / "t.csv", tmp_path, TOKENIZER)


def test_the_official_tables_are_read(shared_csv, tmp_path):
    with pytest.raises(InputError, match="--eval_video_root"):
        YouCook2(shared_csv / "validation_youcook.csv", tmp_path, TOKENIZER)
    with pytest.raises(InputError, match="--eval_video_root"):
        MSRVTT(shared_csv / "msrvtt_test.csv", tmp_path, TOKENIZER)
