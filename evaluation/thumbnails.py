"""Short animated pictures of clips, small enough for hundreds of them on a page."""

import io

from PIL import Image
from torch.nn import functional


def thumbnail(clip, *, size=96, frames=6, milliseconds=250, quality=30):
    """A clip as an animated WebP of a few kilobytes, which every browser shows: bytes.

    clip: uint8 [3, T, H, W]. `frames` of its T, evenly spread, are scaled to size x size.
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
