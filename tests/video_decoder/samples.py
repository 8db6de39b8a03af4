"""The videos of these tests, and how the ffmpeg program of imageio-ffmpeg makes them."""

import subprocess

import imageio_ffmpeg

from tests.helpers import SHARED

VIDEOS = SHARED / "videos"  # real clips
X264 = "-c:v libx264 -preset medium -g 60"
X265 = "-c:v libx265 -preset fast -x265-params log-level=none:keyint=50"
DROPPED = (
    ",select='mod(n\\,7)*gt(mod(n\\,11)\\,2)*not(between(t\\,2\\,2.9))'"  # some frames missing
)
# name: (size, frames per second, options of the encoder)
ENCODED = {
    "h264_bpyramid.mp4": ("128x96", "30", f"{X264} -bf 3"),
    "h264_opengop.mp4": ("128x96", "25", f"{X264} -g 24 -x264-params open-gop=1"),
    "h264_opengop.mkv": ("128x96", "25", f"{X264} -g 24 -x264-params open-gop=1"),
    "h264_no_b.mp4": ("128x96", "25", f"{X264} -bf 0"),
    "h264_many_b.mp4": ("128x96", "25", "-c:v libx264 -preset veryslow -bf 8 -b_strategy 2"),
    "h264_intra.mp4": ("128x96", "25", f"{X264} -g 1"),
    "h264_refresh.mp4": ("128x96", "25", f"{X264} -x264-params intra-refresh=1"),
    "h264_fragments.mp4": ("128x96", "25", f"{X264} -movflags frag_keyframe+empty_moov"),
    "h264.ts": ("128x96", "25", X264),
    "h264.flv": ("128x96", "25", X264),
    "h265.mp4": ("128x96", "25", X265),
    "h265_opengop.mkv": ("128x96", "25", f"{X265}:open-gop=1"),
    "h265_layers.mp4": ("128x96", "25", f"{X265}:temporal-layers=1:b-adapt=0:bframes=7"),
    "packed_b.avi": ("128x96", "25", "-c:v libxvid -q:v 4 -g 40 -bf 2"),
    "mpeg4_b.avi": ("128x96", "25", "-c:v mpeg4 -q:v 4 -g 40 -bf 2"),
    "mpeg4_b.mp4": ("128x96", "25", "-c:v mpeg4 -q:v 4 -g 40 -bf 2"),
    "mpeg2.ts": ("128x96", "25", "-c:v mpeg2video -q:v 4 -g 15 -bf 2"),
    "mpeg2.mpg": ("128x96", "25", "-c:v mpeg2video -q:v 4 -g 15 -bf 2"),
    "vp8.webm": ("128x96", "25", "-c:v libvpx -deadline realtime -cpu-used 8 -g 60"),
    "vp9.webm": ("128x96", "25", "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 60"),
    "av1.mkv": ("128x96", "25", "-c:v libsvtav1 -preset 12 -g 50"),
    "av1.mp4": ("128x96", "25", "-c:v libsvtav1 -preset 12 -g 50"),
    "mjpeg.avi": ("128x96", "25", "-c:v mjpeg -q:v 5"),
    "wmv2.wmv": ("128x96", "25", "-c:v wmv2 -q:v 5 -g 50"),
    "variable_rate.mp4": ("128x96", "30", f"-vf null{DROPPED} -fps_mode vfr {X264}"),
    "variable_rate.mkv": ("128x96", "30", f"-vf null{DROPPED} -fps_mode vfr {X264}"),
    "rate_23.976.mp4": ("128x96", "24000/1001", X264),
    "rate_19.62.mp4": ("128x96", "981/50", X264),
    "rate_19.62.mkv": ("128x96", "981/50", X264),
    "rate_12.mp4": ("128x96", "12", X264),
    "rate_60.mkv": ("128x96", "60", X264),
    "odd_size.mp4": ("132x98", "25", f"-vf format=yuv444p,crop=131:97 {X264} -pix_fmt yuv444p"),
    "odd_size.avi": ("132x98", "25", "-vf crop=131:97:exact=1 -c:v mpeg4 -q:v 4"),
    "odd_size.webm": ("132x98", "25", "-vf crop=131:97:exact=1 -c:v libvpx -cpu-used 8"),
    "smaller_than_crop.mp4": ("48x40", "25", X264),
    "ten_bit.mp4": ("128x96", "25", f"{X264} -pix_fmt yuv420p10le"),
    "yuv_422.mkv": ("128x96", "25", f"{X264} -pix_fmt yuv422p"),
    "full_range.mp4": ("128x96", "25", f"{X264} -pix_fmt yuvj420p"),
    "bt709.mp4": ("128x96", "25", f"{X264} -colorspace bt709 -color_range tv"),
    "gray.mp4": ("128x96", "25", f"{X264} -pix_fmt gray"),
    "gray.mkv": ("128x96", "25", "-c:v ffv1 -g 20 -pix_fmt gray"),
    "rgb.mkv": ("128x96", "25", "-c:v libx264rgb -g 60 -pix_fmt rgb24"),
    "interlaced.mp4": ("128x96", "25", f"{X264} -flags +ildct+ilme"),
    "interlaced.ts": ("128x96", "25", "-c:v mpeg2video -q:v 4 -g 15 -bf 2 -flags +ildct+ilme"),
}
BASE, BASE_TS, SMALL = "h264_bpyramid.mp4", "h264.ts", "smaller_than_crop.mp4"
# name: (the file it is made from, what to do with it)
REMUXED = {
    "edit_list.mp4": (BASE, "-ss 1.3 -i {} -c copy"),
    "cut.mkv": (BASE, "-ss 1.3 -i {} -c copy"),
    "cut.ts": (BASE_TS, "-ss 1.3 -i {} -c copy"),
    "open_gop_cut.mkv": ("h264_opengop.mkv", "-ss 1.3 -t 2 -i {} -c copy"),
    "late_start.mp4": (BASE, "-i {} -c copy -output_ts_offset 3.7"),
    "late_start.mkv": (BASE, "-i {} -c copy -output_ts_offset 3.7"),
    "turned_90.mp4": (BASE, "-display_rotation 90 -i {} -c copy"),
    "turned_180.mp4": (BASE, "-display_rotation 180 -i {} -c copy"),
    "turned_270.mp4": (BASE, "-display_rotation 270 -i {} -c copy"),
    "turned_30.mp4": (BASE, "-display_rotation 30 -i {} -c copy"),
    "mirrored.mp4": (BASE, "-display_hflip -i {} -c copy"),
    "two_videos.mp4": (SMALL, "-i {} -i {other} -map 0 -map 1 -c copy"),
    "two_videos.mkv": (SMALL, "-i {} -i {other} -map 1 -map 0 -c copy -disposition:v:1 default"),
    "sound_first.mp4": (BASE, "-i {} -f lavfi -itsoffset -0.5 -i sine=duration=6 -c:v copy"),
    "sound_first.mkv": (BASE, "-i {} -f lavfi -itsoffset -0.5 -i sine=duration=6 -c:v copy"),
    "sound_first.ts": (BASE_TS, "-i {} -f lavfi -itsoffset -0.5 -i sine=duration=6 -c:v copy"),
    "video_late.mp4": (BASE, "-itsoffset 0.83 -i {} -f lavfi -i sine=duration=7 -c:v copy"),
    "video_late.mkv": (BASE, "-itsoffset 0.83 -i {} -f lavfi -i sine=duration=7 -c:v copy"),
    "video_late.ts": (BASE_TS, "-itsoffset 0.83 -i {} -f lavfi -i sine=duration=7 -c:v copy"),
}
REAL = sorted(path.name for path in VIDEOS.glob("*.m*") if path.suffix != ".md")
FILES = [*ENCODED, *REMUXED, *REAL]


def run_ffmpeg(*options):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", "-y", *options]
    subprocess.run(command, check=True, capture_output=True)


def make_video(name, folder):
    """Return the path of one of FILES, made in `folder` on first use."""
    if name in REAL:
        return VIDEOS / name
    path = folder / name
    if path.exists():
        return path
    if name in ENCODED:
        size, rate, options = ENCODED[name]
        pattern = f"testsrc2=size={size}:rate={rate}:duration=5,noise=alls=12:allf=t"
        options = options.split()
        if "-pix_fmt" not in options:
            options += ["-pix_fmt", "yuv420p"]
        run_ffmpeg("-f", "lavfi", "-i", pattern, *options, "-threads", "2", str(path))
    else:
        source, options = REMUXED[name]
        other = make_video("h264_no_b.mp4", folder)
        options = options.format(make_video(source, folder), other=other)
        run_ffmpeg(*options.split(), str(path))
    return path
