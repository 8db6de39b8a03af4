"""Export a model to ONNX: python scripts/export_onnx.py --weights FILE --out FOLDER

Writes two files:

    FOLDER/video.onnx   "video", RGB in [0, 1], float32 [B, 3, T, H, W], to "video_embedding" [B, D]
    FOLDER/text.onnx    "text", word indices, int64 [B, words], to "text_embedding" [B, D]

B and the number of words are dynamic. So are T, H and W, from a minimum on, and only even for the
space_to_depth stem (s3dg.S3D.clip_dims). Each file is compared with the model in onnxruntime at two
sizes, and written if the outputs agree within 1e-5.

Needs the packages onnx, onnxscript and onnxruntime (requirements-extras.txt).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import Parser, check_file, check_packages, make_folder


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="Checkpoint or released weights.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":  # --help should not wait for torch
    parse_arguments()

import logging
import warnings

import numpy as np
import torch

import s3dg
from utils import atomic_write, input_error, run_script

TOLERANCE = 1e-5  # |a - b| / |b|


class Tower(torch.nn.Module):
    """One of the model's two networks, with one input."""

    def __init__(self, model: s3dg.S3D, kind: str):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encode = self.model.encode_video if self.kind == "video" else self.model.encode_text
        return encode(x)


def list_towers(model: s3dg.S3D) -> list[tuple[Tower, dict, list[torch.Tensor]]]:
    """Return each tower with the dynamic axes of its input, and two inputs to check it with."""
    torch.manual_seed(0)
    words = model.text_module.word_embd.num_embeddings
    text_dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("words")}
    clips = [torch.rand(2, 3, 16, 64, 64), torch.rand(1, 3, 18, 70, 66)]
    texts = [torch.randint(0, words, (2, 20)), torch.randint(0, words, (1, 7))]
    return [
        (Tower(model, "video"), model.clip_dims(), clips),
        (Tower(model, "text"), text_dims, texts),
    ]


def export(tower: Tower, example: torch.Tensor, dims: dict) -> bytes:
    """Convert a tower to the content of an ONNX file. dims: the dynamic axes of its input."""
    program = torch.export.export(tower, (example,), dynamic_shapes=(dims,))
    names = {"input_names": [tower.kind], "output_names": [f"{tower.kind}_embedding"]}
    return torch.onnx.export(program, (), **names, verbose=False).model_proto.SerializeToString()


def measure_difference(content: bytes, tower: Tower, x: torch.Tensor) -> float:
    """Compare the file, run by onnxruntime, with the model: |a - b| / |b|."""
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(content)
    (found,) = session.run(None, {tower.kind: x.numpy()})
    expected = tower(x).numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    check_packages("export_onnx.py", "onnx", "onnxscript", "onnxruntime")
    check_file(args.weights, "weights")
    with input_error("--weights"):
        model = s3dg.load_model(args.weights)
    make_folder(args.out, "out")
    # The exporters warn about their own packages and calls.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for tower, dims, inputs in list_towers(model):
        path = args.out / f"{tower.kind}.onnx"
        content = export(tower, inputs[0], dims)
        for x in inputs:
            apart = measure_difference(content, tower, x)
            print(f"{path}, input {list(x.shape)}: {apart:.1e} apart from the model")
            if not apart < TOLERANCE:
                sys.exit(f"error: {path} was not written: the difference exceeds {TOLERANCE:.0e}")
        with atomic_write(path) as file:
            file.write(content)


if __name__ == "__main__":
    run_script(main)
