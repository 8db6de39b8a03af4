"""The captions of a video: from a folder of CSV files, or from a store that holds those of all.

Both give the same for a video_path of the video list: what goes into a store was read by the
reader of the folder. A store is a folder of arrays that are mapped into memory: all processes share
them, and each has as many files open as there are arrays, however many videos there are.

    caption_store.json             format, version, counts, by_id, sizes and sums of the files
    names.npy, name_ends.npy       the videos' names in order, as PackedStrings
    firsts.npy, counts.npy         [videos] a video's first caption, and how many it has
    checksums.npy                  [videos] the CRC-32 of a video's captions
    starts.npy, ends.npy           [captions] seconds
    text.npy, text_ends.npy        the captions' texts, as PackedStrings

data/howto100m/prepare.py makes it.
"""

import json
import os
import zlib
from bisect import bisect_left
from itertools import compress, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from annotations.tables import read_cells
from utils import InputError, check_folder, one_line

MAX_SECONDS = 1e6  # a caption's time beyond is a slip
ABOUT = "caption_store.json"
FORMAT, VERSION = "captions by video", 1
INDEX = {"names": "|u1", "name_ends": "<i8", "firsts": "<i8", "counts": "<i8", "checksums": "<u4"}
CAPTIONS = {"starts": "<f8", "ends": "<f8", "text": "|u1", "text_ends": "<i8"}


class CaptionError(Exception):
    """The captions of a video cannot be used. One line that names where they are."""

    def __init__(self, message):
        super().__init__(one_line(message))


def read_captions(path):
    """Reads a caption file: start and end in seconds (float arrays) and a list of texts.

    An empty cell is an empty text. Rows without usable times are passed over. Raises CaptionError
    where the file is absent, is no table of captions or has no caption.
    """
    try:
        table = read_cells(path)
        # From text to the nearest number, as a JSON reader does it: older pandas only come close.
        starts, ends = table["start"].to_numpy(float), table["end"].to_numpy(float)
        texts = table["text"].fillna("").tolist()
    except (OSError, ValueError, KeyError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise CaptionError(f"{path}: {reason}") from None
    return usable_captions(starts, ends, texts, path)


def usable_captions(starts, ends, texts, source):
    """The captions with usable times. Raises CaptionError, naming the source, where none has.

    One that ends before it starts is usable: its clip is widened to --min_time like a short one's.
    """
    usable = (starts >= 0) & (starts < MAX_SECONDS) & (ends >= 0) & (ends < MAX_SECONDS)
    if not usable.any():
        raise CaptionError(f"{source}: no caption with usable times in it")
    return starts[usable], ends[usable], list(compress(texts, usable))


def lookup_keys(video_path, by_id=False):
    """The names that a video's captions may have; the first one that there is counts.

    The video's path without its extension. Where captions go by_id, then also the file's name
    alone: they were published by the video's id, which is what the file is called in any folder.
    """
    path = PurePosixPath(video_path)
    path = path.parent / path.stem
    return [str(path), path.name] if by_id else [str(path)]


class PackedStrings:
    """Strings in two arrays. Workers share them; of a list each would copy every page it reads."""

    def __init__(self, strings):
        encoded = [string.encode() for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self.characters = np.frombuffer(b"".join(encoded), np.uint8)

    @classmethod
    def of_arrays(cls, characters, ends):
        packed = cls.__new__(cls)
        packed.characters, packed.ends = characters, ends
        return packed

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        start = self.ends[index - 1] if index else 0
        return self.characters[start : self.ends[index]].tobytes().decode()


def open_captions(root):
    """The captions that --caption_root names: a CaptionFolder or a CaptionStore.

    Either has read(video_path) -> (starts, ends, texts) as read_captions, and has(video_path).
    Raises InputError.
    """
    if root and os.path.isfile(root):
        raise InputError(
            f"--caption_root: {root} is a file: make a store of it (data/howto100m/prepare.py pack)"
        )
    check_folder(root, "caption_root")
    return CaptionStore(root) if is_store(root) else CaptionFolder(root)


def is_store(root):
    """Whether this folder is a store, or what is left of one."""
    return any(os.path.isfile(Path(root, name)) for name in (ABOUT, *map(file_name, CAPTIONS)))


def file_name(name):
    return f"{name}.npy"


class CaptionFolder:
    """A caption file for each video, `<video_path without extension>.csv`."""

    def __init__(self, root):
        self.root = Path(root)

    def file(self, video_path):
        [name] = lookup_keys(video_path)
        return self.root / f"{name}.csv"

    def has(self, video_path):
        return os.path.isfile(self.file(video_path))

    def read(self, video_path):
        return read_captions(self.file(video_path))


class CaptionStore:
    """The captions of all videos, in arrays that are mapped into memory.

    Opening it checks the sizes of all files and the sums of the index; reading a video checks the
    sum of its captions.
    """

    def __init__(self, root):
        self.root = Path(root)
        try:
            about = json.loads((self.root / ABOUT).read_text())
            if about["format"] != FORMAT or about["version"] != VERSION:
                raise InputError(
                    f"--caption_root: {root} is a caption store of version {about['version']}, "
                    f"this program reads {VERSION}: make it again (data/howto100m/prepare.py pack)"
                )
            self.by_id = about["by_id"]
            arrays = {name: self.open_array(name, about) for name in (*INDEX, *CAPTIONS)}
        except FileNotFoundError as error:
            raise self.damaged(f"{Path(error.filename).name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damaged(one_line(error)) from None
        self.names = PackedStrings.of_arrays(arrays["names"], arrays["name_ends"])
        self.firsts, self.counts = arrays["firsts"], arrays["counts"]
        self.checksums = arrays["checksums"]
        self.starts, self.ends = arrays["starts"], arrays["ends"]
        self.text, self.text_ends = arrays["text"], arrays["text_ends"]

    def open_array(self, name, about):
        path = self.root / file_name(name)
        size = path.stat().st_size
        if size != about["sizes"][name]:
            raise ValueError(f"{path.name} has {size:,} bytes instead of {about['sizes'][name]:,}")
        values = np.load(path, mmap_mode="r").view(np.ndarray)  # slices of np.memmap are slow
        if values.dtype.str != {**INDEX, **CAPTIONS}[name] or values.ndim != 1:
            raise ValueError(f"{path.name} is not the array that it was")
        if name in INDEX and zlib.crc32(values) != about["sums"][name]:
            raise ValueError(f"{path.name} is not what was written")
        return values

    def damaged(self, reason):
        return InputError(
            f"--caption_root: {self.root} is not a whole caption store ({reason}): copy it again "
            "or make it again (data/howto100m/prepare.py pack)"
        )

    def __len__(self):
        return len(self.names)

    def find(self, video_path):
        """The place of a video's captions in the index, or None."""
        for name in lookup_keys(video_path, self.by_id):
            place = bisect_left(self.names, name)
            if place < len(self.names) and self.names[place] == name:
                return place
        return None

    def has(self, video_path):
        return self.find(video_path) is not None

    def read(self, video_path):
        """start and end in seconds (float arrays) and a list of texts. Raises CaptionError."""
        place = self.find(video_path)
        if place is None:
            raise CaptionError(f"{self.root}: no captions of {video_path} in it")
        return self.read_at(place)

    def read_at(self, place):
        """The captions of the video at this place of the index, see read."""
        first = int(self.firsts[place])
        rows = slice(first, first + int(self.counts[place]))
        starts, ends = self.starts[rows], self.ends[rows]
        begin = int(self.text_ends[first - 1]) if first else 0
        text_ends = self.text_ends[rows] - begin
        text = self.text[begin : begin + int(text_ends[-1])].tobytes()
        if checksum(starts, ends, text_ends, text) != self.checksums[place]:
            raise CaptionError(
                f"{self.root}: the captions of {self.names[place]} are damaged: copy the store "
                "again"
            )
        bounds = pairwise([0, *text_ends.tolist()])
        return starts, ends, [text[a:b].decode() for a, b in bounds]


def checksum(*parts):
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value
