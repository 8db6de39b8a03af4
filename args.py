"""The command lines of the scripts, as one table of flags: the public release's and our own.

Importing this module is quick: it loads neither torch nor FFmpeg.
"""

import argparse
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from utils import DataError, FilePath, InputError, input_error

# Groups of scripts. The help of a script lists only the flags that it uses. The others, which a
# command line of the release may contain, are accepted and ignored.
TRAINING = frozenset({"main_distributed"})
RETRIEVAL = frozenset({"eval_youcook", "eval_msrvtt"})
RECOGNITION = frozenset({"eval_hmdb", "eval_ucf"})
LOCALIZATION = frozenset({"eval_crosstask", "eval_htm_align"})
EVALUATION = RETRIEVAL | RECOGNITION | LOCALIZATION
EXTRACTION = frozenset({"extract_features"})
ALL = TRAINING | EVALUATION | EXTRACTION | {"search"}

# Copies, because the modules that define these import torch and FFmpeg, which would slow --help.
BACKENDS = ("pyav", "ffmpeg")  # video_decoder.BACKENDS
PRECISIONS = ("bf16", "fp16", "none")  # distributed.device.PRECISIONS
SUBSETS = ("test", "val", "all")  # annotations.crosstask.SUBSETS


def positive(kind: type) -> Callable[[str], float]:
    """Make an argparse type for numbers of this kind above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def not_negative(kind: type) -> Callable[[str], float]:
    """Make an argparse type for numbers of this kind from zero on."""

    def parse(text: str):
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not zero or above")
        return value

    parse.__name__ = f"non-negative {kind.__name__}"
    return parse


def shard(text: str) -> tuple[int, int]:
    """Parse the argument I/N of --shard: part I, counted from 0, of N parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 to N-1")
    return int(match[1]), int(match[2])


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error in one line, which names the flag."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def normalize_flags(argv: list[str] | None = None) -> list[str]:
    """Replace `-` with `_` in the names of flags. argv: by default sys.argv[1:]."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = argv.index("--") if "--" in argv else len(argv)

    def underscores(token):
        return re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), token)

    return [*map(underscores, argv[:flags]), *argv[flags:]]


class Flag(NamedTuple):
    """A flag: the scripts that use it, its names, and its options for add_argument."""

    scripts: Collection[str]
    names: tuple[str, ...]
    options: dict


def flag(scripts: Collection[str], *names: str, **options) -> Flag:
    return Flag(scripts, names, options)


SWITCH = {"type": int, "choices": (0, 1)}

# Flags, by their group in the help.
# fmt: off
FLAGS = {
    "data": [
        flag(TRAINING, "--train_csv", default="data/howto100m_videos.csv",
             help="CSV file of the training videos, with the column video_path."),
        flag(TRAINING | EXTRACTION, "--video_path", default="",
             help="Folder (or tar file) of the videos. Paths in CSV files are relative to it."),
        flag(TRAINING, "--caption_root", default="",
             help="Folder of caption files, or a caption store. Prefer a store for a large set: it "
                  "is a few files, and processes share its memory (make one with "
                  "data/howto100m/prepare.py pack)."),
        flag(TRAINING | EVALUATION, "--eval_csv", default="",
             help="Annotations of the evaluation: a table, or the official file or folder "
                  "(default: the one in data/)."),
        flag({"eval_crosstask"}, "--eval_subset", choices=SUBSETS, default="test",
             help="Annotated videos to evaluate: those listed in videos_val.csv (val), the others "
                  "(test), or all."),
        flag(TRAINING | EVALUATION, "--eval_video_root", default="",
             help="Folder (or tar file) of the evaluation videos."),
        flag(EXTRACTION, "--feature_csv", default="",
             help="CSV file with the columns video_path and feature_path (default: all videos "
                  "below --video_path)."),
        flag(EXTRACTION, "--feature_root", default="",
             help="Folder to write the features to."),
        flag(EXTRACTION, "--shard", type=shard, default=None,
             help="Process part I of N of the videos, with I from 0 to N-1 (default: set by "
                  "torchrun, srun or a SLURM job array)."),
        flag(ALL, "--num_thread_reader", type=not_negative(int), default=20,
             help="Data workers per node, divided among its processes. Set it to the node's number "
                  "of CPU cores. 0 decodes in the main process."),
        flag(TRAINING, "--prefetch", type=positive(int), default=None,
             help="Clips that each process decodes ahead of its step, at least a batch and two per "
                  "data worker (default: 1000, or a whole step if that is more, but no more than "
                  "fit in an eighth of the node's memory). A clip takes 3 x num_frames x "
                  "video_size^2 bytes."),
    ],
    "clips": [
        flag(ALL, "--num_frames", type=positive(int), default=16, help="Frames per clip."),
        flag(ALL, "--video_size", type=positive(int), default=224,
             help="Height and width of a clip, in pixels."),
        flag(ALL - RECOGNITION, "--fps", type=positive(int), default=5,
             help="Frames per second of video."),
        flag(ALL, "--decoder", choices=BACKENDS, default="pyav",
             help="Decoder backend. Both give the same pixels; pyav is faster."),
        flag(TRAINING, "--min_time", type=positive(float), default=5.0,
             help="Widen shorter captions to this many seconds before drawing a clip from them."),
        flag(TRAINING, "--num_candidates", type=positive(int), default=1,
             help="Candidate captions per clip, the K of MIL-NCE. The release's command uses 4."),
        flag(TRAINING, "--crop_only", **SWITCH, default=1,
             help="1 crops the frame without scaling it; 0 crops its largest square and scales "
                  "that."),
        flag(TRAINING, "--centercrop", **SWITCH, default=0,
             help="1 crops at the center; 0 crops at a random position."),
        flag(TRAINING, "--random_flip", **SWITCH, default=1,
             help="1 mirrors clips with a probability of one half."),
        flag((TRAINING | EVALUATION) - LOCALIZATION, "--num_windows_test", type=positive(int),
             default=4, help="Evenly spaced windows per evaluation video."),
        flag(EXTRACTION | {"search"}, "--stride", type=positive(float), default=None,
             help="Seconds between the starts of successive windows (default: the length of a "
                  "window, or half of it in search.py)."),
    ],
    "model": [
        flag(TRAINING | EVALUATION | EXTRACTION, "--pretrain_cnn_path", default="",
             help="Checkpoint or released weights to start from or evaluate."),
        flag(TRAINING, "--word2vec_path", default="data/word2vec.pth",
             help="Word vectors of a new model. '' uses random ones."),
        flag(TRAINING | RETRIEVAL | LOCALIZATION, "--token_to_word_path", default="data/dict.npy",
             help="Vocabulary of the word vectors."),
        flag(TRAINING, "--num_class", type=positive(int), default=512,
             help="Dimension of the joint embedding."),
        flag(TRAINING, "--weight_init", choices=("uniform", "kaiming_normal"), default="uniform",
             help="Initialization of the convolutions."),
        flag(EXTRACTION, "--layer", choices=("mixed_5c", "embedding"), default="mixed_5c",
             help="Features to extract: mixed_5c (1024-d) or the joint embedding (512-d)."),
        flag(ALL, "--amp", choices=("auto", *PRECISIONS), default="auto",
             help="Data type of convolutions and matrix products; none is float32. auto trains in "
                  "bf16 if the processor supports it natively, and evaluates in float32."),
        flag(ALL, "--channels_last", **SWITCH, default=1,
             help="1 uses the channels-last memory layout."),
        flag(ALL, "--compile", action="store_true",
             help="Use torch.compile. It needs a C++ compiler and takes minutes before the first "
                  "step."),
        flag(TRAINING, "--grad_checkpoint", action="store_true",
             help="Recompute activations in the backward pass: less memory, more time."),
        flag(ALL, "--batch_size_val", type=positive(int), default=32,
             help="Windows per forward pass of an evaluation or extraction."),
    ],
    "optimization": [
        flag(TRAINING, "--optimizer", choices=("adam", "sgd"), default="adam",
             help="Optimizer."),
        flag(TRAINING, "--lr", type=positive(float), default=0.001, help="Peak learning rate."),
        flag(TRAINING, "--momentum", type=not_negative(float), default=0.9,
             help="Momentum for sgd."),
        flag(TRAINING, "--warmup_steps", type=not_negative(int), default=5000,
             help="Steps of linear warmup, followed by cosine decay. The release's command uses "
                  "10000."),
        flag(TRAINING, "--epochs", type=positive(int), default=150,
             help="Passes over the video list. The release's command uses 300."),
        flag(TRAINING, "--start_epoch", type=not_negative(int), default=0,
             help="First epoch of a run that does not resume."),
        flag(TRAINING, "--batch_size", type=positive(int), default=256,
             help="Clips per node and micro-batch, divided among the node's processes. MIL-NCE "
                  "needs many negatives: the paper's batch, over all nodes, is 8192."),
        flag(TRAINING, "--accum_steps", type=positive(int), default=1,
             help="Micro-batches per step. Use more if the batch does not fit in memory: each clip "
                  "has the negatives of all micro-batches, at the cost of a second forward pass."),
        flag(TRAINING, "--fused_optimizer", **SWITCH, default=1,
             help="1 updates all weights with one kernel, without a device sync."),
        flag(TRAINING, "--seed", type=not_negative(int), default=1,
             help="Seed of the initial weights, the order of the videos and the random clips."),
    ],
    "fault tolerance": [
        flag(TRAINING, "--checkpoint_root", default="checkpoint",
             help="Folder of the checkpoints of all runs."),
        flag(TRAINING, "--checkpoint_dir", default="",
             help="Name of this run: its folder in --checkpoint_root, and the name of its logs."),
        flag(TRAINING, "--resume", action="store_true",
             help="Resume from the newest undamaged checkpoint, if there is one."),
        flag(TRAINING, "--checkpoint_every", type=not_negative(int), default=500,
             help="Steps between checkpoints within an epoch. 0 saves only at its end."),
        flag(TRAINING, "--max_bad_fraction", type=not_negative(float), default=0.1,
             help="Stop the run if more than this fraction of an epoch's samples is unreadable."),
        flag(TRAINING, "--max_bad_steps", type=positive(int), default=10,
             help="Stop the run if the loss or gradient is not finite for this many steps in a "
                  "row."),
        flag(ALL, "--sample_timeout", type=positive(float), default=180.0,
             help="Give up on a sample that takes more than this many seconds to decode. There is "
                  "no limit without data workers."),
        flag(TRAINING, "--dist_timeout", type=positive(float), default=600.0,
             help="Stop the run if no process makes progress for this many seconds."),
    ],
    "logging": [
        flag(TRAINING, "--log_root", default="log", help="Folder of the logs."),
        flag(TRAINING, "--n_display", type=positive(int), default=10,
             help="Steps between log lines. Each line waits for the device: use 10 or more on a "
                  "GPU."),
        flag(TRAINING, "--tensorboard", action="store_true",
             help="Also write TensorBoard files, to <checkpoint_dir>.tensorboard/ in --log_root."),
        flag(TRAINING, "-e", "--evaluate", action="store_true",
             help="Evaluate YouCook2 retrieval after every epoch."),
        flag(EVALUATION, "--metrics_json", default="",
             help="Write the metrics to this JSON file."),
        flag(EVALUATION, "--html_report", default="",
             help="Write the results to this folder as a page, index.html."),
        flag(RECOGNITION | LOCALIZATION, "--feature_cache", default="",
             help="Save the features to this .npz file, or read them from it if it exists."),
        flag(TRAINING | EVALUATION | EXTRACTION, "--verbose", **SWITCH, default=1,
             help="1 logs to the terminal."),
    ],
    "launch": [
        flag(ALL, "--device", choices=("auto", "cpu", "cuda"), default="auto",
             help="Device to compute on. auto uses the GPUs, if there are any."),
        flag(ALL, "--gpu", type=int, default=None, help="Use this GPU only."),
        flag(TRAINING, "--nproc_per_node", type=positive(int), default=None,
             help="Processes on this node (default: one per GPU, or one on the CPU)."),
        flag(TRAINING, "--world_size", type=int, default=-1,
             help="Number of nodes, if no launcher sets it."),
        flag(TRAINING, "--rank", type=int, default=-1,
             help="Index of this node, from 0, if no launcher sets it."),
        flag(TRAINING, "--dist_url", default="",
             help="Address of the rendezvous, tcp://host:port (default: set by the launcher)."),
        flag(TRAINING, "--dist_file", default="dist-file",
             help="Use a new file on a shared disk for the rendezvous, instead of an address."),
        flag(TRAINING, "--dist_backend", default="nccl",
             help="Backend of the process group on GPUs. CPUs always use gloo."),
        flag(TRAINING, "--cudnn_benchmark", **SWITCH, default=0,
             help="1 lets cuDNN try its algorithms and keep the fastest."),
    ],
    "compatibility": [
        flag(TRAINING, "--multiprocessing_distributed", action="store_true",
             help="Has no effect: one process per GPU is the default."),
        flag(TRAINING, "--pin_memory", action="store_true",
             help="Has no effect: on a GPU, batches always arrive in page-locked memory."),
    ],
}
# fmt: on


def add_flags(parser: argparse.ArgumentParser, script: str | None, *, others: bool = True) -> None:
    """Add the flags to a parser, in groups.

    script: the help shows the flags that this script uses, or all if it is None. others: also
    accept the flags that it does not use.
    """
    for title, flags in FLAGS.items():
        section = parser.add_argument_group(title)
        for scripts, names, options in flags:
            if script is None or script in scripts:
                section.add_argument(*names, **options)
            elif others:
                section.add_argument(*names, **{**options, "help": argparse.SUPPRESS})
    if others:  # old spellings, the release's and our own, that existing command lines still use
        add = functools.partial(parser.add_argument, help=argparse.SUPPRESS)
        momentum = not_negative(float)
        add("--momemtum", dest="momentum", type=momentum, default=argparse.SUPPRESS)
        add("--pretrained", action="store_true")
        for old, name in (
            ("--output", "metrics_json"),
            ("--report", "html_report"),
            ("--features", "feature_cache"),
        ):
            add(old, dest=name, default=argparse.SUPPRESS)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the description, and add the default if the help lacks it."""

    def _get_help_string(self, action):
        if any(action.default is value for value in (None, "", False)) or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def get_args(
    description: str = "MIL-NCE", script: str | None = None, argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse argv, by default sys.argv[1:]. Flags may be spelled with `-` or `_`.

    script: the name of the script without `.py`; its help shows the flags that it uses.
    """
    parser = Parser(
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    add_flags(parser, script)
    return parser.parse_args(normalize_flags(argv))


# The default of --eval_csv in each evaluation.
ANNOTATIONS = {
    "youcook": "data/validation_youcook.csv",
    "msrvtt": "data/msrvtt_test.csv",
    "hmdb": "data/hmdb51.csv",
    "ucf": "data/ucf101.csv",
    "crosstask": "data/crosstask_release",
    "htm_align": "data/htm_align.json",
}

# The flags that evaluate_all.py sets itself, for each evaluation.
PER_EVALUATION = {"--eval_csv", "--eval_video_root", "--metrics_json", "--html_report"}
PER_EVALUATION |= {"--feature_cache"}


def get_all_args(
    description: str, data_sets: dict[str, str], argv: list[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of evaluate_all.py. data_sets: {name: title}."""
    parser = Parser(
        usage="%(prog)s [flags]",
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    section = parser.add_argument_group("data sets and results")
    for name, title in data_sets.items():
        section.add_argument(
            f"--{name}_root", default="", metavar="DIR", help=f"Evaluate {title} on these videos."
        )
        section.add_argument(
            f"--{name}_csv",
            default="",
            metavar="FILE",
            help=f"Annotations of {title} (default: as in eval_{name}.py).",
        )
    section.add_argument(
        "--out", default="evaluations", metavar="DIR", help="Folder to write the results to."
    )
    for group, flags in FLAGS.items():
        section = parser.add_argument_group(group)
        for scripts, names, options in flags:
            if not EVALUATION.isdisjoint(scripts) and names[0] not in PER_EVALUATION:
                section.add_argument(*names, **options)
    return parser.parse_args(normalize_flags(argv))


def changed_flags(args: argparse.Namespace, script: str) -> dict[str, object]:
    """Return the flags of a script that differ from their defaults: {name: value}.

    args: from get_all_args.
    """
    own = (
        (names[0], options.get("default", False))
        for flags in FLAGS.values()
        for scripts, names, options in flags
        if script in scripts and names[0] not in PER_EVALUATION
    )
    values = {name[2:]: (getattr(args, name[2:]), default) for name, default in own}
    return {name: value for name, (value, default) in values.items() if value != default}


def port(text: str) -> int:
    """Parse a TCP port. 0 stands for any free one."""
    number = not_negative(int)(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is above 65535")
    return number


def get_search_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of search.py: the attribute `command` is index, query or serve."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command", metavar="index|query|serve")

    def command(name, help):
        return commands.add_parser(
            name, help=help, description=help, allow_abbrev=False, formatter_class=HelpFormatter
        )

    index = command("index", "write or update an index of videos")
    add = index.add_argument
    add("folder", metavar="FOLDER", help="Folder of the videos, which may be in subfolders.")
    add("--weights", required=True, help="A checkpoint or the released weights.")
    add("--token_to_word_path", default="data/dict.npy", help="Vocabulary of the weights.")
    add("--out", required=True, help="Path of the index.")
    add("--retry_failed", action="store_true", help="Retry videos that could not be used before.")
    add_flags(index, "search", others=False)
    index.set_defaults(num_thread_reader=len(os.sched_getaffinity(0)))

    query = command("query", "print the moments that match a text best")
    serve = command("serve", "serve a search page for the browser")
    for subparser in (query, serve):
        add = subparser.add_argument
        add("index", metavar="INDEX", help="An index written by `search.py index`.")
        add(
            "--weights",
            default="",
            help="New path of the weights, if they have moved (default: their path in the index).",
        )
        add("--token_to_word_path", default="", help="New path of the vocabulary, if it has moved.")
        add("--video_path", default="", help="New path of FOLDER, if it has moved.")
    add = query.add_argument
    add(
        "text",
        metavar="TEXT",
        nargs="+",
        help="Words to search for, in a row.",
    )
    add("--top", type=positive(int), default=10, help="Number of moments to print.")
    add("--json", action="store_true", help="Print a JSON object, see docs/search.md.")
    serve.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    serve.add_argument("--port", type=port, default=8000, help="Port. 0 uses any free one.")
    return parser.parse_args(normalize_flags(argv))


# --- checks of paths -----------------------------------------------------------------------------


def format_flag(flag: str) -> str:
    """Format a flag for a message. A name in capitals is a positional argument."""
    return flag if flag.isupper() else f"--{flag}"


def check_file(path: FilePath, flag: str) -> None:
    """Reject a path that is not a readable file. An empty one means that the flag is missing."""
    if not path:
        raise InputError(f"{format_flag(flag)} is needed; give the path of a file")
    if os.path.isdir(path):
        raise InputError(f"{format_flag(flag)}: {path} is a folder; give a file")
    if not os.path.isfile(path):
        raise InputError(f"{format_flag(flag)}: there is no file {path}; give an existing one")
    if not os.access(path, os.R_OK):
        raise InputError(f"{format_flag(flag)}: {path} cannot be read; change its permissions")


def file_checksum(path: FilePath, flag: str) -> str:
    """Compute the SHA-256 of a flag's file. Raises InputError.

    Call it before the work starts: a running training may remove an old checkpoint meanwhile.
    """
    from evaluation.feature_file import checksum

    check_file(path, flag)
    with input_error(format_flag(flag)):
        return checksum(path)


def check_folder(path: FilePath, flag: str) -> None:
    """Reject a path that is not a folder. An empty one means that the flag is missing."""
    if not path:
        raise InputError(f"{format_flag(flag)} is needed; give the path of a folder")
    if os.path.isfile(path):
        raise InputError(f"{format_flag(flag)}: {path} is a file; give a folder")
    if not os.path.isdir(path):
        raise InputError(f"{format_flag(flag)}: there is no folder {path}; give an existing one")


def check_packages(needed_by: str, *packages: str) -> None:
    """Raise InputError if any of these optional requirements is not installed.

    needed_by: a flag or script, for the message.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        names = " ".join(missing)
        raise InputError(f"{needed_by}: needs packages that are missing: pip install {names}")


def check_output(path: FilePath, flag: str) -> None:
    """Reject an output file that cannot be written, before the work starts."""
    folder = Path(path).resolve().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)) or Path(path).is_dir():
        raise InputError(f"--{flag}: {path} cannot be written; give a file in an existing folder")


def make_folder(path: FilePath, flag: str) -> None:
    """Make a folder for output, unless it exists. Raises InputError if it cannot be written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--{flag}: cannot make the folder {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"--{flag}: the folder {path} cannot be written to")


def check_absent(path: FilePath, flag: str) -> None:
    """Reject an output path that already exists."""
    if os.path.lexists(path):
        raise InputError(f"--{flag}: {path} already exists; remove it or give another path")


def check_new_output(path: FilePath, flag: str) -> None:
    """Reject an output file that exists or cannot be written, before the work starts."""
    check_absent(path, flag)
    check_output(path, flag)


def check_video_folder(path: FilePath, flag: str) -> None:
    """Reject a path that is neither a folder nor a tar file of videos."""
    from video_decoder import is_shard

    if not is_shard(path):
        check_folder(path, flag)


def files_below(root: FilePath, flag: str, extensions: Collection[str]) -> list[str]:
    """List the videos that walk_files finds, sorted, with a progress bar. Raises InputError."""
    from video_decoder import walk_files

    check_video_folder(root, flag)
    try:
        return sorted(
            tqdm(walk_files(root, extensions), format_flag(flag), unit="file", disable=None)
        )
    except OSError as error:
        raise InputError(
            f"{format_flag(flag)}: {error.filename} cannot be read: {error.strerror}"
        ) from None


# --- setup that several scripts share ------------------------------------------------------------


def check_decoder(args: argparse.Namespace) -> None:
    """Reject a --decoder that does not run on this machine."""
    from video_decoder import DecodeError, check_backend

    try:
        check_backend(args.decoder)
    except DecodeError as error:
        raise InputError(
            f"--decoder {args.decoder}: {error}; repair that program, or use --decoder pyav"
        ) from None


def clip_spec(args: argparse.Namespace):
    """Return the video_decoder.ClipSpec that the flags describe."""
    from video_decoder import ClipSpec

    return ClipSpec(args.num_frames, args.video_size, args.fps, args.decoder)


def inference_model(
    args: argparse.Namespace, device, weights: str = "pretrain_cnn_path", joint_space: bool = True
):
    """Load the S3D of --pretrain_cnn_path, or of another flag, for inference on a torch device.

    joint_space: require joint embeddings. Raises InputError if the file is invalid or lacks them,
    or if the model does not fit the other flags.
    """
    from distributed.device import check_compiler
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
        if joint_space and not model.joint_space:
            raise DataError(path, "holds a video network only; give weights trained with text")
    with input_error("--num_frames, --video_size"):
        model.check_clip(args.num_frames, args.video_size)
    return model


def evaluation_table(args: argparse.Namespace, read_table, default_csv: str):
    """Read --eval_csv and log the reader's notes. Returns (path, table).

    read_table: reads a table or the official files of the data set, see annotations.
    """
    from annotations.tables import log_notes

    csv = args.eval_csv or default_csv
    with input_error("--eval_csv"):
        table, notes = read_table(csv)
    log_notes(csv, notes)
    return csv, table


def retrieval_set(args: argparse.Namespace, data_set, table, words):
    """Build a retrieval data set, YouCook2 or MSRVTT, from a table and --eval_video_root.

    words: the vocabulary.
    """
    from retrieval_loader import RETRIEVAL_WORDS
    from s3dg import Tokenizer

    check_video_folder(args.eval_video_root, "eval_video_root")
    tokenizer, windows = Tokenizer(words, RETRIEVAL_WORDS), args.num_windows_test
    with input_error("--eval_video_root"):
        return data_set(
            table, args.eval_video_root, tokenizer, clip_spec(args), num_windows=windows
        )


def check_evaluation_outputs(args: argparse.Namespace) -> None:
    """Reject outputs of an evaluation that cannot be written, before the work starts."""
    if args.metrics_json:
        check_output(args.metrics_json, "metrics_json")
    if args.html_report:
        from evaluation.report import page_path

        make_folder(args.html_report, "html_report")
        check_output(page_path(args.html_report), "html_report")
