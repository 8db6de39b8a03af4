"""Choose the device and the data type that a process computes with."""

import os
import re
import shutil
from pathlib import Path

import torch

from utils import one_line

GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/nvidia0")  # of NVIDIA's driver

BF16_UNITS = {"avx512_bf16", "amx_bf16"}  # of a CPU
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}


def training_dtype(amp: str, device: torch.device) -> torch.dtype:
    """Choose the type of a training's convolutions and matrix products.

    amp: a key of PRECISIONS, or "auto": bfloat16, which needs no loss scaling, if the processor
    supports it natively, otherwise float32.
    """
    if amp in PRECISIONS:
        return PRECISIONS[amp]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = cpu_flags() & BF16_UNITS
    return torch.bfloat16 if native else torch.float32


def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """Return what Linux says the processor can do, such as "avx512_bf16"."""
    found = re.search(r"^flags\s*:(.*)", Path(path).read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def inference_amp(amp: str) -> str:
    """Resolve the precision of an evaluation.

    "auto" becomes "none": metrics must not depend on the machine.
    """
    return "none" if amp == "auto" else amp


def pick_device(device: str, gpu: int | None = None, local_rank: int = 0) -> torch.device:
    """Choose the device of a process.

    device: "auto", "cpu" or "cuda". gpu: the only one to use. local_rank: the process's number on
    its node, which is the GPU to use if gpu is None. Raises ValueError if there is no such device,
    or if "auto" would be the CPU of a machine that has a GPU.
    """
    if device == "cpu":
        if gpu is not None:
            raise ValueError("--gpu and --device cpu cannot be combined; drop one")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if device == "cuda" or gpu is not None:
            raise ValueError("no CUDA GPU is available here; use --device cpu")
        if sign := find_sign_of_gpu():
            raise ValueError(
                f"there is a GPU ({sign}), but PyTorch cannot use it ({describe_cuda_failure()}); "
                "fix that, or use --device cpu"
            )
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 must mean float32
    index = local_rank if gpu is None else gpu
    if not 0 <= index < torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"there is no GPU {index}; those here are 0 to {last}")
    return torch.device("cuda", index)


def find_sign_of_gpu() -> str:
    """Return a sign that this process should have a GPU: a variable or a device file, else "".

    A CPU build of PyTorch is taken as the intention to use none.
    """
    if not torch.version.cuda:
        return ""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return "" if visible in ("", "-1", "NoDevFiles") else f"CUDA_VISIBLE_DEVICES={visible}"
    return next(filter(os.path.exists, GPU_DEVICE_FILES), "")


def describe_cuda_failure() -> str:
    """Return PyTorch's reason for not having a GPU."""
    try:
        torch.cuda.init()
    except Exception as error:  # of several types
        return one_line(error).split(". ")[0]
    return "no device"


def check_compiler() -> None:
    """Raise ValueError unless there is a C++ compiler, which torch.compile needs on a GPU, too."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise ValueError(
            "torch.compile needs a C++ compiler, g++ or $CXX; install one, or drop the flag"
        )
