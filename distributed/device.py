"""The device and the number type that a process computes with."""

import torch

from utils import InputError

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}  # of --amp


def inference_amp(args):
    """The --amp of evaluations: none by default, as figures are not to depend on the machine."""
    return "none" if args.amp == "auto" else args.amp


def pick_device(args, local_rank=0):
    """The torch.device of --device and --gpu for the process of this rank on its node."""
    if args.device == "cpu":
        if args.gpu is not None:
            raise InputError("--gpu and --device cpu exclude each other: drop one")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if args.device == "cuda" or args.gpu is not None:
            raise InputError("--device: no CUDA GPU is available here: use --device cpu")
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is meant where it is asked for
    index = local_rank if args.gpu is None else args.gpu
    if not 0 <= index < torch.cuda.device_count():
        raise InputError(f"--gpu: there is no GPU {index}, only {torch.cuda.device_count()} here")
    return torch.device("cuda", index)
