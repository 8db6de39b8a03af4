import faulthandler
import os
import random
import signal
import string
import time
from contextlib import closing
from itertools import chain
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import video_loader
from captions.packing import write_store
from captions.readers import open_captions
from distributed.workers import sample_batches
from s3dg import Tokenizer
from tests.helpers import frames_digest, golden_frames, golden_json, private_memory, write_csv
from utils import DataError
from video_decoder import ClipSpec, DecodeError
from video_loader import (
    MAX_REPLACEMENTS,
    QUARANTINE,
    HowTo100M,
    StepSampler,
    clip_window,
    find_nearest_candidates,
    read_video_list,
    training_batches,
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


CLIPS = ["v_GGSY1Qvo990.mp4", "flipping_a_pancake.mkv", "av1_video.mkv"]


@pytest.fixture
def tree(tmp_path, shared_videos):
    """Write captions for the shared clips, and a list of the clips."""
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
    settings = {"clip": ClipSpec(num_frames=4, size=32), "num_candidates": 3, **settings}
    names, captions = read_video_list(tree / "list.csv"), open_captions(tree)
    return HowTo100M(names, shared_videos, captions, Tokenizer(WORDS, 20), **settings)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.mp4", "a/../../b.mp4"])
def test_a_list_cannot_name_videos_outside_the_folder(tmp_path, name):
    write_list(tmp_path / "list.csv", ["a.mp4", name])
    with pytest.raises(DataError, match=r"list\.csv, line 3: .* leads out of"):
        read_video_list(tmp_path / "list.csv")


def test_an_item_has_the_documented_shapes_and_types(tree, shared_videos):
    item = dataset(tree, shared_videos)[0, 1]
    assert item["video"].shape == (3, 4, 32, 32) and item["video"].dtype == torch.uint8
    assert item["text"].shape == (3, 20) and item["text"].dtype == torch.long
    assert item["text"][0, :5].tolist() == [1, 2, 3, 4, 5]
    assert dataset(tree, shared_videos, num_candidates=1)[0, 1]["text"].shape == (20,)


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_item_spec_describes_the_items(tree, shared_videos, num_candidates):
    data = dataset(tree, shared_videos, num_candidates=num_candidates)
    item = data[0, 1]
    assert data.item_spec == {name: (value.shape, value.dtype) for name, value in item.items()}


def test_a_sample_depends_on_seed_epoch_and_index_alone(tree, shared_videos):
    data = dataset(tree, shared_videos)
    first = data[3, 0]["video"]
    data[0, 1], data[5, 2]  # earlier samples do not matter
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
    """A caption as long as the clip leaves only one seek point."""
    seconds = row["num_frames"] / row["fps"]
    captions = (tmp_path / row["video"]).with_suffix(".csv")
    write_captions(captions, (row["start"], row["start"] + seconds, "cook"))
    write_list(tmp_path / "list.csv", [row["video"]])
    data = dataset(
        tmp_path,
        shared_videos,
        clip=ClipSpec(row["num_frames"], row["size"], row["fps"]),
        crop_only=row["crop_only"],
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


def test_an_unreadable_item_is_one_line_that_names_its_file(tree, shared_videos):
    write_list(tree / "list.csv", ["absent.mp4", "v_GGSY1Qvo990.mp4", "mute.mp4"])
    write_captions(tree / "absent.csv", (0, 1, "a"))
    data = dataset(tree, shared_videos)
    for index, named in ((0, "absent.mp4"), (2, "mute.csv")):
        item = data[0, index]
        assert item.keys() == {"error"} and named in item["error"]
        assert "\n" not in item["error"]
    assert "error" not in data[0, 1]


def test_later_attempts_draw_from_all_videos_reproducibly(tree, shared_videos):
    data, other = dataset(tree, shared_videos), dataset(tree, shared_videos, seed=2)
    attempts = [(0, 1, attempt) for attempt in range(1, 31)]
    drawn = [data.name(key) for key in attempts]
    assert set(drawn) == set(CLIPS)
    assert drawn == [data.name(key) for key in attempts] != [other.name(key) for key in attempts]
    assert drawn != [data.name((1, *key[1:])) for key in attempts]
    assert data.name((0, 1)) == data.name((0, 1, 0)) == CLIPS[1]
    assert torch.equal(data[attempts[0]]["video"], data[attempts[0]]["video"])
    same = [key for key in attempts if data.name(key) == drawn[0]]
    assert not torch.equal(data[same[0]]["video"], data[same[1]]["video"])


def test_a_list_without_existing_videos_or_captions_is_refused(tree, shared_videos):
    for names in (["absent.mp4"], []):
        write_list(tree / "list.csv", names)
        with pytest.raises(DataError, match="has no video of the list"):
            dataset(tree, shared_videos).check_videos()
    write_list(tree / "list.csv", ["h265_video.mp4"])
    data = dataset(tree, shared_videos)
    data.check_videos()
    with pytest.raises(DataError, match=f"{tree}: has no captions"):
        data.check_captions()


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


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 1)])
def test_batches_are_the_same_for_any_number_of_processes_and_workers(toy, world_size, workers):
    data = HowTo100M(
        read_video_list(toy / "howto100m_videos.csv"),
        toy / "videos",
        open_captions(toy / "captions"),
        Tokenizer(np.load(toy / "dict.npy"), 20),
        ClipSpec(num_frames=2, size=16),
        num_candidates=2,
    )
    expected, found = union(data, 4, 3), union(data, 4, 3, world_size=world_size, workers=workers)
    assert len(found) == 3 and found == expected


def load(data, batch_size, steps, *, workers=0, timeout=60, quarantined=None, **sampler):
    """Return a rank's batches from training_batches: the samples' bytes and the bad samples."""
    batches = training_batches(
        data,
        StepSampler(len(data), batch_size, steps, **sampler),
        workers=workers,
        timeout=timeout,
        quarantined=set() if quarantined is None else quarantined,
    )
    with closing(batches):
        return [
            (
                [
                    (v.numpy().tobytes(), t.tolist())
                    for v, t in zip(b["video"], b["text"], strict=True)
                ],
                b["bad"],
            )
            for b in batches
        ]


def union(data, batch_size, steps, *, world_size=1, **settings):
    """Return the batches of all ranks together."""
    ranks = [
        load(data, batch_size, steps, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    return [
        tuple(list(chain.from_iterable(parts)) for parts in zip(*step, strict=True))
        for step in zip(*ranks, strict=True)
    ]


def fake_decode(path, seek, *, num_frames, size, crop, flip, **settings):
    """Return a clip whose colours encode the arguments, or fail as the file's name says."""
    if "crash" in path.name:
        faulthandler.disable()  # pytest's, which would fill the screen
        os.kill(os.getpid(), signal.SIGSEGV)
    if "hang" in path.name:
        signal.pause()
    if "broken" in path.name:
        raise DecodeError(f"{path}: broken")
    arguments = f"{path.name} {seek} {crop} {flip}"
    colours = np.random.default_rng(list(arguments.encode())).integers(256, size=3, dtype=np.uint8)
    clip = torch.from_numpy(colours)[:, None, None, None]
    return clip.expand(3, num_frames, size, size)


@pytest.fixture
def fake_videos(tmp_path, monkeypatch):
    """Return a function that makes a HowTo100M of files with these names, for fake_decode.

    Files with `mute` in their name have no captions.
    """

    def make(*names):
        for name in names:
            (tmp_path / name).touch()
            if "mute" not in name:
                rows = [(t, t + 2, f"the cook flips {t}") for t in range(0, 90, 2)]
                write_captions((tmp_path / name).with_suffix(".csv"), *rows)
        write_list(tmp_path / "list.csv", names)
        return dataset(tmp_path, tmp_path, clip=ClipSpec(num_frames=4, size=2))

    monkeypatch.setattr(video_loader, "decode_clip", fake_decode)
    return make


def names_tried(bad):
    return [[name for name, _ in tried] for tried in bad]


GOOD = [f"good{i}.mp4" for i in range(6)]
BAD = ["broken0.mp4", "mute0.mp4", "broken1.mp4"]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (4, 2)])
def test_replacements_are_the_same_for_any_number_of_processes_and_workers(
    fake_videos, world_size, workers
):
    data = fake_videos(*GOOD, *BAD)
    expected, found = union(data, 4, 9), union(data, 4, 9, world_size=world_size, workers=workers)
    assert sum(len(bad) for _, bad in expected) == 4 * len(BAD)  # of four epochs
    assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_replacements_are_the_same_after_a_restart(fake_videos, workers):
    data = fake_videos(*GOOD, *BAD)
    assert load(data, 4, 9, first_step=5, workers=workers) == load(data, 4, 9)[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_the_same_with_a_folder_of_captions_and_with_a_store(fake_videos, workers):
    data = fake_videos(*GOOD, *BAD)
    expected = load(data, 4, 9)
    captions = [(Path(name).stem, data.captions) for name in GOOD + BAD if "mute" not in name]
    store = data.captions.root / "store"
    write_store(store, ((name, *folder.read(f"{name}.mp4")) for name, folder in captions))
    data.captions = open_captions(store)
    found = load(data, 4, 9, workers=workers)
    assert [samples for samples, _ in found] == [samples for samples, _ in expected]
    for (_, bad), (_, expected_bad) in zip(found, expected, strict=True):
        assert names_tried(bad) == names_tried(expected_bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_bad_sample_is_reported_with_all_attempts_and_their_reasons(fake_videos, workers):
    data = fake_videos(*GOOD, *BAD)
    steps = keys(1, length=len(data), batch=3, steps=12)
    batches = load(data, 3, 12, workers=workers)
    for step, (samples, bad) in zip(steps, batches, strict=True):
        assert len(samples) == 3
        tried = []
        for epoch, index in step:
            names = [data.name((epoch, index, attempt)) for attempt in range(MAX_REPLACEMENTS)]
            good = next(place for place, name in enumerate(names) if name in GOOD)
            tried += [names[:good]] if good else []
        assert names_tried(bad) == tried
        for name, reason in chain.from_iterable(bad):
            assert name.removesuffix(".mp4") in reason
            assert "captions" in reason or "broken" in reason or "No such file" in reason
    assert any(len(attempts) > 1 for _, bad in batches for attempts in bad)


@pytest.mark.parametrize(
    ("name", "reason"), [("crash.mp4", "SIGSEGV"), ("hang.mp4", "more than 1 s")]
)
def test_a_video_that_crashes_or_hangs_its_worker_is_quarantined_and_logged(
    fake_videos, milnce_log, name, reason
):
    data = fake_videos(*GOOD, name)
    quarantined = set()
    batches = load(data, 7, 1, workers=2, timeout=1, quarantined=quarantined)
    assert quarantined == {name}
    faults = [fault for _, bad in batches for attempts in bad for fault in attempts]
    assert {video for video, _ in faults} == {name}
    assert all(why.startswith(QUARANTINE) for _, why in faults)
    assert reason in faults[0][1]
    assert name in milnce_log.text and reason in milnce_log.text


def test_a_quarantined_video_is_replaced_as_if_it_had_just_crashed(fake_videos):
    quarantined = {"crash0.mp4", "crash1.mp4", "crash2.mp4"}
    data = fake_videos(*GOOD[:3], "broken.mp4", *sorted(quarantined))
    found = load(data, 3, 12, workers=2)
    again = load(data, 3, 12, workers=2, quarantined=set(quarantined))
    for (samples, bad), (known_samples, known_bad) in zip(found, again, strict=True):
        assert samples == known_samples
        assert names_tried(bad) == names_tried(known_bad)
    faults = [fault for _, bad in again for fault in chain.from_iterable(bad)]
    assert {why for name, why in faults if name in quarantined} == {QUARANTINE}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("quarantined", [(), BAD])
def test_a_hundred_unreadable_samples_in_a_row_end_the_training(fake_videos, workers, quarantined):
    data = fake_videos("good.mp4", *BAD)
    write_captions(data.captions.file("good.mp4"))
    children = psutil.Process().children()
    with pytest.raises(DataError, match=f"{MAX_REPLACEMENTS} samples in a row"):
        load(data, 2, 2, workers=workers, quarantined=set(quarantined))
    assert psutil.Process().children() == children


def howto100m_names(length):
    """Make names like HowTo100M's, one of them very long."""
    rng = random.Random(1)
    letters = string.ascii_letters + string.digits + "-_"
    names = ["".join(rng.choices(letters, k=13)) for _ in range(length)]
    names = [f"{name[:2]}/{name[2:]}.mp4" for name in names]
    names[length // 2] = f"XX/{'long' * 60}.mp4"
    return names


class ReadAll:
    """Read every name once per item, and measure the worker's private memory before and after."""

    def __init__(self, names):
        self.names = names
        self.item_spec = {"private": ((2,), torch.int64), "characters": ((), torch.int64)}

    def __getitem__(self, key):
        before = private_memory()
        characters = sum(len(self.names[i]) for i in range(len(self.names)))
        private = torch.tensor([before, private_memory()])
        return {"private": private, "characters": torch.tensor(characters)}


def growth(names):
    """Return the bytes by which eight workers together grow if each reads every name once."""
    [batch] = sample_batches(ReadAll(names), [list(range(8))], workers=8, timeout=300)
    assert batch["errors"] == [None] * 8
    assert batch["characters"].tolist() == [sum(map(len, names))] * 8
    return int((batch["private"][:, 1] - batch["private"][:, 0]).sum())


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="no /proc/PID/smaps_rollup"
)
def test_workers_share_a_list_of_a_million_videos(tmp_path):
    names = howto100m_names(1_200_000)
    write_list(tmp_path / "list.csv", names)
    first = tmp_path / names[0]
    first.parent.mkdir()
    first.touch()
    first.with_suffix(".csv").touch()
    began = time.perf_counter()
    data = dataset(tmp_path, tmp_path)
    built = time.perf_counter() - began
    assert len(data) == len(names)
    packed, plain = growth(data.names), growth(names)
    print(f"built in {built:.1f} s; eight workers grow by {packed / 1e6:.1f} MB", end=", ")
    print(f"with a list of str by {plain / 1e6:.1f} MB")
    assert packed < 100e6 < plain
