"""Load the released weights through torch.hub; see docs/features.md.

Imports only s3dg: modules that torch.hub imports stay in the user's program, where a module of a
common name, such as `utils`, would collide with the user's own.
"""

import s3dg

dependencies = ["torch", "numpy"]


def s3d_howto100m(weights: str, dictionary: str) -> s3dg.S3D:
    """Load the S3D text-video model with trained weights, on the CPU, in evaluation mode.

    weights: the released `s3d_howto100m.pth` or a checkpoint of the training. dictionary: the
    vocabulary that belongs to them, the released `s3d_dict.npy` or the training's `dict.npy`.

    Use model(video, mode="video") for float [B, 3, T, H, W] in [0, 1], and
    model.text_module(sentences, raw_text=True). Files and errors are those of s3dg.load_model.
    """
    return s3dg.load_model(weights, vocabulary=dictionary)
