"""The index of a search: what is refused as one, and the moments that are found in it."""

import numpy as np
import pytest
import torch

from utils import DataError
from video_search.index import (
    IndexMetadata,
    Video,
    best_moments,
    explain_no_moments,
    format_scores,
    format_timestamp,
    get_moment,
    read_index,
    write_index,
)

ABOUT = IndexMetadata(
    "/films", {"num_frames": 10, "fps": 5}, "/w.pth", "/dict.npy"
)  # windows of 2 seconds


def video_of(path, starts, embeddings, reason=""):
    starts = torch.tensor(starts, dtype=torch.float64)
    return Video(path, 1, 2, reason, starts, torch.as_tensor(embeddings).float())


@pytest.fixture
def make_index(tmp_path):
    def make(*videos):
        write_index(tmp_path / "index", ABOUT, videos)
        return read_index(tmp_path / "index")

    return make


def random_videos(seed, count=6, dim=4):
    """Videos of different lengths and strides, one without windows, with scores that are ties."""
    generator = torch.Generator().manual_seed(seed)
    videos = []
    for number in range(count):
        windows, stride = 5 * number, (0.5, 1.0, 2.0, 3.0)[number % 4]
        embeddings = torch.randint(-3, 4, (windows, dim), generator=generator)
        videos.append(video_of(f"{number}.mp4", [k * stride for k in range(windows)], embeddings))
    return videos


def brute_force(videos, query, count):
    """[(video, start, score)]: all windows, sorted, without those that overlap a better one."""
    windows = [
        (-float(vector @ query), number, float(start))
        for number, video in enumerate(videos)
        for start, vector in zip(video.starts, video.embeddings, strict=True)
    ]
    found = []
    for score, number, start in sorted(windows):
        if all(number != other or abs(start - at) >= 2 - 1e-9 for other, at, _ in found):
            found.append((number, start, -score))
    return found[:count]


def as_found(moments):
    return [(found.video, found.start, found.score) for found in moments]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_best_moments_equal_those_of_a_brute_force_search(make_index, seed, count):
    videos = random_videos(seed)
    query = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = brute_force(videos, query, count)
    moments = best_moments(make_index(*videos), query, count)
    assert as_found(moments) == expected
    assert len(moments) == count or (count == 1000 and len(moments) < 75)
    assert all(found.end == found.start + 2 for found in moments)


def test_windows_that_overlap_a_better_one_are_dropped_and_adjacent_ones_kept(make_index):
    index = make_index(
        video_of("a.mp4", [0, 1, 2, 3, 4], [[1], [5], [9], [8], [2]]),
        video_of("b.mp4", [2], [[7]]),  # at the same time, of another video
    )
    found = best_moments(index, torch.ones(1), 10)
    assert as_found(found) == [(0, 2.0, 9.0), (1, 2.0, 7.0), (0, 4.0, 2.0), (0, 0.0, 1.0)]
    assert [one.row for one in found] == [2, 5, 4, 0]
    assert [get_moment(index, one.row, one.score) for one in found] == found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_window_with_a_score_that_is_not_finite_is_never_found(make_index, value):
    index = make_index(video_of("a.mp4", [0, 5, 10], [[value], [1], [2]]))
    assert as_found(best_moments(index, torch.ones(1), 3)) == [(0, 10.0, 2.0), (0, 5.0, 1.0)]
    assert best_moments(index, torch.full((1,), float("nan")), 3) == []


def test_an_empty_index_has_no_moments(make_index):
    assert best_moments(make_index(), torch.ones(4), 3) == []
    unusable = video_of("a.mp4", [], torch.zeros(0, 4), "broken")
    assert best_moments(make_index(unusable), torch.ones(4), 3) == []


@pytest.mark.parametrize(
    ("videos", "reason"),
    [
        ([video_of("a.mp4", [], [])], "the videos show nothing but black; index others"),
        (
            [video_of("a.mp4", [], []), video_of("b.mp4", [], [], "b.mp4: broken")],
            "1 video could not be used (b.mp4: broken), and the others show nothing but black; "
            "repair them, or index others",
        ),
        (
            [video_of("a.mp4", [0], [[np.nan, 1]])],
            "no score is a finite number; index the videos again, with other weights",
        ),
    ],
)
def test_a_search_without_moments_is_explained(make_index, videos, reason):
    index = make_index(*videos)
    assert best_moments(index, torch.ones(2), 3) == []
    assert explain_no_moments(index) == reason


def test_an_index_is_read_as_written_whatever_the_order(make_index):
    videos = [*random_videos(0), video_of("sub/\udcff ü.mkv", [], torch.zeros(0, 4), "broken")]
    index = make_index(*reversed(videos))
    assert index.metadata == ABOUT and len(index.videos) == len(videos)
    for read, video, first in zip(index.videos, videos, index.first, strict=True):
        assert read[:4] == video[:4]
        assert torch.equal(read.starts, video.starts)
        assert torch.equal(read.embeddings, video.embeddings)
        assert torch.equal(index.embeddings[first : first + len(video.starts)], video.embeddings)


def content_of(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "another"}, "is not a search index"),
        ({"version": 2}, "of version 2, not 1"),
        ({"paths": ["a.mp4", "../b.mp4"]}, "damaged .*is not a video in the folder"),
        ({"paths": ["a.mp4", "/etc/passwd"]}, "damaged .*is not a video in the folder"),
        ({"paths": ["a.mp4", "b.txt"]}, "damaged .*is not a video in the folder"),
        ({"paths": ["a.mp4", "b\0.mp4"]}, "damaged .*is not a video in the folder"),
        ({"paths": ["a.mp4"]}, "damaged"),
        ({"paths": ["a.mp4", 3]}, "damaged"),
        ({"reasons": [""]}, "damaged"),
        ({"sizes": torch.zeros(3)}, "damaged"),
        ({"windows": torch.tensor([2, 2])}, "do not add up"),
        ({"windows": torch.tensor([4, -1])}, "damaged"),
        ({"starts": torch.zeros(3)}, "another type"),
        ({"embeddings": torch.zeros(3, 1).double()}, "another type"),
        ({"embeddings": torch.zeros(2, 1)}, "do not add up"),
        ({"embeddings": None}, "damaged"),
        ({"settings": {"num_frames": 10, "fps": 0}}, "damaged"),
        ({"settings": {}}, "damaged"),
        ({"folder": None}, "damaged"),
    ],
)
def test_a_damaged_index_is_rejected_in_one_line(make_index, tmp_path, change, named):
    make_index(video_of("a.mp4", [0, 1], [[1], [2]]), video_of("b.mp4", [0], [[1]]))
    path = tmp_path / "index"
    torch.save({**content_of(path), **change}, path)
    with pytest.raises(DataError, match=f"{path}: .*{named}") as refused:
        read_index(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", "half", "pickle", "list"])
def test_a_file_that_is_not_an_index_is_rejected(make_index, tmp_path, content):
    make_index(*random_videos(0))
    path = tmp_path / "index"
    if content == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "pickle":
        np.save(path.with_suffix(".npy"), np.array([{}]), allow_pickle=True)
        path = path.with_suffix(".npy")
    elif content == "list":
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"is not a search index, or damaged; .*delete it"):
        read_index(path)


def test_a_failed_write_is_one_line_and_keeps_the_old_file(make_index, tmp_path, monkeypatch):
    before = make_index(*random_videos(0))

    def full(content, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos\n 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match=r"could not be written \(unexpected pos 64 vs 0\)"):
        write_index(tmp_path / "index", ABOUT, [])
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert len(read_index(tmp_path / "index").starts) == len(before.starts)


def test_scores_have_two_decimals_or_as_many_as_tell_them_apart():
    assert format_scores([]) == []
    assert format_scores([12.0, 3.456, -0.5]) == ["12.00", "3.46", "-0.50"]
    assert format_scores([2.0013, 2.0011, 2.0011]) == ["2.0013", "2.0011", "2.0011"]
    neighbours = torch.tensor([2.0, 2.0]).nextafter(torch.tensor([2.0, 3.0])).tolist()
    assert format_scores(neighbours) == ["2.0000000", "2.0000002"]


def test_timestamps_have_hours_only_if_needed():
    assert [format_timestamp(s) for s in (0, 59, 61, 3599, 3600, 36061)] == [
        "0:00", "0:59", "1:01", "59:59", "1:00:00", "10:01:01",
    ]  # fmt: skip


def test_an_index_without_stored_ends_is_read(make_index, tmp_path):
    videos = [video_of("a.mp4", [0, 1], [[1, 0], [0, 1]]), video_of("short.mp4", [0], [[1, 1]])]
    make_index(*videos)
    content = torch.load(tmp_path / "index", weights_only=True)
    del content["ends"]
    torch.save(content, tmp_path / "index")
    index = read_index(tmp_path / "index")
    assert index.ends.tolist() == [2, 3, 2]
    assert [video.is_outdated for video in index.videos] == [False, True]  # perhaps partly black
    write_index(tmp_path / "index", index.metadata, index.videos)
    assert read_index(tmp_path / "index").ends.tolist() == [2, 3, 2]
