"""Pack the captions of all videos into a caption store; see captions/readers.py for the format."""

import json
import os
import shutil
import zlib
from array import array
from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from captions.readers import (
    CAPTIONS,
    FORMAT,
    INDEX,
    MANIFEST,
    VERSION,
    PackedStrings,
    compute_checksum,
    file_name,
)
from utils import DataError, sync_folder

PARTIAL = ".part"
BUFFER = 1 << 20  # bytes written at a time


class ArrayFile:
    """An array [n] in a .npy file, written piece by piece so that it need not fit in memory."""

    def __init__(self, path: str | os.PathLike[str], dtype: str):
        self.dtype, self.length = np.dtype(dtype), 0
        self.sum = 0  # CRC-32 of the values
        self.file = open(path, "xb", buffering=BUFFER)  # noqa: SIM115
        self.write_header()
        self.begin = self.file.tell()

    def write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self.dtype).data
        self.file.write(data)
        self.length += len(data)
        self.sum = zlib.crc32(data, self.sum)

    def finish(self) -> int:
        """Complete the file and sync it to disk. Returns its size in bytes."""
        self.file.seek(0)
        self.write_header()
        if self.file.tell() != self.begin:  # numpy pads the header for any length
            raise RuntimeError("the header of a .npy file does not fit in the space reserved")
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()


def write_store(
    folder: str | os.PathLike[str],
    videos: Iterable[tuple[str, np.ndarray, np.ndarray, list[str]]],
    *,
    by_id: bool = False,
    origin: dict | None = None,
) -> tuple[int, int]:
    """Write a caption store to a new folder, atomically.

    videos: (name, starts, ends, texts) of each video, as read_captions returns them, with unique
    names. by_id: see readers.lookup_keys. origin: what the manifest records about the source of the
    captions, {"source": path, "formats": {format: number of videos}, "language": tag}. It is used
    after the last video, so that the iterator may fill in the counts. Returns the numbers of videos
    and captions. Raises DataError if the folder exists or cannot be written, ValueError if there
    are no videos.
    """
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}{PARTIAL}")
    if os.path.lexists(folder):
        raise DataError(folder, "already exists; remove it or give another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            raise DataError(partial, "exists; wait for the run that writes it, or remove it")
        partial.mkdir()
    except OSError as error:
        raise DataError(folder, f"cannot be written: {error.strerror}") from None
    try:
        counts = write_arrays(partial, videos, by_id, origin)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(partial.parent)
    except OSError as error:
        raise DataError(folder, f"cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def write_arrays(
    folder: Path, videos: Iterable, by_id: bool, origin: dict | None
) -> tuple[int, int]:
    """Write the files of a store. Returns the numbers of videos and captions."""
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
            checksums.append(compute_checksum(starts, ends, text_ends, text))
            arrays["starts"].append(starts)
            arrays["ends"].append(ends)
            arrays["text_ends"].append(text_ends + arrays["text"].length)
            arrays["text"].append(np.frombuffer(text, np.uint8))
        if not names:
            raise ValueError("there are no captions to write")

        order = sorted(range(len(names)), key=names.__getitem__)
        packed = PackedStrings(names[place] for place in order)
        arrays["names"].append(packed.characters)
        arrays["name_ends"].append(packed.ends)
        for name, values in (("firsts", firsts), ("counts", counts), ("checksums", checksums)):
            arrays[name].append(np.array(values, arrays[name].dtype)[order])
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "origin": origin,
            "videos": len(names),
            "captions": arrays["starts"].length,
            "by_id": by_id,
            "sizes": {name: file.finish() for name, file in arrays.items()},
            "sums": {name: arrays[name].sum for name in INDEX},
        }
    with open(folder / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest["videos"], manifest["captions"]
