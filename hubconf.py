"""The released weights through torch.hub; see "Reusing the model" in README.md.

torch.hub leaves what this file imports in the user's program, so it is s3dg alone: that has names
of its own, while half of the world's projects have a `utils`.
"""

import s3dg

dependencies = ["torch", "numpy"]


def s3d_howto100m(weights, dictionary):
    """The S3D text-video model with trained weights, on the CPU, in evaluation mode.

    weights: the released `s3d_howto100m.pth` or a checkpoint of the training; its stem, embedding
    size and vocabulary are read off the weights. dictionary: the word list made with them, the
    released `s3d_dict.npy` or the training's `dict.npy`.

    Returns s3dg.S3D: model(video, mode="video") for float [B, 3, T, H, W] in [0, 1], and
    model.text_module(sentences, raw_text=True). Raises FileNotFoundError where a file is absent
    and ValueError, one line that names the file, where it is damaged, holds something else or the
    two do not fit each other. Files are read as data: nothing pickled is run.
    """
    state = s3dg.read_weights(weights)["state_dict"]
    model = s3dg.model_of(state, weights, token_to_word_path=dictionary)
    _ = model.text_module.tokenizer  # reads the word list now: a misfit is to show here
    return model.eval()
