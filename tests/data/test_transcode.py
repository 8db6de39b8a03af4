"""data/howto100m/transcode.py: the training store has the same videos, cheaper to decode."""

import shutil
import subprocess
import sys
import tarfile

import av
import imageio_ffmpeg
import pytest
import torch

import video_decoder
from tests.helpers import ROOT
from utils import InputError
from video_decoder.pyav import is_idr

SCRIPT = ROOT / "data" / "howto100m" / "transcode.py"
sys.path.insert(0, str(SCRIPT.parent))
import transcode  # noqa: E402

CLIP = {"fps": 5, "num_frames": 8, "size": 96}


def encode(path, *options, size="400x320", rate="30", seconds=5):
    """Encode a test pattern in which all frames differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = f"testsrc2=size={size}:rate={rate}:duration={seconds}"
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y"]
    options = ["-f", "lavfi", "-i", pattern, *options, "-g", "250", "-pix_fmt", "yuv420p"]
    subprocess.run([*program, *options, str(path)], check=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Make a small tree of videos, and the store of it."""
    root = tmp_path_factory.mktemp("transcode")
    encode(root / "source" / "a.mp4", "-c:v", "libx264")
    encode(root / "source" / "deep" / "er" / "b.webm", "-c:v", "libvpx", "-cpu-used", "8")
    encode(root / "source" / "c.avi", "-c:v", "mpeg4", size="131x90", rate="24000/1001")
    (root / "source" / "notes.txt").write_text("not a video")
    transcode.main(arguments(root / "source", root / "store"))
    return root


def arguments(source, out, *more):
    return ["--video_path", str(source), "--out", str(out), "--num_workers", "2", *more]


def files(folder):
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if path.name != transcode.SETTINGS)


def psnr(first, second):
    return -10 * torch.log10((first.float() - second.float()).square().mean() / 255**2)


def test_names_and_folders_stay_the_same(tree):
    assert files(tree / "store") == ["a.mp4", "c.avi", "deep/er/b.webm"]


def test_the_store_has_the_documented_sizes_rate_and_keyframes(tree):
    for name, size in {
        "a.mp4": (320, 256),
        "deep/er/b.webm": (320, 256),
        "c.avi": (130, 90),
    }.items():
        with av.open(str(tree / "store" / name)) as container:
            [stream] = container.streams
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 10)
            assert (stream.codec_context.width, stream.codec_context.height) == size
            packets = [packet for packet in container.demux(stream) if packet.size]
            keyframes = [float(p.pts * stream.time_base) for p in packets if p.is_keyframe]
            assert keyframes == [0, 1, 2, 3, 4]
            for packet in packets:
                if packet.is_keyframe:
                    assert is_idr(packet, stream.codec_context)


@pytest.mark.parametrize("multiple", [1, 2, 3, 4])
def test_clips_from_whole_seconds_show_the_same_frames(tree, tmp_path, multiple):
    """Each picture of the store is closer to that of the source than to its neighbours."""
    source, target = tree / "source" / "a.mp4", tmp_path / "a.mp4"
    transcode.transcode(
        source, target, fps=5, multiple=multiple, short_side=256, keyint=1, crf=12, preset="fast"
    )
    for start in (0, 2):
        expected = video_decoder.decode_clip(source, start, **CLIP)
        stored = video_decoder.decode_clip(target, start, **CLIP)
        assert psnr(stored, expected) > 30
        for shift in (-0.04, 0.04):
            if start + shift >= 0:
                moved = video_decoder.decode_clip(source, start + shift, **CLIP)
                assert psnr(stored, expected) > psnr(stored, moved) + 1


@pytest.mark.parametrize("size", ["480x360", "482x360", "852x480", "360x480"])
def test_the_centre_square_of_a_scaled_video_stays_where_it_was(size, tmp_path):
    """Shifted by one pixel in any direction, the match would be worse."""
    source, target = tmp_path / "source.mp4", tmp_path / "store.mp4"
    encode(source, "-c:v", "libx264", "-vf", "gblur=2", size=size, seconds=2)
    transcode.transcode(
        source, target, fps=5, multiple=2, short_side=128, keyint=1, crf=8, preset="fast"
    )
    clip = {"fps": 5, "num_frames": 4, "size": 128}
    stored = video_decoder.decode_clip(target, 0, **clip)[..., 8:-8, 8:-8]
    expected = video_decoder.decode_clip(source, 0, **clip)
    matches = {
        (down, across): psnr(stored, expected.roll((down, across), (2, 3))[..., 8:-8, 8:-8]).item()
        for down in (-1, 0, 1)
        for across in (-1, 0, 1)
    }
    in_place = matches.pop((0, 0))  # half a pixel off, a neighbour would be as close
    assert in_place > max(matches.values()) + 3, (in_place, matches)


def test_a_video_that_starts_after_its_sound_keeps_its_timestamps(tmp_path):
    """The times of captions count from the start of the container."""
    source, target = tmp_path / "late.mp4", tmp_path / "store.mp4"
    plain = tmp_path / "plain.mp4"
    encode(plain, "-c:v", "libx264")
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y"]
    sound = ["-f", "lavfi", "-i", "sine=duration=6", "-c:v", "copy", "-c:a", "aac"]
    delayed = ["-itsoffset", "0.8", "-i", str(plain)]
    subprocess.run([*program, *delayed, *sound, str(source)], check=True)
    transcode.transcode(
        source, target, fps=5, multiple=2, short_side=256, keyint=1, crf=12, preset="fast"
    )
    stored = video_decoder.decode_clip(target, 2, **CLIP)
    assert psnr(stored, video_decoder.decode_clip(source, 2, **CLIP)) > 30


def test_a_second_run_makes_only_the_missing_videos(tree, capsys):
    kept, lost = tree / "store" / "a.mp4", tree / "store" / "c.avi"
    before = kept.stat()
    lost.unlink()
    transcode.main(arguments(tree / "source", tree / "store"))
    assert lost.is_file() and kept.stat() == before
    assert "3 of 3 videos" in capsys.readouterr().out


def test_failures_are_listed_and_leave_nothing_behind(tree, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "broken.mp4").write_bytes(b"no video at all")
    (source / "short.mp4").write_bytes((tree / "source" / "a.mp4").read_bytes()[:2000])
    (source / "whole.mp4").write_bytes((tree / "source" / "a.mp4").read_bytes())
    with pytest.raises(SystemExit) as stopped:
        transcode.main(arguments(source, tmp_path / "store"))
    assert stopped.value.code == 1
    output = capsys.readouterr()
    assert "1 of 3 videos" in output.out
    assert "failed: broken.mp4: " in output.err and "failed: short.mp4: " in output.err
    assert files(tmp_path / "store") == ["whole.mp4"]


def test_a_partial_file_left_by_a_crash_is_not_taken_for_a_video(tree, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.mp4").write_bytes((tree / "source" / "a.mp4").read_bytes())
    partial = tmp_path / "store" / ("a.mp4.0" + transcode.PARTIAL)
    partial.parent.mkdir()
    partial.write_bytes(b"half a file")
    transcode.main(arguments(source, tmp_path / "store"))
    assert files(tmp_path / "store") == ["a.mp4", partial.name]
    assert video_decoder.decode_clip(tmp_path / "store" / "a.mp4", 0, **CLIP).any()


def test_two_runs_at_once_leave_a_complete_store(tree, tmp_path):
    command = [sys.executable, str(SCRIPT), *arguments(tree / "source", tmp_path / "store")]
    runs = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert files(tmp_path / "store") == files(tree / "store")
    for name in files(tmp_path / "store"):
        expected = video_decoder.decode_clip(tree / "store" / name, 1, **CLIP)
        assert torch.equal(
            video_decoder.decode_clip(tmp_path / "store" / name, 1, **CLIP), expected
        )


def test_a_store_is_not_continued_with_other_settings(tree):
    with pytest.raises(InputError, match="--fps 5"):
        transcode.main(arguments(tree / "source", tree / "store", "--fps", "10"))


# --- shards -------------------------------------------------------------------------------------

SHARDS = ["--shards", "0.2"]  # MB: the first two of the three videos are 0.14 and 0.07


@pytest.fixture(scope="module")
def sharded(tree, tmp_path_factory):
    """Make the store of the same tree, in shards."""
    folder = tmp_path_factory.mktemp("sharded") / "store"
    transcode.main(arguments(tree / "source", folder, *SHARDS))
    return folder


def test_shards_contain_the_videos_of_the_store(tree, sharded):
    """The names and their order are kept, each shard has an index, and no other file is left."""
    assert files(sharded) == [f"0000{n}.tar{end}" for n in (0, 1) for end in ("", ".index")] + [
        "transcode.lock"
    ]
    names = sorted(video_decoder.walk_files(sharded, video_decoder.EXTENSIONS))
    assert [name.split("/", 1)[1] for name in names] == files(tree / "store")
    for name in names:
        source = video_decoder.locate(sharded / name)
        with video_decoder.MemberFile(source) as member:
            assert member.read() == (tree / "store" / name.split("/", 1)[1]).read_bytes()


def stop_after(monkeypatch, count):
    """Make the run crash after `count` transcoded videos."""
    original, done = transcode.transcode, []

    def stopping(source, target, **settings):
        if len(done) == count:
            raise RuntimeError("a crash")
        original(source, target, **settings)
        done.append(source)

    monkeypatch.setattr(transcode, "transcode", stopping)


@pytest.mark.parametrize("count", [1, 2])
def test_a_resumed_run_ends_with_the_same_shards(count, tree, sharded, tmp_path, monkeypatch):
    command = arguments(tree / "source", tmp_path / "store", "--num_workers", "1", *SHARDS)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a crash"):
        stop_after(patch, count)
        transcode.main(command)
    left = ["unpacked/a.mp4.part"] if count == 1 else ["00000.tar", "00000.tar.index"]
    assert files(tmp_path / "store") == sorted([*left, "transcode.lock"])
    with monkeypatch.context() as patch:
        stop_after(patch, 3 - count)  # finished videos are not transcoded again
        transcode.main(command)
    for number in (0, 1):
        shard = f"0000{number}.tar"
        assert (tmp_path / "store" / shard).read_bytes() == (sharded / shard).read_bytes()
    assert files(tmp_path / "store") == files(sharded)


def test_new_videos_go_into_new_shards_and_failures_into_none(tree, sharded, tmp_path, capsys):
    source, store = tmp_path / "source", tmp_path / "store"
    shutil.copytree(tree / "source", source)
    shutil.copytree(sharded, store)
    shutil.copy(source / "a.mp4", source / "0.mp4")
    (source / "broken.mp4").write_bytes(b"no video at all")
    before = [(store / f"0000{number}.tar").stat() for number in (0, 1)]
    with pytest.raises(SystemExit) as stopped:
        transcode.main(arguments(source, store, *SHARDS))
    output = capsys.readouterr()
    assert stopped.value.code == 1 and "4 of 5 videos" in output.out
    assert "failed: broken.mp4: " in output.err
    assert [(store / f"0000{number}.tar").stat() for number in (0, 1)] == before
    assert list(video_decoder.walk_files(store / "00002.tar", {".mp4"})) == ["0.mp4"]


def test_videos_in_shards_are_transcoded_like_files(tree, tmp_path):
    with tarfile.open(tmp_path / "s, 1.tar", "w") as tar:
        tar.add(tree / "source" / "c.avi", "in/c.avi")
    transcode.main(arguments(tmp_path / "s, 1.tar", tmp_path / "store"))
    assert (tmp_path / "store/in/c.avi").read_bytes() == (tree / "store/c.avi").read_bytes()


def test_a_store_refuses_a_second_writer_and_other_settings_of_shards(tree, sharded):
    with transcode.lock_store(sharded), pytest.raises(InputError, match="another run"):
        transcode.main(arguments(tree / "source", sharded, *SHARDS))
    for others in ([], ["--shards"]):
        with pytest.raises(InputError, match=r"--shards 0\.2"):
            transcode.main(arguments(tree / "source", sharded, *others))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--video_path", "no/such/folder"], "no/such/folder"),
        (["--out", "{source}/inside"], "separate folders"),
        (["--fps", "0"], "--fps"),
        (["--multiple", "0"], "--multiple"),
        (["--crf", "99"], "--crf"),
        (["--shards", "0"], "--shards"),
        (["--keyint", "0"], "--keyint"),
        (["--keyint", "inf"], "--keyint"),
        (["--out", "{source}/../a.file/store"], "a.file"),
        (["--short_side", "4"], "--short_side"),
        (["--num_workers", "0"], "--num_workers"),
        (["--preset", "hasty"], "hasty"),
        (["--video_path", "{empty}"], "no video found"),
    ],
)
def test_an_invalid_call_is_refused_in_one_line_with_status_2(tree, tmp_path, wrong, message):
    (tmp_path / "empty").mkdir()
    (tree / "a.file").touch()
    wrong = [part.format(source=tree / "source", empty=tmp_path / "empty") for part in wrong]
    command = [sys.executable, str(SCRIPT), *arguments(tree / "source", tmp_path / "out"), *wrong]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
