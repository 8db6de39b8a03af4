"""The released weights through torch.hub; see "Reusing the model" in README.md.

torch.hub leaves what this file imports in the user's program, so it is s3dg alone: that has names
of its own, while half of the world's projects have a `utils`.
"""

import s3dg

dependencies = ["torch", "numpy"]


def s3d_howto100m(weights: str, dictionary: str) -> s3dg.S3D:
    """Load the S3D text-video model with trained weights: see s3dg.load_model.

    weights: the released `s3d_howto100m.pth` or a checkpoint of the training. dictionary: the word
    list made with them, the released `s3d_dict.npy` or the training's `dict.npy`.
    """
    return s3dg.load_model(weights, dictionary)
