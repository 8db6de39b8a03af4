"""HowTo100M for training: a random caption of a video, its neighbours, and a clip around it."""

import os
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from annotations.tables import read_table
from captions.readers import CaptionError, PackedStrings, open_captions
from distributed.workers import WorkerFailure, sample_batches
from utils import InputError, check_folder, log, one_line
from video_decoder import DecodeError, decode_clip

TEXT_WORDS = 20
MAX_REPLACEMENTS = 100  # samples tried in place of an unreadable one
QUARANTINE = "quarantined"  # how the reason begins where a video is not to be tried again


def find_nearest_candidates(starts, ends, index, num_candidates):
    """Indices of the num_candidates captions around caption `index` (paper, section 3.1).

    Grows from [index] by the side that keeps the spanned time shorter. Once the first caption is
    reached they are the first ones, once the last is, the last ones. Short files repeat captions.
    """
    last = len(starts) - 1
    low = high = index
    while high - low + 1 < num_candidates:
        if low == 0:
            high = num_candidates - 1
        elif high == last:
            low = last - num_candidates + 1
        elif ends[high] - starts[low - 1] < ends[high + 1] - starts[low]:
            low -= 1
        else:
            high += 1
    return [min(max(i, 0), last) for i in range(low, low + num_candidates)]


def clip_window(start, end, min_time):
    """A caption's times, widened around the middle to min_time, in whole seconds."""
    if end - start < min_time:
        start = max(0, start - (min_time - (end - start)) / 2)
        end = start + min_time
    return int(start), int(end)


class HowTo100M(Dataset):
    """Videos with narration. A sample is a function of (seed, epoch, index, attempt) alone.

    Keys are (epoch, index) or (epoch, index, attempt): attempts from 1 on are of other videos, to
    be taken where the one before cannot be read. An item: "video" uint8 [3, num_frames, size,
    size] and "text" int64 [K, 20] for K candidate captions, [20] where K is 1; or "error", a line
    that names the video or the captions that cannot be read.
    """

    def __init__(
        self,
        csv,
        video_path,
        caption_root,
        tokenizer,
        *,
        num_frames=16,
        size=224,
        fps=5,
        crop_only=True,
        centercrop=False,
        random_flip=True,
        min_time=5.0,
        num_candidates=1,
        seed=1,
        decoder="pyav",
    ):
        columns = ["video_path"]
        names = read_table(csv, columns, names=columns, flag="train_csv")["video_path"].dropna()
        check_folder(video_path, "video_path")
        self.captions = open_captions(caption_root)
        self.names = PackedStrings(names)
        self.video_path = Path(video_path)
        self.tokenizer = tokenizer
        self.num_frames, self.size, self.fps = num_frames, size, fps
        self.crop_only, self.centercrop, self.random_flip = crop_only, centercrop, random_flip
        self.min_time, self.num_candidates = min_time, num_candidates
        self.seed, self.decoder = seed, decoder
        captions = (num_candidates, TEXT_WORDS) if num_candidates > 1 else (TEXT_WORDS,)
        self.item_spec = {
            "video": ((3, num_frames, size, size), torch.uint8),
            "text": (captions, torch.int64),
        }
        if not any(os.path.isfile(self.video_path / name) for name in names):
            raise InputError(f"--video_path: none of the videos of {csv} is in {video_path}")
        if not any(map(self.captions.has, names)):
            raise InputError(
                f"--caption_root: no captions of the videos of {csv} in {caption_root}"
            )

    def __len__(self):
        return len(self.names)

    def draw(self, key):
        """The video's index that this key is of, and the generator of the sample's randomness."""
        epoch, index, attempt = (*key, 0)[:3]
        if attempt == 0:
            return index, np.random.default_rng((self.seed, epoch, index))
        rng = np.random.default_rng((self.seed, epoch, index, attempt))
        return int(rng.integers(len(self))), rng

    def name(self, key):
        """The video_path, as the list has it, of a key's video."""
        return self.names[self.draw(key)[0]]

    def __getitem__(self, key):
        index, rng = self.draw(key)
        try:
            return self.sample(self.names[index], rng)
        except (CaptionError, DecodeError) as error:
            return {"error": str(error)}
        except Exception as error:  # a run of weeks does not end for one strange file
            return {"error": f"unexpected {type(error).__name__}: {one_line(error)}"}

    def sample(self, name, rng):
        """One sample of this video. Raises CaptionError or DecodeError."""
        starts, ends, texts = self.captions.read(name)
        index = int(rng.integers(len(texts)))
        nearest = find_nearest_candidates(starts, ends, index, self.num_candidates)
        text = torch.stack([self.tokenizer(texts[i]) for i in nearest])

        start, end = clip_window(starts[index], ends[index], self.min_time)
        seek = int(rng.integers(start, int(max(start, end - self.num_frames / self.fps)) + 1))
        crop = (0.5, 0.5) if self.centercrop else tuple(rng.random(2))
        flip = bool(self.random_flip and rng.random() < 0.5)
        video = decode_clip(
            self.video_path / name,
            seek,
            fps=self.fps,
            num_frames=self.num_frames,
            size=self.size,
            crop_only=self.crop_only,
            crop=crop,
            flip=flip,
            backend=self.decoder,
        )
        return {"video": video, "text": text if self.num_candidates > 1 else text[0]}


class StepSampler(Sampler):
    """The keys of this rank's share of every step's batch, from `first_step` on.

    Each epoch is a permutation of the videos drawn from (seed, epoch), and the batches are cut from
    the epochs laid end to end: every video is visited once an epoch, no batch is short, and the
    union of the ranks' shares does not depend on how many ranks there are. Less than a batch is
    left over where the last step ends.
    """

    def __init__(self, length, batch_size, steps, *, first_step=0, seed=1, rank=0, world_size=1):
        """batch_size: of all ranks together. steps: at which to stop."""
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps, self.first_step = steps, first_step
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __len__(self):
        return self.steps - self.first_step

    def __iter__(self):
        drawn, order = None, None
        for step in range(self.first_step, self.steps):
            keys = []
            for position in range(self.share):
                epoch, place = divmod(step * self.batch_size + self.offset + position, self.length)
                if epoch != drawn:
                    drawn = epoch
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
                keys.append((epoch, int(order[place])))
            yield keys


def training_batches(dataset, sampler, *, quarantined, **reading):
    """Yields a rank's share of every step's batch, with other samples in place of unreadable ones.

    A batch has "video" and "text" as the items, [b, ...], and "bad": for each sample that others
    had to replace, in turn, a list of (video_path, reason). A video whose decoding crashes its
    worker, or takes it too long, joins `quarantined`, a set of video_paths that are not tried; the
    sample that takes a place is the same whether a video is in quarantine or found to crash. For
    the other arguments see workers.sample_batches. Raises InputError where MAX_REPLACEMENTS
    samples in a row cannot be read.
    """
    faults = {}  # (epoch, index) -> [(video_path, reason)] of its attempts
    sent = deque()  # the keys of the batches in work

    def next_attempt(key, reason):
        epoch, index, attempt = (*key, 0)[:3]
        faults.setdefault((epoch, index), []).append((dataset.name(key), reason))
        if attempt == MAX_REPLACEMENTS:
            raise InputError(
                f"--video_path: {MAX_REPLACEMENTS} samples in a row cannot be read: {reason}"
            )
        return epoch, index, attempt + 1

    def usable(key):
        while quarantined and dataset.name(key) in quarantined:
            key = next_attempt(key, QUARANTINE)
        return key

    def replace(key, error):
        if isinstance(error, WorkerFailure):
            name = dataset.name(key)
            log.warning("quarantined %s: it %s", name, error)
            quarantined.add(name)
            error = f"{QUARANTINE}: it {error}"
        return usable(next_attempt(key, error))

    def key_batches():
        for keys in sampler:
            sent.append(keys)
            yield [usable(key) for key in keys]

    for batch in sample_batches(dataset, key_batches(), retry=replace, **reading):
        del batch["errors"]
        yield {**batch, "bad": [faults.pop(key) for key in sent.popleft() if key in faults]}
