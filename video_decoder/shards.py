"""Read videos in tar files in place, under the path `SHARD.tar/MEMBER`.

A shard is an uncompressed tar file whose name ends in .tar. FFmpeg opens only the bytes of one
member, through its `subfile` protocol. The shard's index, `SHARD.tar.index`, has the position of
each member and is written on first use. If the shard's folder is not writable, the index is written
to the user's cache folder; if that is not writable either, each process keeps it in memory. An
index records the size and modification time of its shard, and is rebuilt if they have changed. All
integers are little-endian:

    header     magic, CRC-32 of the rest, size and modification time (ns) of the shard, number of
               members, byte at which the shard is damaged or -1
    starts     int64 [members], first byte in the shard; -f if the member has fault f, see FAULTS
    sizes      int64 [members], bytes
    ends       int64 [members], where each member's name ends in `names`
    names      the members' names, sorted and joined

If two members have the same name, neither is read.
"""

import bisect
import functools
import hashlib
import io
import os
import re
import stat
import struct
import tarfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils import atomic_write, escapes_root, find_files, log, one_line, printable
from video_decoder.limits import DecodeError, FilePath

SHARD = ".tar"
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm")  # tried by find_video, in this order
# Extensions of compressed tar files, which cannot be read in place.
COMPRESSED = {".bz2", ".gz", ".lz4", ".tbz2", ".tgz", ".txz", ".xz", ".zst"}
COMPRESSED_TAR = re.compile(r"\.(tar\.[^./]+|t[bgx]z2?)$", re.IGNORECASE)
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
SHARD_IN_PATH = re.compile(r"\.tar(?=/)", re.IGNORECASE)

HEADER = struct.Struct("<16sQqqqq")
MAGIC = b"milnce shard 1\n\0"
FAULTS = (
    "",
    "leads out of the shard; pack it under another name",
    "is in the shard more than once; keep one",
    "is a link or a special file; pack the file itself",
    "is a sparse file; pack it without holes",
    "is cut short: the shard ends before it does; get the shard again",
)
OUTSIDE, DUPLICATE, NOT_A_FILE, SPARSE, CUT_SHORT = range(1, len(FAULTS))
# Indexes that a process keeps mapped. All processes share their memory, and no file stays open.
OPEN_INDEXES = 4096
MAX_HEADER_BYTES = 1 << 20  # of a member; a larger header is an attempt to exhaust the memory
HEADER_BUFFER = 1 << 13  # bytes; the default is the file system's, on a network perhaps megabytes


class UnusableMember(ValueError):
    """Raised for a member that is in a shard but cannot be read."""


class Source(NamedTuple):
    """The bytes of a video: a file, or `size` bytes of a shard from `start` on."""

    file: str
    start: int | None  # None: the file itself
    size: int
    mtime_ns: int  # of the file

    @property
    def url(self) -> str:
        """Return the URL for FFmpeg, in which no part of the file's name has a special meaning."""
        if self.start is None:
            return f"file:{self.file}"
        return f"subfile,,start,{self.start},end,{self.start + self.size},,:file:{self.file}"

    @property
    def protocols(self) -> str:
        """Return FFmpeg's protocol_whitelist."""
        return "file" if self.start is None else "file,subfile"

    def read(self) -> bytes:
        """Return the bytes. Raises OSError."""
        with open(self.file, "rb") as file:
            file.seek(self.start or 0)
            return file.read(self.size)


class MemberFile(io.RawIOBase):
    """The bytes of a member as a file."""

    def __init__(self, source: Source):
        self.file, self.source, self.position = io.FileIO(source.file), source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.source.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), max(0, self.source.size - self.position))
        self.file.seek(self.source.start + self.position)
        count = self.file.readinto(memoryview(buffer)[:wanted])
        self.position += count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


# --- paths ----------------------------------------------------------------------------------------


def is_shard(path: FilePath) -> bool:
    """Return whether a path has the name of a shard and is a file."""
    return os.fsdecode(path).lower().endswith(SHARD) and os.path.isfile(path)


def locate(path: FilePath) -> Source:
    """Find the bytes of a video.

    Raises OSError, such as FileNotFoundError; UnusableMember; or ValueError if the path is not a
    regular file (FFmpeg would also open folders, pipes and devices) or its shard is not a tar file.
    """
    name = os.fsdecode(path)
    for match in SHARD_IN_PATH.finditer(name):
        shard = name[: match.end()]
        status = os.stat(shard)
        if stat.S_ISREG(status.st_mode):  # otherwise a folder of that name
            return locate_member(shard, status, name[match.end() :])
    status = os.stat(name)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    return Source(name, None, status.st_size, status.st_mtime_ns)


def locate_member(shard: str, status: os.stat_result, name: str) -> Source:
    """Find the bytes of a member of a shard; see locate."""
    index = open_index(shard, status.st_size, status.st_mtime_ns, status.st_ino)
    number = index.find(os.fsencode(plain_name(name)))
    if number is None:
        raise FileNotFoundError("is not in the shard")
    start, size = index.starts[number].item(), index.sizes[number].item()
    if start < 0:
        raise UnusableMember(FAULTS[-start])
    return Source(shard, start, size, status.st_mtime_ns)


def find_source(path: FilePath) -> Source:
    """Find the bytes of a video like `locate`, but raise DecodeError."""
    try:
        return locate(path)
    except (OSError, ValueError) as error:
        raise DecodeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def video_exists(path: FilePath) -> bool:
    """Return whether a video exists, as a file or in a shard, even if it cannot be read."""
    try:
        locate(path)
    except UnusableMember:
        return True
    except (OSError, ValueError):
        return False
    return True


def find_video(*stems: FilePath) -> Path:
    """Return the first path `<stem><suffix>` that exists, with the suffixes VIDEO_SUFFIXES.

    If none exists, return the first of them.
    """
    paths = [Path(f"{os.fspath(stem)}{suffix}") for stem in stems for suffix in VIDEO_SUFFIXES]
    return next(filter(video_exists, paths), paths[0])


def walk_files(root: FilePath, extensions: Collection[str]) -> Iterator[str]:
    """Yield the files in a folder and its shards, or in one shard, as paths relative to it.

    extensions: of the files, in lower case, with the dot. Unusable shards and members are skipped
    and logged, one line each. Raises OSError if a folder or file cannot be read.
    """
    if is_shard(root):
        yield from list_members(os.fsdecode(root), extensions)
        return
    for name in find_files(root, {*extensions, SHARD, *COMPRESSED}):
        path = os.path.join(root, name)
        extension = os.path.splitext(name)[1].lower()
        if extension == SHARD:
            for member in list_members(path, extensions):
                yield f"{name}/{member}"
        elif extension in extensions:
            yield name
        elif COMPRESSED_TAR.search(name):
            warn_once(f"skipped: {printable(path)}: is compressed; decompress it")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once, although commands walk a folder twice, for videos and for captions."""
    log.warning("%s", message)


def list_members(shard: str, extensions: Collection[str]) -> Iterator[str]:
    """Yield the names of the members with one of the extensions. See walk_files."""
    status = os.stat(shard)
    try:
        index = open_index(shard, status.st_size, status.st_mtime_ns, status.st_ino)
    except ValueError as error:
        warn_once(f"skipped: {printable(shard)}: {error}")
        return
    if index.damaged_at >= 0:
        warn_once(
            f"{printable(shard)}: is cut short or damaged at byte {index.damaged_at}; only the "
            "members before it are used"
        )
    for number in range(len(index)):
        name = os.fsdecode(index.name(number))
        if os.path.splitext(name)[1].lower() not in extensions:
            continue
        start = index.starts[number].item()
        if start >= 0 and escapes_root(name):  # the index may be hostile
            start = -OUTSIDE
        if start < 0:
            warn_once(f"skipped: {printable(f'{shard}/{name}')}: {FAULTS[-start]}")
        else:
            yield name


def plain_name(name: str) -> str:
    """Normalize a member's name to the form of paths: `./a//b` becomes `a/b`."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


# --- indexes --------------------------------------------------------------------------------------


class ShardIndex:
    """The members of a shard, sorted by name. See the module's docstring for the arrays."""

    def __init__(self, content: np.ndarray):
        """Parse an index file. content: uint8 [bytes]. Raises ValueError if it is invalid."""
        rest = content[HEADER.size :]
        header = content[: HEADER.size].tobytes()
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError("is not the index of a shard")
        _, checksum, self.size, self.mtime_ns, count, self.damaged_at = HEADER.unpack(header)
        if checksum != zlib.crc32(rest):
            raise ValueError("is damaged")
        if not 0 <= 24 * count <= len(rest):
            raise ValueError("is damaged")
        self.starts, self.sizes, self.ends = rest[: 24 * count].view("<i8").reshape(3, count)
        self.names = rest[24 * count :]
        # A hostile index must not lead to bytes outside the shard. No sum here can overflow.
        ends = [0, *self.ends[:1], *self.ends[-1:], len(self.names)]
        if not (
            np.all((self.starts > -len(FAULTS)) & (self.sizes >= 0) & (self.sizes <= self.size))
            and np.all(self.starts <= self.size - self.sizes)
            and np.all(self.ends[1:] >= self.ends[:-1])
            and ends == sorted(ends)
        ):
            raise ValueError("has members outside the shard")

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, number: int) -> bytes:
        start = self.ends[number - 1] if number else 0
        return self.names[start : self.ends[number]].tobytes()

    def find(self, name: bytes) -> int | None:
        """Return the number of the member of that name, or None."""
        number = bisect.bisect_left(range(len(self)), name, key=self.name)
        return number if number < len(self) and self.name(number) == name else None


@functools.lru_cache(OPEN_INDEXES)
def open_index(shard: str, size: int, mtime_ns: int, inode: int) -> ShardIndex:
    """Open the index of a shard of this size, time and inode; build it if there is no valid one.

    Raises OSError, or ValueError if the file is not a shard.
    """
    beside = f"{shard}.index"
    if index := read_index(beside, size, mtime_ns):
        return index
    cached = cache_path(shard)
    if index := read_index(cached, size, mtime_ns):
        return index
    content = make_index(shard, size, mtime_ns)
    for path in (beside, cached):
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with atomic_write(path) as file:
                file.write(content)
        except OSError:  # not writable
            continue
        if index := read_index(path, size, mtime_ns):
            return index
    return ShardIndex(np.frombuffer(content, np.uint8))


def cache_path(shard: str) -> str:
    """Return the path of a shard's index in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(shard))).hexdigest()
    return os.path.join(folder, "milnce", f"{name}.index")


def read_index(path: str, size: int, mtime_ns: int) -> ShardIndex | None:
    """Memory-map the index of a shard of this size and time.

    Returns None if the index is absent, damaged or for another size or time.
    """
    try:
        length = os.path.getsize(path)
        # Unlike Python's mmap, torch.from_file keeps no file open.
        content = torch.from_file(path, size=length, dtype=torch.uint8).numpy()
    except UnicodeEncodeError:
        content = np.fromfile(path, np.uint8)
    except (OSError, RuntimeError):
        return None
    try:
        index = ShardIndex(content)
    except ValueError:
        return None
    return index if (index.size, index.mtime_ns) == (size, mtime_ns) else None


def make_index(shard: str, size: int, mtime_ns: int) -> bytes:
    """Read the headers of a shard and return the content of its index. See open_index."""
    members, damaged_at = read_headers(shard, size)
    names = sorted(members)
    arrays = [
        [members[name][0] for name in names],
        [members[name][1] for name in names],
        np.cumsum([len(name) for name in names]),
    ]
    rest = b"".join([*(np.array(array, "<i8").tobytes() for array in arrays), *names])
    header = HEADER.pack(MAGIC, zlib.crc32(rest), size, mtime_ns, len(names), damaged_at)
    return header + rest


def read_headers(shard: str, length: int) -> tuple[dict[bytes, tuple[int, int]], int]:
    """Read the headers of a shard of `length` bytes.

    Returns {name: (start or -fault, size)}, and the byte at which it is damaged, or -1. Raises
    OSError, or ValueError if it is not a shard.
    """
    members = {}
    with open(shard, "rb", buffering=HEADER_BUFFER) as file:
        try:
            tar = tarfile.TarFile(
                fileobj=HeaderFile(file, length), encoding="utf-8", errors="surrogateescape"
            )
        except OSError:
            raise
        except Exception as error:  # tarfile raises many types on hostile files
            file.seek(0)
            if file.read(8).startswith(COMPRESSED_MAGIC):
                raise ValueError("is compressed; decompress it") from None
            raise ValueError(f"is not a tar file ({one_line(error)})") from None
        try:
            while member := tar.next():
                tar.members = []  # tarfile appends each member
                if member.isdir():
                    continue
                name, place = describe_member(member, length)
                members[name] = (-DUPLICATE, 0) if name in members else place
            file.seek(tar.offset)
            # Only zeros follow the end marker, unless two files were concatenated.
            end = file.read(MAX_HEADER_BYTES)
            complete = len(end) >= tarfile.BLOCKSIZE and not end.strip(b"\0")
        except OSError:
            raise
        except Exception:
            complete = False
        return members, -1 if complete else min(tar.offset, length)


def describe_member(member: tarfile.TarInfo, length: int) -> tuple[bytes, tuple[int, int]]:
    """Return the name of a member of a shard of `length` bytes, and (start or -fault, size)."""
    start, size, name = member.offset_data, member.size, plain_name(member.name)
    if escapes_root(member.name) or not name:
        return os.fsencode(member.name), (-OUTSIDE, 0)
    if member.issparse():
        start, size = -SPARSE, 0
    elif not member.isreg():
        start, size = -NOT_A_FILE, 0
    elif size < 0 or start + size > length:
        start, size = -CUT_SHORT, 0
    return os.fsencode(name), (start, size)


class HeaderFile:
    """A shard opened for tarfile, without the endless reads that a hostile one could cause."""

    def __init__(self, file: io.BufferedReader, length: int):
        self.file, self.length = file, length
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too large")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        # tarfile rereads the last byte before a header.
        if not self.file.tell() - 1 <= position <= self.length:
            raise tarfile.ReadError("a header points backwards, or past the end")
        return self.file.seek(position)
