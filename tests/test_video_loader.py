from itertools import chain

import numpy as np
import pytest
import torch
from conftest import frames_digest, golden_frames, golden_json, write_csv
from torch.utils.data import DataLoader

from s3dg import Tokenizer
from utils import InputError
from video_loader import (
    CaptionError,
    HowTo100M,
    StepSampler,
    clip_window,
    find_nearest_candidates,
    read_captions,
)

WORDS = ["the", "cook", "flips", "a", "pancake", "null"]


@pytest.mark.parametrize("case", golden_json("misc")["candidates"])
def test_candidates_match_the_golden_indices(case):
    starts, ends, k = case["start"], case["end"], case["num_candidates"]
    found = [find_nearest_candidates(starts, ends, i, k) for i in range(len(starts))]
    assert found == case["caption_indices"]


@pytest.mark.parametrize("case", golden_json("misc")["clip_windows"])
def test_clip_windows_match_the_golden_seconds(case):
    start, end = clip_window(case["caption_start"], case["caption_end"], case["min_time"])
    assert [start, end] == case["window"]
    assert [start, int(max(start, end - case["clip_seconds"]))] == case["seek_range"]


def test_captions_keep_null_as_a_word_and_an_empty_cell_as_missing(tmp_path):
    (tmp_path / "a.csv").write_text('start,end,text\n0,1,null\n1.5,2,\n3,4,"say ""hi"",\nthere"\n')
    starts, ends, texts = read_captions(tmp_path / "a.csv")
    assert starts.tolist() == [0, 1.5, 3] and ends.tolist() == [1, 2, 4]
    assert texts[0] == "null" and not isinstance(texts[1], str) and texts[2] == 'say "hi",\nthere'


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "start,end,text\n",
        "start,text\n1,a\n",
        "start,end,text\nx,2,a\n",
        "start,end,text\nnan,nan,a\ninf,inf,a\n0,inf,a\n0,1e19,a\n1e10,1e10,a\n-5,-1,a\n",
    ],
)
def test_unusable_caption_files_are_one_error_that_names_them(tmp_path, content):
    if content is not None:
        (tmp_path / "a.csv").write_text(content)
    with pytest.raises(CaptionError, match=r"a\.csv"):
        read_captions(tmp_path / "a.csv")


CLIPS = ["v_GGSY1Qvo990.mp4", "flipping_a_pancake.mkv", "av1_video.mkv"]


@pytest.fixture
def tree(tmp_path, shared_videos):
    """The shared clips, with captions, and a list of them."""
    for name in CLIPS:
        rows = [(t, t + 2, f"the cook flips a pancake {t}") for t in range(0, 9, 2)]
        write_captions((tmp_path / name).with_suffix(".csv"), *rows)
    write_list(tmp_path / "list.csv", CLIPS)
    return tmp_path


def write_captions(path, *rows):
    write_csv(path, ("start", "end", "text"), *rows)


def write_list(path, names):
    write_csv(path, ("video_path",), *((name,) for name in names))


def dataset(tree, shared_videos, **settings):
    settings = {"num_frames": 4, "size": 32, "num_candidates": 3, **settings}
    tokenizer = Tokenizer(WORDS, 20)
    return HowTo100M(tree / "list.csv", shared_videos, tree, tokenizer, **settings)


def test_an_item_has_the_documented_shapes_and_types(tree, shared_videos):
    item = dataset(tree, shared_videos)[0, 1]
    assert item["video"].shape == (3, 4, 32, 32) and item["video"].dtype == torch.uint8
    assert item["text"].shape == (3, 20) and item["text"].dtype == torch.long
    assert item["text"][0, :5].tolist() == [1, 2, 3, 4, 5]
    assert dataset(tree, shared_videos, num_candidates=1)[0, 1]["text"].shape == (20,)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tree, shared_videos):
    data = dataset(tree, shared_videos)
    first = data[3, 0]["video"]
    data[0, 1], data[5, 2]  # what came before does not matter
    assert torch.equal(first, data[3, 0]["video"])
    assert not torch.equal(first, data[4, 0]["video"])
    assert not torch.equal(first, dataset(tree, shared_videos, seed=2)[3, 0]["video"])


def test_centred_unflipped_clips_differ_only_by_their_seek_point(tree, shared_videos):
    settings = {"centercrop": True, "random_flip": False}
    data = dataset(tree, shared_videos, **settings)
    seen = {data[epoch, 1]["video"].numpy().tobytes() for epoch in range(40)}
    assert 1 < len(seen) <= 11  # whole seconds, 0 to 10, are what the captions allow


@pytest.mark.parametrize("row", golden_frames("train"), ids=str)
def test_clips_match_the_golden_frames(row, tmp_path, shared_videos):
    """A caption of just the clip's length leaves one seek point."""
    seconds = row["num_frames"] / row["fps"]
    captions = (tmp_path / row["video"]).with_suffix(".csv")
    write_captions(captions, (row["start"], row["start"] + seconds, "cook"))
    write_list(tmp_path / "list.csv", [row["video"]])
    data = dataset(
        tmp_path,
        shared_videos,
        **{name: row[name] for name in ("num_frames", "size", "fps", "crop_only")},
        centercrop=True,
        random_flip=False,
        min_time=0.1,
    )
    assert frames_digest(data[0, 0]["video"]) == row["sha256"]


def test_flips_and_crops_are_drawn_and_can_be_switched_off(tree, shared_videos):
    write_captions(tree / "v_GGSY1Qvo990.csv", (1, 2, "cook"))  # one seek point

    def seen(**settings):
        data = dataset(tree, shared_videos, min_time=0.1, **settings)
        return {data[epoch, 0]["video"].numpy().tobytes() for epoch in range(12)}

    assert len(seen(centercrop=True, random_flip=False)) == 1
    assert len(seen(centercrop=True, random_flip=True)) == 2
    assert len(seen(centercrop=False, random_flip=False)) == 12
    centre = seen(centercrop=True, random_flip=False, crop_only=True)
    assert centre != seen(centercrop=True, random_flip=False, crop_only=False)


def test_unreadable_samples_are_replaced_alike_and_named(tree, shared_videos):
    write_list(tree / "list.csv", ["corrupt.mp4", "v_GGSY1Qvo990.mp4", "absent.mp4"])
    write_captions(tree / "corrupt.csv", (0, 1, "a"))
    data = dataset(tree, shared_videos)
    item, again = data[0, 0], data[0, 0]
    assert torch.equal(item["video"], again["video"])
    assert "corrupt.mp4" in item["replaced"]
    assert data[0, 1]["replaced"] == ""


def test_nothing_that_can_be_read_ends_the_training(tree, shared_videos):
    data = dataset(tree, shared_videos)
    for name in CLIPS:
        (tree / name).with_suffix(".csv").write_text("")
    with pytest.raises(InputError, match="in a row"):
        data[0, 0]


def test_a_list_of_nothing_that_is_there_is_refused(tree, shared_videos):
    write_list(tree / "list.csv", ["absent.mp4"])
    with pytest.raises(InputError, match="--video_path"):
        dataset(tree, shared_videos)
    write_list(tree / "list.csv", ["h265_video.mp4"])
    with pytest.raises(InputError, match="--caption_root"):
        dataset(tree, shared_videos)


def keys(world_size, length=10, batch=4, steps=10, **settings):
    samplers = [
        list(StepSampler(length, batch, steps, rank=r, world_size=world_size, **settings))
        for r in range(world_size)
    ]
    return [list(chain.from_iterable(parts)) for parts in zip(*samplers, strict=True)]


def test_every_epoch_visits_every_video_once():
    flat = list(chain.from_iterable(keys(1)))
    for epoch in range(4):
        visited = [index for e, index in flat if e == epoch]
        assert sorted(visited) == list(range(10))
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_union_of_the_ranks_does_not_depend_on_their_number(world_size):
    assert keys(world_size) == keys(1)


def test_a_later_first_step_continues_the_same_order():
    assert keys(1, first_step=3) == keys(1)[3:]
    assert keys(1, seed=2) != keys(1)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="shared"):
        StepSampler(10, 4, 2, world_size=3)


def test_the_video_list_is_one_array(tree, shared_videos):
    assert isinstance(dataset(tree, shared_videos).names, np.ndarray)
    assert dataset(tree, shared_videos).names.dtype.kind == "U"


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 1)])
def test_batches_are_the_same_for_any_number_of_processes_and_workers(toy, world_size, workers):
    data = HowTo100M(
        toy / "howto100m_videos.csv",
        toy / "videos",
        toy / "captions",
        Tokenizer(np.load(toy / "dict.npy"), 20),
        num_frames=2,
        size=16,
        num_candidates=2,
    )

    def union(world_size, workers):
        ranks = []
        for rank in range(world_size):
            sampler = StepSampler(8, 4, 3, rank=rank, world_size=world_size)
            loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
            ranks.append([(batch["video"], batch["text"]) for batch in loader])
        return [
            [torch.cat(parts) for parts in zip(*step, strict=True)]
            for step in zip(*ranks, strict=True)
        ]

    for expected, found in zip(union(1, 0), union(world_size, workers), strict=True):
        assert all(map(torch.equal, expected, found))
