"""What several test modules share: golden values, the shared clips, golden weights."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SHARED = HERE.parents[1] / "shared"  # real clips and annotation tables; absent in most clones


def golden_json(name):
    return json.loads((HERE / "golden" / f"{name}.json").read_text())


def golden_random(tag):
    """The generator of golden/README: numpy's RandomState seeded with the tag's CRC-32."""
    return np.random.RandomState(zlib.crc32(tag.encode()))


def golden_weight(name, shape):
    """A tensor of golden/README's deterministic weights, float64."""
    n = golden_random(name).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        value = np.zeros(shape, dtype=np.int64)
    elif name.endswith("running_var"):
        value = 1 + 0.5 * np.abs(n)
    elif name.endswith("running_mean"):
        value = 0.1 * n
    elif ".bn" in name and name.endswith("weight"):
        value = 1.7 + 0.1 * n
    elif name.endswith("bias"):
        value = 0.02 * n
    elif name.endswith("word_embd.weight"):
        value = 0.1 * n
    else:
        value = n * np.sqrt(2 / np.prod(shape[1:]))
    return torch.as_tensor(np.asarray(value))


@pytest.fixture(scope="session")
def golden_values():
    with np.load(HERE / "golden" / "model.npz") as values:
        return dict(values)


@pytest.fixture(scope="session")
def shared_videos():
    if not (SHARED / "videos").is_dir():
        pytest.skip("../shared/videos is not here")
    return SHARED / "videos"


@pytest.fixture(scope="session")
def shared_csv():
    if not (SHARED / "csv").is_dir():
        pytest.skip("../shared/csv is not here")
    return SHARED / "csv"
