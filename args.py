"""The command line of every script: one parser, the public release's flags and a few of ours."""

import argparse
import math
import re
import sys

from distributed.device import PRECISIONS, check_compiler
from utils import InputError, check_file, check_output, input_error, make_folder
from video_decoder import BACKENDS, ClipSpec, DecodeError, check_backend


def positive(kind):
    """An argparse type: a number of that kind above zero."""

    def parse(text):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(kind):
    """An argparse type: a number of that kind, zero or above."""

    def parse(text):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from zero")
        return value

    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def shard(text):
    """An argparse type: I/N, the part I, from 0, of N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N-1")
    return int(match[1]), int(match[2])


class Parser(argparse.ArgumentParser):
    """An error is one line: which flag, and what is wrong with it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def normalize_flags(argv=None):
    """The command line (default: the process's) with `_` for each `-` in the names of flags."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = argv.index("--") if "--" in argv else len(argv)

    def underscores(token):
        return re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), token)

    return [*map(underscores, argv[:flags]), *argv[flags:]]


def add_clip_flags(add):
    """What a clip is, and how it is decoded."""
    add("--num_frames", type=positive(int), default=16, help="frames a clip")
    add("--video_size", type=positive(int), default=224, help="height and width, pixels")
    add("--fps", type=positive(int), default=5, help="frames a second of a clip")
    add("--decoder", choices=BACKENDS, default="pyav", help="decoder backend; same pixels")


def check_decoder(args):
    """Reject a --decoder that does not run on this machine."""
    try:
        check_backend(args.decoder)
    except DecodeError as error:
        raise InputError(
            f"--decoder {args.decoder}: {error}; repair that program, or use --decoder pyav"
        ) from None


def add_inference_flags(add):
    """What a model needs to embed videos, training or not."""
    add(
        "--amp",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="type of convolutions and matrix products; auto: training in bf16 where the processor "
        "computes in it, evaluation in float32",
    )
    add("--channels_last", type=int, choices=(0, 1), default=1, help="keep channels innermost")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    add(
        "--batch_size_val", type=positive(int), default=32, help="windows through the model at once"
    )
    add("--num_thread_reader", type=not_negative(int), default=20, help="data workers of a node")
    add(
        "--sample_timeout",
        type=positive(float),
        default=180.0,
        help="seconds after which a sample that is still being decoded is given up; without data "
        "workers there is no limit",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--gpu", type=int, default=None, help="use this GPU only")


def get_args(description="MIL-NCE", script=None, argv=None):
    """Parse argv (default: the process's). Flags may be spelled with `-` or `_`.

    script: the name of the script without `.py`; its help shows the flags that it uses.
    """
    parser = Parser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument

    # Training data
    add("--train_csv", default="data/howto100m_videos.csv", help="list of training videos")
    add("--video_path", default="", help="folder that the list's video_path starts from")
    add("--caption_root", default="", help="folder of caption files, or a caption store")
    add("--min_time", type=positive(float), default=5.0, help="shortest clip to draw from, seconds")
    add("--num_candidates", type=positive(int), default=1, help="captions a clip (K of MIL-NCE)")
    add("--random_flip", type=int, choices=(0, 1), default=1, help="flip half of the clips")

    # Clips
    add_clip_flags(add)
    add("--crop_only", type=int, choices=(0, 1), default=1, help="crop; 0: largest square, scaled")
    add("--centercrop", type=int, choices=(0, 1), default=0, help="crop the centre, not at random")

    # Model
    add("--num_class", type=positive(int), default=512, help="size of the joint embedding")
    add("--weight_init", choices=("uniform", "kaiming_normal"), default="uniform", help="of S3D")
    add("--word2vec_path", default="data/word2vec.pth", help="word vectors; '': random ones")
    add("--token_to_word_path", default="data/dict.npy", help="word list of the vectors")
    add("--pretrain_cnn_path", default="", help="weights to start from or to evaluate")

    # Optimisation
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="optimizer")
    add("--lr", type=positive(float), default=0.001, help="peak learning rate")
    add("--momentum", type=not_negative(float), default=0.9, help="of sgd")
    add("--warmup_steps", type=not_negative(int), default=5000, help="linear warm-up")
    add("--epochs", type=positive(int), default=150, help="passes over the video list")
    add("--start_epoch", type=not_negative(int), default=0, help="first epoch, without --resume")
    add("--batch_size", type=positive(int), default=256, help="of a node, shared by its processes")
    add(
        "--accum_steps",
        type=positive(int),
        default=1,
        help="batches of batch_size that make one step, each clip with the negatives of all",
    )
    add("--seed", type=not_negative(int), default=1, help="of weights, data order and samples")

    # Speed and memory
    add_inference_flags(add)
    add("--fused_optimizer", type=int, choices=(0, 1), default=1, help="one kernel for all weights")
    add(
        "--grad_checkpoint",
        action="store_true",
        help="compute activations again for the backward pass: less memory, more time",
    )

    # What a run puts up with
    add(
        "--max_bad_fraction",
        type=not_negative(float),
        default=0.1,
        help="share of an epoch's samples that may be unreadable",
    )
    add(
        "--max_bad_steps",
        type=positive(int),
        default=10,
        help="steps in a row that may have a loss or gradient that is not finite",
    )

    # Evaluation
    add("-e", "--evaluate", action="store_true", help="score YouCook2 retrieval each epoch")
    add("--eval_video_root", default="", help="folder of the evaluation videos")
    add("--eval_csv", default="", help="annotation table or official file (default: in data/)")
    add("--num_windows_test", type=positive(int), default=4, help="windows an evaluation video")
    add("--output", default="", help="write the evaluation's figures to this JSON file")
    add("--report", default="", help="write the results as a page, index.html, to this folder")
    add("--features", default="", help="keep HMDB-51's features in this .npz, or read them there")

    # Feature extraction; its videos are in --video_path
    add("--feature_csv", default="", help="videos and their features' files (default: all videos)")
    add("--feature_root", default="", help="folder that the features are written to")
    add(
        "--layer", choices=("mixed_5c", "embedding"), default="mixed_5c", help="1024 numbers or 512"
    )
    add(
        "--stride",
        type=positive(float),
        default=None,
        help="seconds from a window's start to the next one's (default: a window's length)",
    )
    add("--shard", type=shard, default=None, help="take part I/N of the videos, 0/N to N-1/N")

    # Checkpoints and logs
    add("--checkpoint_root", default="checkpoint", help="folder of all runs' checkpoints")
    add("--checkpoint_dir", default="", help="this run's folder in it, and the log's name")
    add("--resume", action="store_true", help="continue from the newest good checkpoint")
    add(
        "--checkpoint_every",
        type=not_negative(int),
        default=500,
        help="steps between checkpoints within an epoch; 0: none",
    )
    add("--log_root", default="log", help="folder of the logs")
    add("--n_display", type=positive(int), default=10, help="steps between log lines")
    add("--tensorboard", action="store_true", help="event files, too, in <the log>.tensorboard/")
    add("--verbose", type=int, choices=(0, 1), default=1, help="log to the terminal too")

    # Machine
    add("--nproc_per_node", type=positive(int), default=None, help="processes (default: GPUs or 1)")
    add("--pin_memory", action="store_true", help="page-locked batches; on a GPU they always are")
    add("--cudnn_benchmark", type=int, choices=(0, 1), default=0, help="let cuDNN try algorithms")
    add("--world_size", type=int, default=-1, help="nodes, where no launcher says so")
    add("--rank", type=int, default=-1, help="this node's number, where no launcher says so")
    add("--dist_url", default="", help="rendezvous, tcp://host:port (default: worked out)")
    add("--dist_file", default="dist-file", help="rendezvous through a new file on a shared disk")
    add(
        "--dist_timeout",
        type=positive(float),
        default=600.0,
        help="seconds without progress of any process after which the run ends",
    )
    add("--dist_backend", default="nccl", help="process group on GPUs; on CPUs it is gloo")
    add(
        "--multiprocessing_distributed",
        action="store_true",
        help="a process a GPU, which is the default here",
    )

    # Spellings of the release that scripts in the wild still carry.
    add(
        "--momemtum",
        dest="momentum",
        type=not_negative(float),
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )
    add("--pretrained", action="store_true", help=argparse.SUPPRESS)

    return parser.parse_args(normalize_flags(argv))


# --- what several scripts make of their flags ----------------------------------------------------


def clip_spec(args):
    """Return the ClipSpec that the flags describe."""
    return ClipSpec(args.num_frames, args.video_size, args.fps, args.decoder)


def inference_model(args, device, weights="pretrain_cnn_path"):
    """Load the model of --pretrain_cnn_path, or of another flag; it has to fit the flags."""
    from evaluation.features import load_inference_model

    path = getattr(args, weights)
    check_file(path, weights)
    if args.compile:
        with input_error("--compile"):
            check_compiler()
    with input_error(f"--{weights}"):
        model = load_inference_model(
            path,
            device,
            amp=args.amp,
            channels_last=bool(args.channels_last),
            compile=args.compile,
        )
    with input_error("--num_frames, --video_size"):
        model.check_clip(args.num_frames, args.video_size)
    return model


def check_evaluation_outputs(args):
    """Reject, before the work, an --output or --report that could not be written after it."""
    if args.output:
        check_output(args.output)
    if args.report:
        from evaluation.report import page_path

        make_folder(args.report, "report")
        check_output(page_path(args.report), "report")
