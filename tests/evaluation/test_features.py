"""Features of an evaluation's windows, and of windows at a constant stride."""

import faulthandler
import os
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch

from evaluation import features as features_module
from evaluation.features import (
    SecondWindows,
    StridedWindows,
    clip_batches,
    second_starts,
    strided_features,
    video_features,
)
from retrieval_loader import Pair
from s3dg import Tokenizer, to_unit_range
from tests.helpers import ROOT, make_video
from video_decoder import ClipSpec, DecodeError, decode_windows

CPU = torch.device("cpu")
CLIP = ClipSpec(num_frames=4, size=16, fps=5)


# --- the windows of an evaluation ---------------------------------------------------------------


def test_windows_are_batched_across_videos_and_none_is_lost():
    items = [(name, torch.full((windows, 3, 2, 4, 4), i)) for i, (name, windows) in
             enumerate([("a", 3), ("b", 1), ("c", 7)])]  # fmt: skip
    batches = list(clip_batches(items, 4))
    assert [len(clips) for _, clips in batches] == [4, 4, 3]
    assert [owner for owners, _ in batches for owner in owners] == list("aaab" + "ccccccc")
    assert (
        torch.cat([clips for _, clips in batches])[:, 0, 0, 0, 0].tolist()
        == [0] * 3 + [1] + [2] * 7
    )


class Brightness(torch.nn.Module):
    """Embeds a clip by its mean colour and a text by its first words; counts its largest batch."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def forward(self, video, text, mode, mixed5c=False):
        if mode == "text":
            return text[:, :3].float() / 255
        self.largest = max(self.largest, len(video))
        return video.mean(dim=(2, 3, 4))


class Colours(torch.utils.data.Dataset):
    """Videos of one colour each, described by that colour's numbers.

    Some cannot be decoded, some crash the process that decodes them, some hang.
    """

    num_missing = 2

    def __init__(self, colours, broken=(), fatal=(), endless=()):
        self.colours, self.broken, self.fatal, self.endless = colours, broken, fatal, endless
        self.item_spec = {"video": ((5, 3, 2, 4, 4), torch.uint8)}
        self.pairs = [Pair(None, 0, 1, " ".join(map(str, colour))) for colour in colours]
        self.tokenizer = Tokenizer([str(i) for i in range(1, 256)], 3)

    def __len__(self):
        return len(self.colours)

    def path(self, index):
        return f"/videos/{index}.mp4"

    def __getitem__(self, index):
        if index in self.fatal:
            faulthandler.disable()  # pytest's, which would fill the screen
            os.kill(os.getpid(), signal.SIGSEGV)
        if index in self.endless:
            signal.pause()
        if index in self.broken:
            return {"error": f"video {index} is broken"}
        video = torch.tensor(self.colours[index], dtype=torch.uint8).view(1, 3, 1, 1, 1)
        video = video.repeat(5, 1, 2, 4, 4)
        video[0] = 255  # a white first window, which the others must outweigh
        return {"video": video}


def primaries(n, **settings):
    return Colours([[255 if c == i % 3 else i + 1 for c in range(3)] for i in range(n)], **settings)


def decoding(workers=0, batch_size=4, sample_timeout=60):
    return {"workers": workers, "batch_size": batch_size, "sample_timeout": sample_timeout}


def test_a_video_that_crashes_or_hangs_its_worker_is_skipped_and_named(milnce_log):
    videos = primaries(5, fatal=[1], endless=[3])
    settings = decoding(workers=2, sample_timeout=1)
    features = video_features(Brightness(), videos, CPU, **settings)
    expected = video_features(Brightness(), primaries(5), CPU, **decoding())
    assert list(features) == [0, 2, 4]
    for index, feature in features.items():
        np.testing.assert_array_equal(feature, expected[index])
    [crashed] = [line for line in milnce_log.messages if "/videos/1.mp4" in line]
    assert "SIGSEGV" in crashed
    [hung] = [line for line in milnce_log.messages if "/videos/3.mp4" in line]
    assert "1 s" in hung


@pytest.mark.parametrize("workers", [0, 2])
def test_on_windows_gets_each_decoded_video_once(workers):
    """Its windows also keep their content while later videos are decoded."""
    videos, shown = primaries(7, broken=[1]), {}

    def on_windows(index, windows):
        assert index not in shown
        shown[index] = windows

    video_features(Brightness(), videos, CPU, **decoding(workers), on_windows=on_windows)
    assert list(shown) == [0, 2, 3, 4, 5, 6]
    for index, windows in shown.items():
        assert torch.equal(windows, videos[index]["video"])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_batch_is_larger_than_batch_size_val(workers):
    model = Brightness()
    features = video_features(model, primaries(7), CPU, **decoding(workers, batch_size=6))
    assert model.largest == 6
    assert [f.shape for f in features.values()] == [(5, 3)] * 7


@pytest.mark.parametrize("workers", [0, 3])
def test_features_do_not_depend_on_the_batch_size(workers):
    model = Brightness()
    one = video_features(model, primaries(5), CPU, **decoding(batch_size=1))
    many = video_features(model, primaries(5), CPU, **decoding(workers, batch_size=32))
    assert list(one) == list(many) == list(range(5))
    for index, feature in one.items():
        np.testing.assert_array_equal(feature, many[index])


def test_an_exception_of_on_video_ends_the_evaluation_and_its_workers():
    seen, children = [], psutil.Process().children()

    def on_video():
        seen.append(1)
        if len(seen) == 3:
            raise SystemExit

    with pytest.raises(SystemExit):
        settings = decoding(workers=2)
        video_features(Brightness(), primaries(9, broken=[1]), CPU, **settings, on_video=on_video)
    assert len(seen) == 3
    assert psutil.Process().children() == children


def test_ranks_share_the_videos():
    shards = [
        video_features(Brightness(), primaries(5), CPU, **decoding(), rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [list(shard) for shard in shards] == [[0, 2, 4], [1, 3]]


# --- windows at a constant stride ---------------------------------------------------------------


class Pixels(torch.nn.Module):
    """Embeds a window as its pixels, downsampled: [W, 3 * 4 * 4 * 4] numbers."""

    def forward(self, video, text, mode, mixed5c):
        assert mode == "video"
        return torch.nn.functional.avg_pool3d(video, (1, 4, 4)).flatten(1)


HALF_SECONDS = StridedWindows(CLIP, 0.5)


def features(paths, *, windows=HALF_SECONDS, workers=2, batch_size=5, timeout=60):
    found = strided_features(
        Pixels(),
        paths,
        CPU,
        windows,
        batch_size=batch_size,
        workers=workers,
        sample_timeout=timeout,
    )
    return {index: video or error for index, video, error in found}


def directly(path, starts):
    clips, _ = decode_windows(path, starts, ClipSpec(4, 16, 5))
    return Pixels()(to_unit_range(clips), None, "video", False).numpy()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / name for name in ("long.mp4", "b.mkv", "short.mp4", "c.avi")]
    for path, seconds in zip(paths, (30, 3, 0.4, 2), strict=True):
        make_video(path, seconds)
    return paths


@pytest.mark.parametrize(
    ("duration", "fps", "stride", "starts"),
    [
        (32.0, 5, 3.2, [0.0, 3.2, 6.4, 9.6, 12.8, 16.0, 19.2, 22.4, 25.6, 28.8]),
        (31.99, 5, 3.2, [0.0, 3.2, 6.4, 9.6, 12.8, 16.0, 19.2, 22.4, 25.6]),
        (3.2, 5, 1.0, [0.0]),
        (4.2, 5, 1.0, [0.0, 1.0]),
        (4.2, 5, 10.0, [0.0]),
        (3.5, 5, 0.1, [0.0, 0.1, 0.2, 0.3]),
        (1.0, 5, 1.0, [0.0]),
        (0.0, 5, 1.0, [0.0]),
        (2.0, 16, 0.5, [0.0, 0.5, 1.0]),
    ],
)
def test_windows_start_every_stride_and_end_by_the_videos_end(duration, fps, stride, starts):
    assert StridedWindows(ClipSpec(num_frames=16, fps=fps), stride).starts(duration) == starts


@pytest.mark.parametrize(
    ("duration", "num_frames", "fps", "starts"),
    [
        (10.0, 16, 5, [0.0, 0.0, 0.9, 1.9, 2.9, 3.9, 4.9, 5.9, 6.8, 6.8]),
        (10.9, 16, 5, [0.0, 0.0, 0.9, 1.9, 2.9, 3.9, 4.9, 5.9, 6.9, 7.7]),
        (4.0, 5, 5, [0.0, 1.0, 2.0, 3.0]),
        (3.5, 16, 5, [0.0, 0.0, 0.3]),
        (2.0, 16, 5, [0.0, 0.0]),
        (0.4, 16, 5, [0.0]),
        (0.0, 16, 5, [0.0]),
        (3.0, 8, 10, [0.1, 1.1, 2.1]),
    ],
)
def test_windows_are_centred_on_each_second_inside_the_video(duration, num_frames, fps, starts):
    assert second_starts(duration, num_frames=num_frames, fps=fps) == starts
    windows = SecondWindows(ClipSpec(num_frames=num_frames, fps=fps))
    assert windows.starts(duration) == starts


def test_a_video_of_three_hours_has_a_window_per_second():
    starts = second_starts(10_800.5, num_frames=32, fps=10)
    assert len(starts) == 10_800 and starts[5000] == 4998.9 and starts[-1] == 10_797.3


def test_each_second_has_its_feature(videos):
    found = features(videos, windows=SecondWindows(CLIP))
    assert [len(found[index].features) for index in range(4)] == [30, 3, 1, 2]
    for index, path in enumerate(videos):
        np.testing.assert_array_equal(found[index].features, directly(path, found[index].starts))


LONG = """
import resource, sys, torch
from evaluation.features import SecondWindows, strided_features
from video_decoder import ClipSpec

class Mean(torch.nn.Module):
    def forward(self, video, text, mode, mixed5c):
        return video.mean(dim=(3, 4)).flatten(1)

windows = SecondWindows(ClipSpec(num_frames=8, size=32, fps=5))
settings = {"batch_size": 8, "workers": 0, "sample_timeout": 600}
cpu = torch.device("cpu")
[(_, found, error)] = strided_features(Mean(), sys.argv[1:], cpu, windows, **settings)
print(len(found.features), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """The clips of three hours are 1 GB as floats. The measured process does all of the work."""
    peaks = {}
    for seconds in (60, 10_800):
        path = tmp_path / f"{seconds}.mp4"
        make_video(path, seconds, "-r", "2", "-g", "20", "-vf", "scale=32:32")
        ended = subprocess.run(
            [sys.executable, "-c", LONG, path], cwd=ROOT, check=True, capture_output=True, text=True
        )
        count, peaks[seconds] = map(int, ended.stdout.split())  # peaks in KiB
        assert count >= seconds
    assert peaks[10_800] - peaks[60] < 100_000


def test_features_are_those_of_the_windows_decoded_directly(videos):
    found = features(videos)
    assert sorted(found) == [0, 1, 2, 3]
    for index, path in enumerate(videos):
        np.testing.assert_array_equal(found[index].features, directly(path, found[index].starts))
        assert found[index].features.dtype == np.float32
    assert [len(found[index].starts) for index in range(4)] == [59, 5, 1, 3]
    assert found[0].starts[-1] == 29.0 and found[2].starts == [0.0]


def test_a_video_shorter_than_a_window_repeats_its_last_frame(videos):
    found = features(videos)[2]
    window = found.features.reshape(3, 4, 4, 4)
    assert window[:, 1].any()
    for later in (2, 3):
        np.testing.assert_array_equal(window[:, later], window[:, 1])
    assert found.frames == [2] and found.black == []


def test_the_size_of_the_groups_does_not_change_the_features(videos, monkeypatch):
    whole, small = {}, {}
    for size, found in ((100, whole), (7, small)):
        monkeypatch.setattr(features_module, "GROUP_SIZE", size)
        found |= features(videos)
    for index in whole:
        np.testing.assert_array_equal(whole[index].features, small[index].features)
        assert whole[index].starts == small[index].starts


def test_each_window_is_decoded_once_and_few_at_a_time(videos, monkeypatch):
    groups = []

    def decode(path, starts, clip):
        groups.append((path, list(starts)))
        return decode_windows(path, starts, clip)

    monkeypatch.setattr(features_module, "decode_windows", decode)
    found = features(videos, workers=0)
    assert max(len(starts) for _, starts in groups) == features_module.GROUP_SIZE == 16
    for index, path in enumerate(videos):
        assert [s for p, starts in groups if p == path for s in starts] == found[index].starts


def faulty(fault):
    """Make a decoder that calls `fault` in the second group of the long video."""

    def decode(path, starts, clip):
        if path.name == "long.mp4" and starts[0] > 0:
            fault(path)
        return decode_windows(path, starts, clip)

    return decode


def broken(path):
    raise DecodeError(f"{path}: broken")


def crash(path):
    faulthandler.disable()  # no report of an intended crash
    os.abort()


@pytest.mark.parametrize(
    ("fault", "workers", "reason"),
    [
        (broken, 0, "long.mp4: broken"),
        (broken, 2, "long.mp4: broken"),
        (crash, 2, r"long.mp4: it crashed its data worker (SIGABRT)"),
    ],
)
def test_a_video_that_fails_midway_has_no_features_and_the_others_do(
    fault, workers, reason, videos, monkeypatch
):
    monkeypatch.setattr(features_module, "decode_windows", faulty(fault))
    found = features(videos, workers=workers)
    assert found[0].endswith(reason)
    for index in (1, 2, 3):
        expected = directly(videos[index], found[index].starts)
        np.testing.assert_array_equal(found[index].features, expected)


def test_a_file_that_crashes_the_process_that_opens_it_fails_alone(videos, monkeypatch):
    def probe(path):
        return crash(path) if path.name == "b.mkv" else probe_duration(path)

    probe_duration = features_module.probe_duration
    monkeypatch.setattr(features_module, "probe_duration", probe)
    found = features(videos)
    assert "crashed" in found[1] and all(not isinstance(found[i], str) for i in (0, 2, 3))


def test_each_video_is_named_if_all_fail(tmp_path):
    (tmp_path / "junk.mp4").write_text("junk")
    found = features([tmp_path / "junk.mp4", tmp_path / "absent.mp4"])
    assert "junk.mp4" in found[0] and "absent.mp4" in found[1]
    assert features([]) == {}


def test_windows_in_which_nothing_can_be_decoded_are_listed_as_black(tmp_path):
    path = tmp_path / "cut.mp4"
    make_video(path, 10, "-movflags", "+faststart", "-g", "10")  # its index comes first
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = features([path])[0]
    assert found.starts[-1] > 8  # the header still states 10 s
    dark = [k for k, feature in enumerate(found.features) if not feature.any()]
    assert found.black == dark and 5 < len(dark) < 15 and dark[-1] == len(found.starts) - 1
