"""Training on captions of the videos teaches retrieval; training on shuffled captions does not."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT, run_python

# The demo's training, in float32, so that it is the same on every processor. benchmarks/RESULTS.md
# has the results of five seeds (Batch and learning rate).
BUDGET = [
    *("--num_frames=4", "--fps=3", "--video_size=64", "--crop_only=0", "--centercrop=1"),
    *("--batch_size=32", "--num_candidates=1", "--min_time=3", "--warmup_steps=50", "--lr=0.0003"),
    *("--epochs=50", "--n_display=25", "--num_thread_reader=2", "--nproc_per_node=2", "--amp=none"),
]


@pytest.fixture(scope="module")
def whole_toy():
    """The toy data set of the demo, in the demo's folder: it is drawn once for both."""
    folder = ROOT / "data" / "toy"
    command = [sys.executable, folder / "prepare.py", "--out", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def shuffle_captions(captions, target):
    """Give each video the captions of another."""
    names = sorted(path.name for path in captions.iterdir())
    target.mkdir()
    for name, other in zip(names, names[len(names) // 2 :] + names, strict=False):
        shutil.copy(captions / name, target / other)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("narrated", [True, False], ids=["narrated", "shuffled"])
def test_retrieval_is_learned_from_captions_but_not_from_shuffled_ones(
    narrated, whole_toy, tmp_path
):
    captions = whole_toy / "captions"
    if not narrated:
        captions = shuffle_captions(captions, tmp_path / "captions")
    data = [f"--token_to_word_path={whole_toy}/dict.npy", *BUDGET]
    run_python(
        "main_distributed.py",
        *data,
        f"--train_csv={whole_toy}/howto100m_videos.csv",
        f"--video_path={whole_toy}/videos",
        f"--caption_root={captions}",
        f"--word2vec_path={whole_toy}/word2vec.pth",
        f"--checkpoint_root={tmp_path}/checkpoint",
        f"--log_root={tmp_path}/log",
        timeout=1200,
    )
    run_python(
        "eval_youcook.py",
        *data,
        f"--pretrain_cnn_path={tmp_path}/checkpoint/epoch0050.pth.tar",
        f"--eval_csv={whole_toy}/validation_youcook.csv",
        f"--eval_video_root={whole_toy}/youcook",
        f"--metrics_json={tmp_path}/out.json",
    )
    figures = json.loads((tmp_path / "out.json").read_text())
    print(figures)
    # Of 100 segments, chance has a median rank of 50.5 +- 5 and R10 of 0.10 +- 0.03.
    if narrated:
        assert figures["MR"] < 20 and figures["R10"] > 0.4
    else:
        assert figures["MR"] > 35 and figures["R10"] < 0.2
