import faulthandler
import os
import signal

import numpy as np
import psutil
import pytest
import torch

from evaluation.features import clip_batches, video_features
from evaluation.retrieval import (
    evaluate_retrieval,
    ground_truth_ranks,
    retrieval_metrics,
    top_k_videos,
)
from retrieval_loader import Pair
from s3dg import Tokenizer
from tests.helpers import golden_json
from utils import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", golden_json("misc")["metrics"], ids=lambda c: f"n{c['n']}")
def test_metrics_match_the_golden_values(case):
    n = case["n"]
    scores = np.random.RandomState(case["numpy_seed"]).standard_normal((n, n)) + 2 * np.eye(n)
    figures = retrieval_metrics(scores)
    assert figures == pytest.approx({name: case[name] for name in ("R1", "R5", "R10", "MR")})


def test_ties_count_against_the_right_video():
    figures = retrieval_metrics(np.zeros((20, 20)))
    assert figures == {"R1": 0, "R5": 0, "R10": 0, "MR": 20}


def test_scores_that_are_not_numbers_win_nothing():
    assert retrieval_metrics(np.full((20, 20), np.nan))["MR"] == 20


def test_the_best_videos_agree_with_the_right_ones_ranks():
    """Where the rank says that k videos count against the right one, k come before it."""
    scores = np.random.default_rng(0).integers(0, 4, (30, 30)).astype(float)  # most are ties
    scores[3, 3] = scores[5, 6] = np.nan
    order = top_k_videos(scores, 30)
    places = [list(row).index(text) + 1 for text, row in enumerate(order)]
    assert places == ground_truth_ranks(scores).tolist()
    assert all(sorted(row) == list(range(30)) for row in order)
    first = scores[0, order[0]]
    assert (first[1:] <= first[:-1]).all()
    np.testing.assert_array_equal(top_k_videos(scores, 5), order[:, :5])
    assert top_k_videos(scores[:3, :3], 5).shape == (3, 3)


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
    """Videos of one colour each, described by that colour's numbers; some cannot be decoded, some
    end the process that tries, some never end."""

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
        video[0] = 255  # a first window that is of every colour: the others have to outweigh it
        return {"video": video}


def primaries(n, **settings):
    return Colours([[255 if c == i % 3 else i + 1 for c in range(3)] for i in range(n)], **settings)


def decoding(workers=0, batch_size=4, sample_timeout=60):
    return {"workers": workers, "batch_size": batch_size, "sample_timeout": sample_timeout}


@pytest.mark.parametrize("workers", [0, 2])
def test_retrieval_scores_each_video_and_leaves_out_and_names_the_broken(milnce_log, workers):
    model = Brightness()
    figures = evaluate_retrieval(model, primaries(3), CPU, **decoding(workers))
    assert figures == {"R1": 1, "R5": 1, "R10": 1, "MR": 1, "num_videos": 3, "num_missing": 2}
    figures = evaluate_retrieval(model, primaries(3, broken=[1]), CPU, **decoding(workers))
    assert (figures["num_videos"], figures["num_missing"], figures["R1"]) == (2, 3, 1)
    assert "video 1 is broken" in milnce_log.text


def test_a_video_that_crashes_or_hangs_its_worker_is_left_out_and_named(milnce_log):
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
def test_the_windows_of_each_decoded_video_are_shown_once(workers):
    """And as they are, whatever is decoded after them."""
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
def test_features_do_not_depend_on_the_batch_size_and_the_model_keeps_its_mode(workers):
    model = Brightness().train()
    one = video_features(model, primaries(5), CPU, **decoding(batch_size=1))
    many = video_features(model, primaries(5), CPU, **decoding(workers, batch_size=32))
    assert model.training
    assert list(one) == list(many) == list(range(5))
    for index, feature in one.items():
        np.testing.assert_array_equal(feature, many[index])


def test_each_video_is_told_of_and_a_caller_who_has_enough_leaves_no_worker():
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


def test_nothing_that_can_be_decoded_is_an_input_error():
    with pytest.raises(InputError, match="--eval_video_root"):
        evaluate_retrieval(Brightness(), primaries(2, broken=[0, 1]), CPU, **decoding())
