"""The released weights through torch.hub; see "Reusing the model" in README.md.

torch.hub leaves what this file imports in the user's program, so it imports s3dg alone: that has a
name of its own, while many projects have a `utils`.
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
