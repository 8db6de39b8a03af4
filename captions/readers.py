"""Read the captions of a video, from a folder of CSV files or from a caption store.

Both return the same captions for a video_path: a store is packed from what the folder's reader
returns, or from other formats (captions/formats.py). A store is a folder of memory-mapped arrays,
which all processes share. A process has one open file per array, whatever the number of videos.

    caption_store.json             format, version, origin, counts, by_id, files' sizes and sums
    names.npy, name_ends.npy       the videos' names, sorted, as PackedStrings
    firsts.npy, counts.npy         [videos] a video's first caption, and its number of captions
    checksums.npy                  [videos] the CRC-32 of a video's captions
    starts.npy, ends.npy           [captions] seconds
    text.npy, text_ends.npy        the captions' texts, as PackedStrings

data/howto100m/prepare.py writes it.
"""

import io
import json
import os
import zlib
from bisect import bisect_left
from collections.abc import Iterable
from itertools import compress, pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from annotations.tables import read_cells
from utils import DataError, one_line

LATEST_TIME = 1e6  # seconds; a later time of a caption is an error in the file
MANIFEST = "caption_store.json"
FORMAT, VERSION = "captions by video", 1
# The arrays and their types.
INDEX = {"names": "|u1", "name_ends": "<i8", "firsts": "<i8", "counts": "<i8", "checksums": "<u4"}
CAPTIONS = {"starts": "<f8", "ends": "<f8", "text": "|u1", "text_ends": "<i8"}

Captions = tuple[np.ndarray, np.ndarray, list[str]]  # starts and ends [C] in seconds, texts


class CaptionError(Exception):
    """Raised if a video's captions cannot be used. The message is one line and names the source."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def read_captions(path: str | os.PathLike[str]) -> Captions:
    """Read a CSV file of captions; see parse_csv. Raises CaptionError, also if it is absent."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise CaptionError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return parse_csv(path, data)


def parse_csv(source: object, data: bytes) -> Captions:
    """Parse a caption file: starts and ends in seconds (float arrays [C]) and a list of texts.

    An empty cell is an empty text. Rows without usable times are skipped. source: the file's name,
    for messages. Raises CaptionError if it is not a table of captions or has no caption.
    """
    try:
        table = read_cells(io.BytesIO(data))
        # numpy rounds to the nearest number, like JSON parsers; older versions of pandas do not.
        starts, ends = table["start"].to_numpy(float), table["end"].to_numpy(float)
        texts = table["text"].fillna("").tolist()
    except (ValueError, KeyError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise CaptionError(f"{source}: {reason}") from None
    return usable_captions(starts, ends, texts, source)


def usable_captions(
    starts: np.ndarray, ends: np.ndarray, texts: list[str], source: object
) -> Captions:
    """Return the captions with usable times. Raises CaptionError if there are none.

    A caption that ends before it starts is usable: its clip is widened like that of a short one.
    """
    usable = (starts >= 0) & (starts < LATEST_TIME) & (ends >= 0) & (ends < LATEST_TIME)
    if not usable.any():
        raise CaptionError(f"{source}: has no caption with usable times")
    return starts[usable], ends[usable], list(compress(texts, usable))


def lookup_keys(video_path: str, by_id: bool = False) -> list[str]:
    """Return the names under which to look up a video's captions; the first match counts.

    They are the video's path without its extension and, if by_id, the file's name alone: published
    captions are listed by a video's id, which is the file's name in any folder.
    """
    path = PurePosixPath(video_path)
    path = path.parent / path.stem
    return [str(path), path.name] if by_id else [str(path)]


class PackedStrings:
    """Strings in two arrays, which processes share after a fork.

    Reading a list would copy its pages in each process, because it updates reference counts.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode() for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self.characters = np.frombuffer(b"".join(encoded), np.uint8)

    @classmethod
    def from_arrays(cls, characters: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        packed = cls.__new__(cls)
        packed.characters, packed.ends = characters, ends
        return packed

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.characters[start : self.ends[index]].tobytes().decode()


def is_store(root: str | os.PathLike[str]) -> bool:
    """Return whether this folder is a caption store, even an incomplete one."""
    return any(os.path.isfile(Path(root, name)) for name in (MANIFEST, *map(file_name, CAPTIONS)))


def describe_origin(origin: dict | None) -> str:
    """Describe the source of a store, as its manifest records it; see packing.write_store."""
    if origin is None:
        return "a store that does not record its origin"
    formats = [f"{count:,} {name}" for name, count in origin["formats"].items()]
    return f"packed from {origin['source']}: {', '.join(formats)}; language {origin['language']}"


def file_name(array: str) -> str:
    return f"{array}.npy"


class CaptionFolder:
    """A folder with a CSV file per video, `<video_path without extension>.csv`.

    Captions of other formats must be packed into a store, which settles once which file of a video
    to use and whether it is in the right language.
    """

    origin = "CSV files, one per video"

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)

    def file(self, video_path: str) -> Path:
        [name] = lookup_keys(video_path)
        return self.root / f"{name}.csv"

    def has(self, video_path: str) -> bool:
        return os.path.isfile(self.file(video_path))

    def read(self, video_path: str) -> Captions:
        """Return the captions of a video; see read_captions. Raises CaptionError."""
        return read_captions(self.file(video_path))


class CaptionStore:
    """The captions of all videos, in memory-mapped arrays.

    Opening it checks the sizes of all files and the checksums of the index; reading a video checks
    the checksum of its captions. Raises DataError if it is incomplete, damaged or of another
    version.
    """

    def __init__(self, root: str | os.PathLike[str]):
        self.root = Path(root)
        try:
            manifest = json.loads((self.root / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"{MANIFEST} has another format")
            if manifest["version"] != VERSION:
                raise DataError(
                    root,
                    f"is a caption store of version {manifest['version']}, but this program reads "
                    f"version {VERSION}; pack it again (data/howto100m/prepare.py pack)",
                )
            self.by_id = manifest["by_id"]
            self.origin = describe_origin(manifest.get("origin"))
            arrays = {name: self.open_array(name, manifest) for name in (*INDEX, *CAPTIONS)}
        except FileNotFoundError as error:
            raise self.damage(f"{Path(error.filename).name} is missing") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.damage(one_line(error)) from None
        self.names = PackedStrings.from_arrays(arrays["names"], arrays["name_ends"])
        self.firsts, self.counts = arrays["firsts"], arrays["counts"]
        self.checksums = arrays["checksums"]
        self.starts, self.ends = arrays["starts"], arrays["ends"]
        self.text, self.text_ends = arrays["text"], arrays["text_ends"]

    def open_array(self, name: str, manifest: dict) -> np.ndarray:
        path = self.root / file_name(name)
        size = path.stat().st_size
        if size != manifest["sizes"][name]:
            raise ValueError(
                f"{path.name} has {size:,} bytes instead of {manifest['sizes'][name]:,}"
            )
        values = np.load(path, mmap_mode="r").view(np.ndarray)  # slices of np.memmap are slow
        if values.dtype.str != {**INDEX, **CAPTIONS}[name] or values.ndim != 1:
            raise ValueError(f"{path.name} is not an array of captions")
        if name in INDEX and zlib.crc32(values) != manifest["sums"][name]:
            raise ValueError(f"{path.name} does not match its checksum")
        return values

    def damage(self, reason: str) -> DataError:
        return DataError(
            self.root,
            f"is not an intact caption store ({reason}); copy it again, or pack it again "
            "(data/howto100m/prepare.py pack)",
        )

    def __len__(self) -> int:
        return len(self.names)

    def find(self, video_path: str) -> int | None:
        """Return the position of a video's captions in the index, or None."""
        for name in lookup_keys(video_path, self.by_id):
            place = bisect_left(self.names, name)
            if place < len(self.names) and self.names[place] == name:
                return place
        return None

    def has(self, video_path: str) -> bool:
        return self.find(video_path) is not None

    def read(self, video_path: str) -> Captions:
        """Return the captions of a video; see read_captions. Raises CaptionError."""
        place = self.find(video_path)
        if place is None:
            raise CaptionError(f"{self.root}: has no captions of {video_path}")
        return self.read_at(place)

    def read_at(self, place: int) -> Captions:
        """Return the captions of the video at this position in the index."""
        first = int(self.firsts[place])
        rows = slice(first, first + int(self.counts[place]))
        starts, ends = self.starts[rows], self.ends[rows]
        begin = int(self.text_ends[first - 1]) if first else 0
        text_ends = self.text_ends[rows] - begin
        text = self.text[begin : begin + int(text_ends[-1])].tobytes()
        if compute_checksum(starts, ends, text_ends, text) != self.checksums[place]:
            raise CaptionError(
                f"{self.root}: the captions of {self.names[place]} are damaged; copy it again"
            )
        bounds = pairwise([0, *text_ends.tolist()])
        return starts, ends, [text[a:b].decode() for a, b in bounds]


def open_captions(root: str | os.PathLike[str]) -> CaptionFolder | CaptionStore:
    """Open a folder of caption files or a caption store.

    Both have the methods has(video_path) and read(video_path). Raises DataError.
    """
    if os.path.isfile(root):
        raise DataError(root, "is a file; pack it into a store (data/howto100m/prepare.py pack)")
    check_root(root)
    return CaptionStore(root) if is_store(root) else CaptionFolder(root)


def check_root(root: str | os.PathLike[str]) -> None:
    """Raise DataError if this is not an existing folder."""
    if not os.path.isdir(root):
        raise DataError(root or "''", "is not an existing folder; give the one with the captions")


def compute_checksum(*parts) -> int:
    """Return the CRC-32 of the concatenation of arrays or bytes."""
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value
