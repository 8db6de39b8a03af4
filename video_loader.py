"""HowTo100M for training: a random caption of a video, its neighbours, and a clip around it.

A sample that cannot be read is replaced by another; see training_batches.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from annotations.tables import read_table
from captions.readers import CaptionError, CaptionFolder, CaptionStore, PackedStrings
from distributed.workers import WorkerFailure, sample_batches
from utils import DataError, log, one_line
from video_decoder import ClipSpec, DecodeError, decode_clip, video_exists

TRAINING_WORDS = 20  # words kept of a caption
MAX_REPLACEMENTS = 100  # samples tried in place of an unreadable one
QUARANTINE = "quarantined"  # the start of the reason if a video is not to be tried again

Key = tuple[int, ...]  # (epoch, index) or (epoch, index, attempt)


def read_video_list(csv: str | os.PathLike[str]) -> list[str]:
    """Return the column video_path of a CSV file. Raises DataError or OSError."""
    columns = ["video_path"]
    return read_table(csv, columns, names=columns)["video_path"].dropna().tolist()


def find_nearest_candidates(
    starts: Sequence[float], ends: Sequence[float], index: int, num_candidates: int
) -> list[int]:
    """Return the indices of the captions around caption `index` (paper, section 3.1).

    The range grows from [index] on the side that keeps its time span shorter. When it reaches the
    first caption, the result is the first num_candidates; when it reaches the last, the last ones.
    Shorter files repeat their captions.
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


def clip_window(start: float, end: float, min_time: float) -> tuple[int, int]:
    """Return a caption's times, widened around the middle to min_time, in whole seconds."""
    if end - start < min_time:
        start = max(0, start - (min_time - (end - start)) / 2)
        end = start + min_time
    return int(start), int(end)


class HowTo100M(Dataset):
    """Videos with narration. A sample is a function of (seed, epoch, index, attempt) alone.

    Keys are (epoch, index) or (epoch, index, attempt). Attempts from 1 on are of other videos, to
    replace a sample that cannot be read. An item has "video", uint8 [3, num_frames, size, size],
    and "text", int64 [K, 20] for K candidate captions, [20] if K is 1; or "error", a line that
    names the video or the captions that cannot be read.
    """

    def __init__(
        self,
        names: Iterable[str],
        video_root: str | os.PathLike[str],
        captions: CaptionFolder | CaptionStore,
        tokenizer: Callable[[str], torch.Tensor],
        clip: ClipSpec = ClipSpec(),
        *,
        crop_only: bool = True,
        centercrop: bool = False,
        random_flip: bool = True,
        min_time: float = 5.0,
        num_candidates: int = 1,
        seed: int = 1,
    ):
        """names: paths of videos in video_root; see read_video_list. captions: from open_captions.

        crop_only: crop the unscaled frame; otherwise crop its largest square and scale it.
        centercrop: centre the crop, which is random otherwise. random_flip: mirror half of the
        clips. min_time: shortest stretch of video around a caption, in seconds.
        """
        self.names = PackedStrings(names)
        self.video_root = Path(video_root)
        self.captions, self.tokenizer, self.clip = captions, tokenizer, clip
        self.crop_only, self.centercrop, self.random_flip = crop_only, centercrop, random_flip
        self.min_time, self.num_candidates, self.seed = min_time, num_candidates, seed
        text = (num_candidates, TRAINING_WORDS) if num_candidates > 1 else (TRAINING_WORDS,)
        self.item_spec = {"video": (clip.shape, torch.uint8), "text": (text, torch.int64)}

    def check_videos(self) -> None:
        """Raise DataError if none of the videos exists."""
        if not any(video_exists(self.video_root / name) for name in self.names):
            raise DataError(self.video_root, "has no video of the list; give their folder")

    def check_captions(self) -> None:
        """Raise DataError if none of the videos has captions."""
        if not any(map(self.captions.has, self.names)):
            reason = (
                "has no captions for the videos in the list; give others, or pack captions that "
                "are not CSV files (data/howto100m/prepare.py pack)"
            )
            raise DataError(self.captions.root, reason)

    def __len__(self) -> int:
        return len(self.names)

    def pick_video(self, key: Key) -> tuple[int, np.random.Generator]:
        """Return the index of a key's video, and the sample's random generator."""
        epoch, index, attempt = (*key, 0)[:3]
        if attempt == 0:
            return index, np.random.default_rng((self.seed, epoch, index))
        rng = np.random.default_rng((self.seed, epoch, index, attempt))
        return int(rng.integers(len(self))), rng

    def name(self, key: Key) -> str:
        """Return the path of a key's video, as the list has it."""
        return self.names[self.pick_video(key)[0]]

    def __getitem__(self, key: Key) -> dict:
        index, rng = self.pick_video(key)
        try:
            return self.sample(self.names[index], rng)
        except (CaptionError, DecodeError) as error:
            return {"error": str(error)}
        except Exception as error:  # one odd file must not end a run of weeks
            return {"error": f"unexpected {type(error).__name__}: {one_line(error)}"}

    def sample(self, name: str, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """Return a sample of this video. Raises CaptionError or DecodeError."""
        # The caption, and the candidates around it.
        starts, ends, texts = self.captions.read(name)
        index = int(rng.integers(len(texts)))
        nearest = find_nearest_candidates(starts, ends, index, self.num_candidates)
        text = torch.stack([self.tokenizer(texts[i]) for i in nearest])

        # The clip, within the caption's time.
        start, end = clip_window(starts[index], ends[index], self.min_time)
        seek = int(rng.integers(start, int(max(start, end - self.clip.seconds)) + 1))
        crop = (0.5, 0.5) if self.centercrop else tuple(rng.random(2))
        flip = bool(self.random_flip and rng.random() < 0.5)
        video = decode_clip(
            self.video_root / name,
            seek,
            **self.clip.options,
            crop_only=self.crop_only,
            crop=crop,
            flip=flip,
        )
        return {"video": video, "text": text if self.num_candidates > 1 else text[0]}


class StepSampler(Sampler):
    """The keys of this rank's share of every step's batch, from `first_step` on.

    Each epoch is a permutation of the videos drawn from (seed, epoch), and the batches are cut from
    the concatenation of the epochs. Every video is visited once per epoch, all batches have the
    same size, and the union of the ranks' shares does not depend on the number of ranks. Less than
    one batch at the end of the last epoch is not used.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        *,
        first_step: int = 0,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        """length: of the data set. batch_size: of all ranks together. steps: at which to stop."""
        if batch_size % world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps, self.first_step = steps, first_step
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
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


def training_batches(
    dataset: HowTo100M, sampler: Iterable[list[Key]], *, quarantined: set[str], **reading
) -> Iterator[dict]:
    """Yield a rank's share of every step's batch, with unreadable samples replaced by others.

    A batch has the items' "video" and "text", [b, ...], and "bad": for each sample that was
    replaced, a list of the (video_path, reason) of all failed attempts. A video that crashes or
    hangs its worker is added to `quarantined`, a set of video_paths that are not tried again. Its
    replacement is the same whether or not it was in the set before. reading: the other arguments
    of workers.sample_batches. Raises DataError if MAX_REPLACEMENTS samples in a row cannot be read.
    """
    faults = {}  # (epoch, index) -> [(video_path, reason)] of its attempts
    sent = deque()  # the keys of the batches that are being read

    def next_attempt(key, reason):
        epoch, index, attempt = (*key, 0)[:3]
        faults.setdefault((epoch, index), []).append((dataset.name(key), reason))
        if attempt == MAX_REPLACEMENTS:
            raise DataError(
                dataset.video_root,
                f"{MAX_REPLACEMENTS} samples in a row cannot be read: {reason}",
            )
        return epoch, index, attempt + 1

    def skip_quarantined(key):
        while quarantined and dataset.name(key) in quarantined:
            key = next_attempt(key, QUARANTINE)
        return key

    def replace(key, error):
        if isinstance(error, WorkerFailure):
            name = dataset.name(key)
            log.warning("quarantined %s: it %s", name, error)
            quarantined.add(name)
            error = f"{QUARANTINE}: it {error}"
        return skip_quarantined(next_attempt(key, error))

    def key_batches():
        for keys in sampler:
            sent.append(keys)
            yield [skip_quarantined(key) for key in keys]

    for batch in sample_batches(dataset, key_batches(), retry=replace, **reading):
        batch["bad"] = [faults.pop(key) for key in sent.popleft() if key in faults]
        del batch["errors"]
        yield batch
        del batch  # its memory is the caller's to free
