"""Golden frames, the same pixels from both backends on every kind of file, and timestamps."""

import gc
import random
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch

import video_decoder
from tests.helpers import frames_digest, golden_json
from tests.video_decoder.samples import BASE, FILES, SMALL, VIDEOS, run_ffmpeg
from video_decoder import (
    BACKENDS,
    ClipSpec,
    DecodeError,
    decode_clip,
    decode_clips,
    decode_frames,
    decode_windows,
    preprocess,
    pyav,
    timing,
)

needs_shared = pytest.mark.skipif(not VIDEOS.is_dir(), reason="the shared clips are missing")


# --- golden frames ----------------------------------------------------------------------------


def golden_rows():
    rows = golden_json("frames") if VIDEOS.is_dir() else []
    return [
        pytest.param(row, id=f"{number}-{row['kind']}-{row['video']}")
        for number, row in enumerate(rows)
    ]


def decode_row(row, backend, folder=VIDEOS):
    """Decode the clips of a golden row, from the video in `folder`."""
    path, count, size = folder / row["video"], row["num_frames"], row["size"]
    if row["kind"] == "hmdb":
        video = decode_frames(path, size=size, backend=backend)
        missing = max(0, count - video.shape[1])
        video = torch.nn.functional.pad(video, (0, 0, 0, 0, 0, missing))
        starts = np.linspace(0, video.shape[1] - count, row["num_clip"], dtype=int)
        return [video[:, start : start + count] for start in starts]
    settings = {"fps": row["fps"], "num_frames": count, "size": size, "backend": backend}
    if row["kind"] == "train":
        return [decode_clip(path, row["start"], crop_only=row["crop_only"], **settings)]
    last = max(row["start"], row["end"] - count / row["fps"] - 0.4)
    starts = np.linspace(row["start"], last, row["num_clip"])
    return list(decode_clips(path, starts, **settings))


@needs_shared
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", golden_rows())
def test_golden_frames(row, backend):
    expected = row["sha256"] if isinstance(row["sha256"], list) else [row["sha256"]]
    assert [frames_digest(clip) for clip in decode_row(row, backend)] == expected


# --- files of every kind ----------------------------------------------------------------------


def random_case(rng):
    """Draw a function of video_decoder, its arguments after the path, and its settings."""
    settings = {
        "size": rng.choice([16, 40, 56, 64, 77, 112]),
        "crop_only": rng.random() < 0.5,
        "crop": (round(rng.random(), 3), round(rng.random(), 3)),
    }
    if rng.random() < 0.15:
        return decode_frames, (), settings
    settings |= {
        "fps": rng.choice([1, 5, 7, 10, 12.5, 24, 25, 30, Fraction(30000, 1001)]),
        "num_frames": rng.choice([1, 4, 16, 32]),
        "flip": rng.random() < 0.5,
    }
    if rng.random() < 0.3:
        starts = [round(rng.uniform(0, 6), 3) for _ in range(rng.randint(2, 5))]
        return decode_clips, (starts,), settings
    start = rng.choice([0, rng.randint(0, 5), rng.randint(0, 150) / 30, rng.uniform(0, 6)])
    return decode_clip, (round(start, 3),), settings


def check_same(path, seed, cases):
    for number in range(cases):
        function, arguments, settings = random_case(random.Random(f"{path.name}/{seed}/{number}"))
        ours = function(path, *arguments, **settings, backend="pyav")
        theirs = function(path, *arguments, **settings, backend="ffmpeg")
        what = f"{function.__name__}({path.name}, {arguments}, {settings})"
        assert ours.shape == theirs.shape, what
        assert torch.equal(ours, theirs), what


@pytest.mark.parametrize("name", FILES)
def test_backends_give_the_same_bits(video, name):
    """Compare five random cases per file, over 300 in all."""
    assert len(FILES) * 5 >= 300 or not VIDEOS.is_dir()
    check_same(video(name), "quick", 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_backends_give_the_same_bits_in_many_more_cases(video, name):
    check_same(video(name), "slow", 20)


def packets_of(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def test_the_sample_files_have_the_features_in_their_names(video):
    """Otherwise the tests above would prove less than they claim."""
    assert any(packet.is_discard for packet in packets_of(video("edit_list.mp4")))
    assert any(packet.size < 10 for packet in packets_of(video("packed_b.avi")))
    assert len({packet.duration for packet in packets_of(video("variable_rate.mp4"))}) > 2
    assert min(packet.pts for packet in packets_of(video("late_start.mkv"))) == 3700
    assert min(packet.pts for packet in packets_of(video("cut.ts"))) > 90000
    with av.open(str(video("two_videos.mp4"))) as container:
        assert [stream.width for stream in container.streams.video] == [48, 128]
    for name, test in {
        "interlaced.mp4": lambda frame: frame.interlaced_frame,
        "ten_bit.mp4": lambda frame: frame.format.name == "yuv420p10le",
        "odd_size.mp4": lambda frame: frame.format.name == "yuv444p" and frame.width == 131,
        "odd_size.webm": lambda frame: (frame.width, frame.height) == (131, 97),
        "full_range.mp4": lambda frame: frame.format.name == "yuvj420p",
        "gray.mkv": lambda frame: frame.format.name == "gray",
        "turned_90.mp4": lambda frame: abs(frame.rotation) == 90,
    }.items():
        with av.open(str(video(name))) as container:
            assert test(next(container.decode(video=0))), name
    for name in ("h264_opengop.mp4", "h264_opengop.mkv"):
        with av.open(str(video(name))) as container:
            stream = container.streams.video[0]
            keyframes = [p for p in container.demux(stream) if p.size and p.is_keyframe]
            assert not all(pyav.is_idr(packet, stream.codec_context) for packet in keyframes)


# --- the path that each file takes ------------------------------------------------------------

FAST = [
    "h264_bpyramid.mp4",
    "h264_opengop.mkv",
    "h264_no_b.mp4",
    "h264_intra.mp4",
    "h265.mp4",
    "edit_list.mp4",
    "late_start.mkv",
    "variable_rate.mp4",
    "turned_90.mp4",
    "ten_bit.mp4",
]
SLOW = ["packed_b.avi", "mpeg2.ts", "h264.ts", "vp9.webm", "av1.mkv", "interlaced.mp4"]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_the_fast_path_is_taken_by_rule(video, name, slow_paths):
    decode_clip(video(name), 2.5, fps=5, num_frames=8, size=32)
    assert len(slow_paths) == (name in SLOW)


def test_the_fast_path_decodes_fewer_frames(video, monkeypatch):
    """With B-frames, it skips those that no window displays and no frame refers to."""
    counts, decode_displayed = [], pyav.decode_displayed

    def count(packets, displayed, *others):
        frames = list(decode_displayed(packets, displayed, *others))
        counts.append((len(packets), len(frames), len(displayed)))
        return iter(frames)

    monkeypatch.setattr(pyav, "decode_displayed", count)
    decode_clips(video(BASE), [0.5, 0.7, 0.9], fps=5, num_frames=8, size=32)
    [(packets, frames, displayed)] = counts  # one pass for three windows
    assert frames == displayed < packets


# --- windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["h264_opengop.mkv", "packed_b.avi", "h264.flv", "vp9.webm"])
def test_windows_equal_the_clips_decoded_one_by_one(video, name, backend):
    settings = {"fps": 10, "num_frames": 12, "size": 40, "backend": backend}
    starts = [3.1, 0, 0.25, 0.3, 7, 3.1]
    windows = decode_clips(video(name), starts, **settings)
    assert windows.shape == (6, 3, 12, 40, 40)
    for start, clip in zip(starts, windows, strict=True):
        assert torch.equal(clip, decode_clip(video(name), start, **settings))


def test_a_preprocessed_clip_is_the_models_input(video):
    clip = ClipSpec(num_frames=4, size=32)
    bytes_ = decode_clip(video(BASE), 1.5, fps=5, num_frames=4, size=32)
    assert torch.equal(preprocess(video(BASE), 1.5, clip), bytes_.float() / 255)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_frames_are_black_at_the_end(video, backend):
    settings = {"fps": 5, "num_frames": 8, "size": 32, "backend": backend}
    clip = decode_clip(video(BASE), 4.2, **settings)
    assert clip[:, :4].amax(dim=(0, 2, 3)).min() > 0 and not clip[:, 4:].any()
    assert not decode_clip(video(BASE), 60, **settings).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_windows_give_an_empty_tensor(video, backend):
    settings = {"fps": 5, "num_frames": 8, "size": 32, "backend": backend}
    assert decode_clips(video(BASE), [], **settings).shape == (0, 3, 8, 32, 32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flip_mirrors_the_cropped_picture(video, backend):
    settings = {"fps": 5, "num_frames": 2, "size": 96, "crop_only": True, "backend": backend}
    clip = decode_clip(video("odd_size.mp4"), 1, crop=(0, 0.5), **settings)
    mirrored = decode_clip(video("odd_size.mp4"), 1, crop=(0, 0.5), flip=True, **settings)
    assert torch.equal(mirrored, clip.flip(-1)) and not torch.equal(mirrored, clip)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rotated_picture_is_turned_upright(video, backend):
    """The picture is turned before the crop: after 180 degrees, (1, 1) is the corner (0, 0)."""
    settings = {"size": 40, "crop_only": True, "crop": (0, 0), "backend": backend}
    plain = decode_frames(video(BASE), **settings)
    turned = decode_frames(video("turned_180.mp4"), **settings | {"crop": (1, 1)})
    assert torch.equal(turned, plain.rot90(2, (2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_smaller_than_the_crop_are_enlarged(video, backend):
    settings = {"fps": 5, "num_frames": 2, "size": 80, "backend": backend}
    clip = decode_clip(video(SMALL), 1, crop_only=True, **settings)
    scaled = decode_clip(video(SMALL), 1, **settings)
    assert clip.shape == (3, 2, 80, 80)
    assert (clip.int() - scaled.int()).abs().float().mean() < 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_two_video_streams_is_decoded(video, backend):
    first = decode_frames(video(SMALL), size=32, backend=backend)
    assert torch.equal(decode_frames(video("two_videos.mp4"), size=32, backend=backend), first)


# --- the arithmetic of timestamps -------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"), [(5, 3), (-5, -3), (4, 2), (3, 2), (-3, -2), (0, 0), (1, 1), (-1, -1)]
)
def test_rescale_rounds_halves_away_from_zero(value, expected):
    assert timing.rescale(value, Fraction(1, 2)) == expected


def filter_frames(ticks, num_frames):
    """Return which of the frames a, b, c, ... each output frame displays, as a string."""
    fps_filter, output = timing.FpsFilter(num_frames), ["."] * num_frames
    names = [*"abcdefghijklmnop"[: len(ticks) - 1], None]
    for tick, name in zip(ticks, names, strict=True):
        span = fps_filter.push(tick, name)
        if span:
            output[span.first : span.end] = span.frame * (span.end - span.first)
    return "".join(output)


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ([0, 1, 2, 3, 4], "abcd."),  # the last tick is where the last frame ends
        ([0, 0, 1, 1, 1, 2, 3], "bef.."),  # of frames with the same tick, the last is displayed
        ([0, 3, 5], "aaabb"),  # a gap is filled with the frame before it
        ([2, 3, 5], "aaabb"),  # and before the first frame, with the first
        ([2, 2, 3, 5], "bbbcc"),
        ([9, 10], "aaaaa"),
        ([9, 9, 9], "....."),  # the last frame ends where it begins: never displayed
        ([0, 9], "aaaaa"),
        ([0, 2, 1, 3], "aac.."),  # a clock that steps back: the later frame wins
        ([0, None], "....."),
        ([None], "....."),
        ([4_000_000, 4_000_001], "....."),  # too many repeats for FFmpeg
    ],
)
def test_fps_filter(ticks, expected):
    assert filter_frames(ticks, 5) == expected


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 1, 2, 3], "abcd"),
        ([0, 1.2, 1.9, 3.1], "abcd"),  # jitter below half a frame does not matter
        ([0, 3, 4], "aabbc"),  # a gap is shared between its neighbours
        ([2, 3, 4], "aaabc"),
        ([0, 1, 0.5, 2, 3], "abcde"),  # late frames are kept up to 1.1 frames ...
        ([0, 1, 2, -1.5, 3, 4], "abcef"),  # ... and then dropped
    ],
)
def test_sync_to_constant_rate(times, expected):
    frames = [(time, 1.0, name) for time, name in zip(times, "abcdefgh", strict=False)]
    output = "".join(name * count for name, count in timing.sync_to_constant_rate(frames))
    assert output == expected


# --- invalid arguments and files --------------------------------------------------------------


def test_unknown_backend_names_the_choices(video):
    with pytest.raises(ValueError, match="pyav, ffmpeg"):
        decode_clip(video(BASE), 0, fps=5, num_frames=1, size=8, backend="opencv")
    with pytest.raises(ValueError, match="pyav, ffmpeg"):
        decode_frames(video(BASE), size=8, backend="opencv")


@pytest.mark.parametrize(
    "wrong",
    [
        {"start": -1},
        {"start": float("nan")},
        {"fps": 0},
        {"num_frames": 0},
        {"size": 0},
        {"crop": (0, 1.5)},
    ],
)
def test_arguments_out_of_range_are_refused(video, wrong):
    settings = {"start": 0, "fps": 5, "num_frames": 1, "size": 8} | wrong
    with pytest.raises(ValueError):
        decode_clip(video(BASE), settings.pop("start"), **settings)


def rejection(path, backend):
    """Return the message of the DecodeError that both functions must raise."""
    with pytest.raises(DecodeError) as first:
        decode_clip(path, 0, fps=5, num_frames=2, size=16, backend=backend)
    with pytest.raises(DecodeError) as second:
        decode_frames(path, size=16, backend=backend)
    assert str(first.value) == str(second.value)
    assert str(path) in str(first.value) and "\n" not in str(first.value)
    return str(first.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_that_are_not_videos_are_refused(tmp_path, backend):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("This is not a video.\n" * 100)
    run_ffmpeg("-f", "lavfi", "-i", "color=s=64x64", "-frames:v", "1", str(tmp_path / "a.png"))
    (tmp_path / "a.png").rename(tmp_path / "still.mp4")
    run_ffmpeg("-f", "lavfi", "-i", "sine=duration=1", str(tmp_path / "sound.mp4"))
    for name in ("empty.mp4", "text.mp4"):
        assert "Invalid data" in rejection(tmp_path / name, backend)
    assert "not in a supported video format" in rejection(tmp_path / "still.mp4", backend)
    assert "no video stream" in rejection(tmp_path / "sound.mp4", backend)
    assert "No such file" in rejection(tmp_path / "absent.mp4", backend)
    assert "not a regular file" in rejection(tmp_path, backend)
    assert "not a regular file" in rejection("/dev/zero", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_points_to_others_is_refused(video, tmp_path, backend):
    """A playlist could open any URL or file that it names; its demuxer must not be allowed."""
    target = video(BASE)
    playlists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{target}\n#EXT-X-ENDLIST\n",
        "list.mp4": f"ffconcat version 1.0\nfile {target}\n",
        "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        assert "not in a supported video format" in rejection(tmp_path / name, backend)
    for name in (f"concat:{target}", f"file:{target}", f"subfile,,start,0,end,0,,:{target}"):
        assert "No such file" in rejection(name, backend)
    assert "No such file" in rejection("http://127.0.0.1:9/video.mp4", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["-i.mp4", "a:b.mp4", "%03d.mp4", "é ' \\ [0];,.mp4", "http:.mp4"])
def test_odd_file_names_are_only_names(video, tmp_path, monkeypatch, name, backend):
    (tmp_path / name).write_bytes(video(BASE).read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = {"fps": 5, "num_frames": 4, "size": 32, "backend": backend}
    assert torch.equal(decode_clip(name, 1, **settings), decode_clip(video(BASE), 1, **settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [BASE, "mpeg2.ts"])  # fast path, slow path
def test_windows_repeat_the_last_frame_and_count_the_real_ones(video, name, backend):
    starts = [1, 4.4, 100]  # of a video of 5 s
    black = decode_clips(video(name), starts, fps=5, num_frames=8, size=32, backend=backend)
    clips, counts = decode_windows(video(name), starts, ClipSpec(8, 32, 5, backend))
    assert counts[0] == 8 and 0 < counts[1] < 8 and counts[2] == 0
    for window, original, count in zip(clips, black, counts, strict=True):
        assert torch.equal(window[:, :count], original[:, :count])
        assert not original[:, count:].any()
        if 0 < count < 8:
            assert (window[:, count:] == window[:, count - 1 : count]).all()
    assert not clips[2].any()


@pytest.mark.parametrize("name", [BASE, "packed_b.avi", "vp9.webm", "mpeg2.ts"])
def test_probe_duration(video, name):
    assert video_decoder.probe_duration(video(name)) == pytest.approx(5, abs=0.15)


def test_probe_duration_refuses_a_file_that_is_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("This is not a video.")
    with pytest.raises(DecodeError, match=r"text\.mp4"):
        video_decoder.probe_duration(tmp_path / "text.mp4")


def test_the_program_in_path_comes_first(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert video_decoder.ffmpeg_program() == str(program)
    program.unlink()
    assert video_decoder.ffmpeg_program() == imageio_ffmpeg.get_ffmpeg_exe()


def test_frames_are_freed_without_a_garbage_collection(video):
    """Otherwise a worker holds hundreds of pictures until the garbage collector runs."""
    path = video(BASE)
    gc.collect()
    gc.disable()
    try:
        decode_clip(path, 1, fps=5, num_frames=4, size=32)
        decode_frames(path, size=32)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, av.VideoFrame)]
    finally:
        gc.enable()
