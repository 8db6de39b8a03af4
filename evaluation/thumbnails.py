"""Encode clips as short animations, small enough for hundreds of them on a page."""

import io

import torch
from PIL import Image
from torch.nn import functional


def encode_thumbnail(
    clip: torch.Tensor,
    *,
    size: int = 96,
    frames: int = 6,
    milliseconds: int = 250,
    quality: int = 30,
) -> bytes:
    """Encode a clip as an animated WebP of a few kilobytes.

    clip: uint8 [3, T, H, W]. `frames` of the T, evenly spread, are scaled to size x size, each
    shown for `milliseconds`. quality: of WebP, 0 to 100.
    """
    total = clip.shape[1]
    count = min(frames, total)
    places = [(2 * k + 1) * total // (2 * count) for k in range(count)]
    pictures = functional.interpolate(
        clip[:, places].transpose(0, 1).float(), (size, size), mode="bilinear", antialias=True
    )
    pictures = pictures.round().byte().permute(0, 2, 3, 1).numpy()
    first, *rest = map(Image.fromarray, pictures)
    file = io.BytesIO()
    first.save(
        file,
        "WEBP",
        save_all=True,
        append_images=rest,
        duration=milliseconds,
        loop=0,
        quality=quality,
        method=4,
    )
    return file.getvalue()
