"""Videos in tar files: the same pixels as from files, and damaged and hostile tar files."""

import io
import os
import random
import subprocess
import tarfile
import zlib

import numpy as np
import pytest
import torch

from tests.helpers import frames_digest, private_memory
from tests.video_decoder.samples import BASE, FILES
from tests.video_decoder.test_video_decoder import decode_row, golden_rows, random_case
from utils import atomic_write
from video_decoder import (
    BACKENDS,
    EXTENSIONS,
    DecodeError,
    MemberFile,
    decode_clip,
    locate,
    probe_duration,
    probe_size,
    shards,
    video_exists,
    walk_files,
)

CLIP = {"fps": 5, "num_frames": 2, "size": 16}


def pack(shard, members, **options):
    """Write a tar file of (name or TarInfo, bytes) pairs."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", **options) as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return shard


def read(path):
    with MemberFile(locate(path)) as file:
        return file.read()


@pytest.fixture(scope="session")
def member(video, tmp_path_factory):
    """Return a function from a name in FILES to the same file in a shard, between two others."""
    folder = tmp_path_factory.mktemp("shards")

    def put(name):
        shard = folder / f"{name}, of: 100%.tar"
        if not shard.exists():
            others = [("a.json", b"{}"), ("z.mp4", b"no video")]
            others.insert(1, (f"in/{name}", video(name).read_bytes()))
            pack(shard, others)
        return shard / "in" / name

    return put


# --- the same pixels ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["pyav", pytest.param("ffmpeg", marks=pytest.mark.slow)])
@pytest.mark.parametrize("row", golden_rows())
def test_golden_frames(row, backend, member):
    path = member(row["video"])
    expected = row["sha256"] if isinstance(row["sha256"], list) else [row["sha256"]]
    clips = decode_row(row, backend, path.parent)
    assert [frames_digest(clip) for clip in clips] == expected


def check_same(path, packed, backend, cases, seed):
    for number in range(cases):
        rng = random.Random(f"{path.name}/{seed}/{number}")
        function, arguments, settings = random_case(rng)
        plain = function(path, *arguments, **settings, backend=backend)
        shown = function(packed, *arguments, **settings, backend=backend)
        assert torch.equal(plain, shown), (function.__name__, arguments, settings)


SAMPLES = [BASE, "mpeg2.ts", "packed_b.avi", "vp9.webm", "h264_fragments.mp4"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_member_gives_the_pixels_of_the_file(name, backend, video, member):
    check_same(video(name), member(name), backend, 2, "quick")
    assert probe_duration(member(name)) == probe_duration(video(name))
    assert probe_size(member(name)) == probe_size(video(name))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILES)
def test_every_member_gives_the_pixels_of_its_file(name, backend, video, member):
    check_same(video(name), member(name), backend, 4, "slow")


def failure(path, backend):
    with pytest.raises(DecodeError) as error:
        decode_clip(path, 0, **CLIP, backend=backend)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_member_is_treated_as_the_file_is(backend, video, tmp_path):
    whole = video(BASE).read_bytes()
    playlist = f"ffconcat version 1.0\nfile {video(BASE)}\n".encode()
    cases = {"cut.mp4": whole[:2000], "text.mp4": b"no video\n" * 99, "list.mp4": playlist}
    middle = len(whole) // 2
    cases["bits.mp4"] = whole[:middle] + bytes(500) + whole[middle + 500 :]
    shard = pack(tmp_path / "s.tar", cases.items())
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    for name in ("cut.mp4", "text.mp4", "list.mp4"):
        assert failure(shard / name, backend) == failure(tmp_path / name, backend)
    settings = {**CLIP, "num_frames": 16, "backend": backend}
    clips = [decode_clip(path / "bits.mp4", 1, **settings) for path in (shard, tmp_path)]
    assert torch.equal(*clips)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_names_are_only_names(backend, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = decode_clip(video(BASE), 1, **CLIP, backend=backend)
    content = video(BASE).read_bytes()
    names = [
        "-i.mp4",
        "a:b.mp4",
        "%03d.mp4",
        "é ' \\ [0];,.mp4",
        ",,:x/http:.mp4",
        "x" * 200 + "y.mp4",
    ]
    for shard in ("subfile,,start,0,end,9,,:é %d.tar", "-i.TAR"):
        pack(tmp_path / shard, [(name, content) for name in names])
        for name in names:
            shown = decode_clip(f"{shard}/{name}", 1, **CLIP, backend=backend)
            assert torch.equal(shown, expected)


def test_a_member_is_read_as_a_file(tmp_path):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"before"), ("b.mp4", b"0123456789"), ("c", b"x")])
    source = locate(shard / "b.mp4")
    assert (source.size, source.mtime_ns) == (10, shard.stat().st_mtime_ns)
    with io.BufferedReader(MemberFile(source)) as file:
        assert file.read() == b"0123456789" and file.read() == b""
        assert file.seek(-4, os.SEEK_END) == 6 and file.read(2) == b"67"
        assert file.seek(1, os.SEEK_CUR) == 9 and file.read(5) == b"9"
        assert file.seek(20) == 20 and file.read() == b""


# --- names ----------------------------------------------------------------------------------------


def test_members_are_found_by_the_name_that_a_folder_would_give_them(tmp_path):
    """The names of `tar -cf s.tar .` start with `./`."""
    members = [("./a.mp4", b"a"), ("b//c.mp4", b"c"), ("d/./é.mp4", b"e"), ("b.json", b"j")]
    shard = pack(tmp_path / "deep" / "s.tar", members)
    (tmp_path / "file.mp4").write_bytes(b"file")
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "x.mp4").write_bytes(b"x")
    found = sorted(walk_files(tmp_path, EXTENSIONS))
    in_shard = ["a.mp4", "b/c.mp4", "d/é.mp4"]
    expected = [*(f"deep/s.tar/{name}" for name in in_shard), "file.mp4", "folder.tar/x.mp4"]
    assert found == expected
    assert sorted(walk_files(shard, EXTENSIONS)) == in_shard
    assert [read(shard / name) for name in in_shard] == [b"a", b"c", b"e"]
    assert locate(tmp_path / "folder.tar/x.mp4").start is None
    assert read(f"{shard}//b/./c.mp4") == b"c"
    assert read(shard / "b.json") == b"j"


def test_video_exists_finds_files_and_members(tmp_path):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"1"), ("b.mp4", b"2")])
    (tmp_path / "text.tar").write_text("not a tar file")
    assert video_exists(shard) and video_exists(shard / "a.mp4")
    assert video_exists(shard / "b.mp4")  # unusable, as a damaged file is
    absent = ("c.mp4", "s.tar/c.mp4", "s.tar/a.mp4/x", "t.tar/a.mp4", "text.tar/a.mp4", "x\0")
    for name in ("", *absent):
        assert not video_exists(tmp_path / name), name


# --- bad shards -----------------------------------------------------------------------------------


def lines_of(folder, log):
    """Return the files found below a folder, and the logged lines."""
    log.clear()
    shards.warn_once.cache_clear()  # as in another process
    return sorted(walk_files(folder, EXTENSIONS)), [r.getMessage() for r in log.records]


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_bad_members_cost_only_themselves(tmp_path, milnce_log):
    fifo = tarfile.TarInfo("fifo.mp4")
    fifo.type = tarfile.FIFOTYPE
    outside = ["../up.mp4", "/etc/abs.mp4", "x/../y.mp4"]
    members = [
        ("good.mp4", b"good"),
        ("twice.mp4", b"1"),
        link("soft.mp4", "/etc/passwd"),
        link("hard.mp4", "good.mp4", tarfile.LNKTYPE),
        (fifo, b""),
        *((name, b"evil") for name in outside),
        ("./twice.mp4", b"2"),
        ("last.mp4", b"last"),
    ]
    shard = pack(tmp_path / "s.tar", members)
    found, lines = lines_of(tmp_path, milnce_log)
    assert found == ["s.tar/good.mp4", "s.tar/last.mp4"]
    expected = {
        "twice.mp4": "more than once",
        "soft.mp4": "is a link",
        "hard.mp4": "is a link",
        "fifo.mp4": "special file",
        **dict.fromkeys(outside, "leads out"),
    }
    assert len(lines) == len(expected)
    for name, reason in expected.items():
        [line] = [line for line in lines if f"{shard}/{name}: " in line]
        assert reason in line and "\n" not in line
        if not name.startswith("/"):
            assert reason in failure(f"{shard}/{name}", "pyav")
    assert read(shard / "good.mp4") == b"good" and read(shard / "last.mp4") == b"last"
    assert "is not in the shard" in failure(shard / "absent.mp4", "pyav")
    assert "is not in the shard" in failure(f"{shard}//etc/abs.mp4", "pyav")


def test_a_sparse_member_is_refused(tmp_path, milnce_log):
    with open(tmp_path / "holes.mp4", "wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    for form in ("gnu", "posix"):
        command = ["tar", "-C", tmp_path, f"--format={form}", "-S", "-cf", tmp_path / f"{form}.tar"]
        subprocess.run([*command, "holes.mp4"], check=True)
    (tmp_path / "holes.mp4").unlink()
    found, lines = lines_of(tmp_path, milnce_log)
    assert not found and len(lines) == 2 and all("sparse" in line for line in lines)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_truncated_shard_keeps_the_members_before_the_cut(form, tmp_path, milnce_log):
    members = [(f"{number}.mp4", bytes([number]) * 3000) for number in range(3)]
    whole = pack(tmp_path / "whole.tar", members, format=form).read_bytes()
    (tmp_path / "whole.tar").unlink()
    third = locate_in(tmp_path, whole, "2.mp4")
    cuts = {
        third.start + 100: (3, "2.mp4: is cut short"),
        third.start - 100: (2, "is cut short or damaged at byte"),  # in the header
        third.start - tarfile.BLOCKSIZE: (2, "is cut short or damaged at byte"),  # before it
        third.start + 3072: (3, "is cut short or damaged at byte"),  # only the end mark is missing
    }
    for length, (count, reason) in cuts.items():
        (tmp_path / "s.tar").write_bytes(whole[:length])
        found, lines = lines_of(tmp_path, milnce_log)
        usable = count - ("2.mp4" in reason)
        assert found == [f"s.tar/{number}.mp4" for number in range(usable)], length
        assert any(reason in line for line in lines), lines
        assert "is cut short or damaged at byte" in lines[0] and len(lines) <= 2


def locate_in(folder, content, name):
    (folder / "s.tar").write_bytes(content)
    return locate(folder / "s.tar" / name)


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path, milnce_log):
    members = [(f"{number}.mp4", b"x" * 600) for number in range(3)]
    shard = pack(tmp_path / "s.tar", members)
    header = locate(shard / "1.mp4").start - tarfile.BLOCKSIZE
    content = bytearray(shard.read_bytes())
    content[header : header + 100] = b"\xff" * 100
    shard.write_bytes(content)
    found, lines = lines_of(tmp_path, milnce_log)
    assert found == ["s.tar/0.mp4"] and f"damaged at byte {header};" in lines[0]


def test_a_second_tar_file_after_the_first_is_logged_once(tmp_path, milnce_log):
    first, second = (pack(tmp_path / f"{n}.x", [(f"{n}.mp4", b"x")]).read_bytes() for n in "ab")
    (tmp_path / "s.tar").write_bytes(first + second)
    found, lines = lines_of(tmp_path, milnce_log)
    assert found == ["s.tar/a.mp4"] and "damaged at byte 1024;" in lines[0]
    assert list(walk_files(tmp_path, EXTENSIONS)) == found and len(milnce_log.records) == 1


def test_each_file_that_is_not_a_shard_is_logged_in_one_line(tmp_path, milnce_log):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("not a tar file\n" * 100)
    with tarfile.open(tmp_path / "zipped.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    for name in ("a.tar.gz", "b.tgz", "c.tar.zst", "d.gz"):  # the last is not a tar file
        (tmp_path / name).write_bytes(b"x")
    pack(tmp_path / "good.tar", [("a.mp4", b"a")])
    found, lines = lines_of(tmp_path, milnce_log)
    assert found == ["good.tar/a.mp4"] and len(lines) == 6
    for name in ("zipped.tar", "a.tar.gz", "b.tgz", "c.tar.zst"):
        [line] = [line for line in lines if str(tmp_path / name) in line]
        assert "compressed" in line
    for name in ("empty.tar", "text.tar"):
        [line] = [line for line in lines if str(tmp_path / name) in line]
        assert "is not a tar file" in line
        assert "is not a tar file" in failure(tmp_path / name / "a.mp4", "pyav")


def header(name, size, kind):
    """Return a header whose size may be negative or larger than the file."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, -1024, -4096, 1 << 40, 1 << 62])
def test_hostile_sizes_do_not_cause_endless_reads(kind, size, tmp_path):
    good = header("good.mp4", 0, tarfile.REGTYPE)
    (tmp_path / "s.tar").write_bytes(good + header("bad.mp4", size, kind) + good * 3)
    list(walk_files(tmp_path, EXTENSIONS))
    assert video_exists(tmp_path / "s.tar/good.mp4")
    with pytest.raises((OSError, ValueError)):
        locate(tmp_path / "s.tar/bad.mp4")


# --- indexes --------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Return a list that gets the name of each shard whose headers are read."""
    names, make_index = [], shards.make_index

    def count(shard, *status):
        names.append(os.path.basename(shard))
        return make_index(shard, *status)

    monkeypatch.setattr(shards, "make_index", count)
    return names


def test_the_headers_are_read_once(tmp_path, made):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"b")])
    for _ in range(2):
        assert read(shard / "a.mp4") == b"a" and read(shard / "b.mp4") == b"b"
        shards.open_index.cache_clear()  # as in another process
    assert made == ["s.tar"] and sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index"]


def test_the_index_of_an_older_shard_is_rebuilt(tmp_path, made):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"b")])
    before = shard.stat()
    assert read(shard / "b.mp4") == b"b"
    pack(shard, [("b.mp4", b"B"), ("c.mp4", b"c")])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert shard.stat().st_size == before.st_size
    assert read(shard / "b.mp4") == b"B" and not video_exists(shard / "a.mp4")
    shards.open_index.cache_clear()
    assert read(shard / "c.mp4") == b"c" and made == ["s.tar"] * 2


def test_a_damaged_index_is_rebuilt(tmp_path, made):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a"), ("b.mp4", b"b")])
    assert read(shard / "a.mp4") == b"a"
    index = tmp_path / "s.tar.index"
    whole = index.read_bytes()
    damaged = [b"", whole[:-1], whole[:30], b"x" * 100, whole[:70] + b"\1" + whole[71:]]
    for content in damaged:
        index.write_bytes(content)
        shards.open_index.cache_clear()
        assert read(shard / "b.mp4") == b"b" and index.read_bytes() == whole
    assert len(made) == 1 + len(damaged)


@pytest.mark.parametrize("place", [(4096, 9000), (1 << 62, 1 << 62), (0, -1), (-6, 0)])
def test_an_index_with_members_outside_its_shard_is_rebuilt(tmp_path, made, place):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a")])
    write_index(shard, {b"a.mp4": place})
    made.clear()
    assert read(shard / "a.mp4") == b"a" and made == ["s.tar"]


@pytest.mark.parametrize(("count", "ends"), [(-1, [5]), (1 << 40, [5]), (1, [6]), (1, [-1])])
def test_an_index_with_inconsistent_numbers_is_refused(count, ends):
    rest = np.array([0, 0, *ends], "<i8").tobytes() + b"a.mp4"
    header = shards.HEADER.pack(shards.MAGIC, zlib.crc32(rest), 10, 0, count, -1)
    with pytest.raises(ValueError, match=r"damaged|outside"):
        shards.ShardIndex(np.frombuffer(header + rest, np.uint8))


def test_names_in_an_index_that_lead_out_of_the_shard_are_not_listed(tmp_path, milnce_log):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a")])
    write_index(shard, {b"../b.mp4": (512, 1), b"a.mp4": (512, 1)})
    found, lines = lines_of(tmp_path, milnce_log)
    assert found == ["s.tar/a.mp4"] and len(lines) == 1 and "leads out" in lines[0]


def test_the_index_of_a_read_only_folder_is_in_the_cache_or_in_memory(tmp_path, monkeypatch, made):
    shard = pack(tmp_path / "s.tar", [("a.mp4", b"a")])
    (tmp_path / "s.tar.index").mkdir()  # nothing can be written there, even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert read(shard / "a.mp4") == b"a"
        shards.open_index.cache_clear()
    assert made == ["s.tar"] and len(list((tmp_path / "cache/milnce").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(shard))
    assert read(shard / "a.mp4") == b"a" and read(shard / "a.mp4") == b"a"
    assert made == ["s.tar"] * 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    """A worker that has read from 300 shards of 1,000 members needs at most 3 KB for each."""
    for number in range(300):
        shard = tmp_path / f"{number:05}.tar"
        with open(shard, "wb") as file:
            file.truncate(1000 * 1024)
        names = sorted(f"{number:05}{member:05}.mp4".encode() for member in range(1000))
        members = {name: (1024 * k + 512, 512) for k, name in enumerate(names)}
        write_index(shard, members)
    private_memory()
    before, files = private_memory(), len(os.listdir("/proc/self/fd"))
    for number in range(300):
        assert (
            locate(tmp_path / f"{number:05}.tar" / f"{number:05}00777.mp4").start
            == 777 * 1024 + 512
        )
    assert len(os.listdir("/proc/self/fd")) == files
    assert private_memory() - before < 300 * 3 << 10


def write_index(shard, members):
    """Write a shard's index with the given members, without reading the shard's headers."""
    status = shard.stat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "read_headers", lambda *_: (members, -1))
        content = shards.make_index(str(shard), status.st_size, status.st_mtime_ns)
    with atomic_write(f"{shard}.index") as file:  # synced, as dirty pages are private memory
        file.write(content)
