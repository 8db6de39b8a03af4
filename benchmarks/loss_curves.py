"""Compare the loss curves of bfloat16 and float32 on the toy data set.

    python data/toy/prepare.py --out data/toy
    python benchmarks/loss_curves.py                    # about five minutes on two cores

Trains from the same weights and on the same batches, in turn, in one process: the plain way of
ways.py, which is the release's in float32, and ours in float32 and in bfloat16. Rounding alone
separates two trainings after a few steps, even if both are in float32: compare the distance of
bfloat16 with theirs. The table has means over the steps since the previous line. The last line is
the distance of inference in bfloat16 from that in float32, with the weights of our float32
training, as |a - b| / |b| over the embeddings of the last batch.
"""

import argparse
import contextlib
import itertools
import sys
from pathlib import Path

import torch
from bench_decode import processor
from ways import our_forward, our_trainer, plain_trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import get_args
from main_distributed import build_model, training_set
from s3dg import load_words
from video_loader import StepSampler, training_batches

TOY = Path(__file__).resolve().parents[1] / "data" / "toy"


def toy_flags(options):
    return [
        f"--train_csv={options.toy}/howto100m_videos.csv",
        f"--video_path={options.toy}/videos",
        f"--caption_root={options.toy}/captions",
        f"--word2vec_path={options.toy}/word2vec.pth",
        f"--token_to_word_path={options.toy}/dict.npy",
        *("--crop_only=0", "--centercrop=1", "--num_candidates=4", "--min_time=3"),
        f"--num_frames={options.frames}",
        f"--video_size={options.size}",
        f"--batch_size={options.batch}",
        f"--warmup_steps={options.steps // 4}",
    ]


def train_side_by_side(options, device):
    """Yield (step, losses, batch, networks) after every step, in the order of the columns."""
    flags = toy_flags(options)
    args = get_args(argv=flags)
    words = load_words(args.token_to_word_path)
    model = build_model(args, words)
    ways = [plain_trainer(model, device, get_args(argv=flags), options.steps)]
    for dtype in (torch.float32, torch.bfloat16):
        ways.append(our_trainer(model, device, dtype, args, options.steps))
    dataset = training_set(args, words)
    sampler = StepSampler(len(dataset), args.batch_size, options.steps, seed=args.seed)
    batches = training_batches(
        dataset, sampler, quarantined=set(), workers=2, timeout=args.sample_timeout
    )
    with contextlib.closing(batches):
        for number, batch in enumerate(batches, 1):
            losses = [step([batch]).item() for _, step, _ in ways]
            for _, _, scheduler in ways:
                scheduler.step()
            yield number, losses, batch, [network for network, _, _ in ways]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", default=TOY, help="prepare.py's --out")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps per line of the table")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{processor()}; torch {torch.__version__}; {device.type}")
    print(f"{options.batch} clips of {options.frames}x{options.size}x{options.size}\n")
    print("| steps | plain | ours, float32 | ours, bfloat16 |\n| --- | --- | --- | --- |")
    steps = train_side_by_side(options, device)
    while part := list(itertools.islice(steps, options.every)):
        number, _, batch, (_, trained, _) = part[-1]
        means = [sum(column) / len(part) for column in zip(*(p[1] for p in part), strict=True)]
        print(f"| {number} | {' | '.join(f'{mean:.4f}' for mean in means)} |", flush=True)
    long, short = (
        our_forward(trained, batch, device, dtype)()[0] for dtype in (torch.float32, torch.bfloat16)
    )
    apart = ((short - long).norm() / long.norm()).item()
    print(f"\nembeddings in bfloat16, after {number} steps: {apart:.1e} apart from float32's")


if __name__ == "__main__":
    main()
