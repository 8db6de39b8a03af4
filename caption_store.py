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
import shutil
import zlib
from array import array
from bisect import bisect_left
from contextlib import ExitStack, closing
from itertools import compress, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from tables import read_cells
from utils import InputError, check_absent, check_folder, make_folder, one_line, sync_folder

MAX_SECONDS = 1e6  # a caption's time beyond is a slip

ABOUT = "caption_store.json"
FORMAT, VERSION = "captions by video", 1
INDEX = {"names": "|u1", "name_ends": "<i8", "firsts": "<i8", "counts": "<i8", "checksums": "<u4"}
CAPTIONS = {"starts": "<f8", "ends": "<f8", "text": "|u1", "text_ends": "<i8"}
PARTIAL = ".part"
BUFFER = 1 << 20  # bytes written at a time


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


def caption_names(video_path, by_id=False):
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
        [name] = caption_names(video_path)
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
        for name in caption_names(video_path, self.by_id):
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


class ArrayFile:
    """An array [n] in a .npy file, written piece by piece: it need not fit into memory."""

    def __init__(self, path, dtype):
        self.dtype, self.length = np.dtype(dtype), 0
        self.sum = 0  # CRC-32 of the values
        self.file = open(path, "xb", buffering=BUFFER)  # noqa: SIM115
        self.write_header()
        self.begin = self.file.tell()

    def write_header(self):
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values):
        """values: an array of this type."""
        data = np.ascontiguousarray(values, self.dtype).data
        self.file.write(data)
        self.length += len(data)
        self.sum = zlib.crc32(data, self.sum)

    def finish(self):
        """Has all of it on the disk. Returns the file's size in bytes."""
        self.file.seek(0)
        self.write_header()
        if self.file.tell() != self.begin:  # numpy leaves room for any length
            raise RuntimeError("the header of a .npy file does not fit in its place")
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self):
        self.file.close()


def write_store(folder, videos, *, by_id=False):
    """Writes a store into a folder that is not there yet, whole or not at all.

    videos: an iterable of (name, starts, ends, texts) as read_captions gives them, each name once.
    Returns how many videos and captions there are. Raises InputError where --out cannot be written
    or there are no videos.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    check_absent(folder, "out")
    make_folder(partial.parent, "out")
    try:
        partial.mkdir()
    except FileExistsError:
        raise InputError(
            f"--out: {partial} is there: wait for the run that writes it, or remove it"
        ) from None
    try:
        counts = write_arrays(partial, videos, by_id)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(partial.parent)
    except OSError as error:
        raise InputError(f"--out: cannot write {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def write_arrays(folder, videos, by_id):
    with ExitStack() as stack:
        arrays = {
            name: stack.enter_context(closing(ArrayFile(folder / file_name(name), dtype)))
            for name, dtype in {**INDEX, **CAPTIONS}.items()
        }
        names, firsts, counts, checksums = [], array("q"), array("q"), array("L")
        for name, starts, ends, texts in videos:
            encoded = [text.encode() for text in texts]
            text = b"".join(encoded)
            text_ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
            names.append(name)
            firsts.append(arrays["starts"].length)
            counts.append(len(texts))
            checksums.append(checksum(starts, ends, text_ends, text))
            arrays["starts"].append(starts)
            arrays["ends"].append(ends)
            arrays["text_ends"].append(text_ends + arrays["text"].length)
            arrays["text"].append(np.frombuffer(text, np.uint8))
        if not names:
            raise InputError("--caption_root: there are no captions with usable times in it")

        order = sorted(range(len(names)), key=names.__getitem__)
        packed = PackedStrings(names[place] for place in order)
        arrays["names"].append(packed.characters)
        arrays["name_ends"].append(packed.ends)
        for name, values in (("firsts", firsts), ("counts", counts), ("checksums", checksums)):
            arrays[name].append(np.array(values, arrays[name].dtype)[order])
        about = {
            "format": FORMAT,
            "version": VERSION,
            "videos": len(names),
            "captions": arrays["starts"].length,
            "by_id": by_id,
            "sizes": {name: file.finish() for name, file in arrays.items()},
            "sums": {name: arrays[name].sum for name in INDEX},
        }
    with open(folder / ABOUT, "w") as file:
        file.write(json.dumps(about, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return about["videos"], about["captions"]
