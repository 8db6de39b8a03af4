import io

import torch
from PIL import Image

from evaluation.thumbnails import encode_thumbnail


def frames_of(data):
    picture = Image.open(io.BytesIO(data))
    frames = []
    for number in range(picture.n_frames):
        picture.seek(number)
        frames.append(picture.convert("RGB").copy())
    return picture, frames


def test_a_thumbnail_is_an_animation_of_frames_spread_over_the_clip():
    clip = torch.zeros(3, 12, 64, 64, dtype=torch.uint8)
    clip[0] = torch.arange(0, 240, 20)[:, None, None]  # it gets redder and redder
    picture, frames = frames_of(encode_thumbnail(clip, size=32, frames=4, quality=90))
    assert picture.format == "WEBP" and picture.is_animated and picture.size == (32, 32)
    reds = [frame.getpixel((16, 16))[0] for frame in frames]
    assert all(abs(red - shown) < 12 for red, shown in zip(reds, (20, 80, 140, 200), strict=True))


def test_colours_and_places_are_kept():
    clip = torch.zeros(3, 2, 40, 40, dtype=torch.uint8)
    clip[2, :, :20, 20:] = 255  # blue, above on the right
    _, frames = frames_of(encode_thumbnail(clip, size=40, quality=90))
    red, _, blue = frames[0].getpixel((30, 10))
    assert blue > 200 and red < 60
    assert max(frames[0].getpixel((10, 30))) < 60


def test_a_clip_of_one_frame_and_one_of_another_shape_have_thumbnails():
    for shape in ((3, 1, 20, 20), (3, 5, 30, 50)):
        picture, _ = frames_of(encode_thumbnail(torch.zeros(shape, dtype=torch.uint8)))
        assert picture.size == (96, 96)


def test_a_thumbnail_takes_a_few_kilobytes():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 4, 7, 7, generator=generator), (16, 224, 224), mode="trilinear"
    )
    assert len(encode_thumbnail((smooth[0] * 255).byte())) < 8000
