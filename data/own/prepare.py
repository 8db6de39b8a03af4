"""Prepare a folder of your own videos, with captions beside them, for training.

    python data/own/prepare.py FOLDER

Each video needs a file of captions in the same folder, with the video's name: subtitles
(talk.en.vtt, talk.vtt, talk.srt), as `yt-dlp --write-auto-subs` leaves them, the JSON of Whisper or
WhisperX (talk.json), or a CSV file of start, end, text (talk.csv). FOLDER may have subfolders.
The command writes to --out

    videos.csv              the videos that can be trained on
    captions/               the caption store
    dict.npy, word2vec.pth  a vocabulary and its vectors, trained on the captions

prints which videos it skips and why, and then the command that trains on the rest. To use existing
word vectors, such as those of the release (data/README.md), give --word2vec_path and
--token_to_word_path.
"""

import argparse
import multiprocessing.pool
import os
import shlex
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, check_absent, check_file, files_below, make_folder, positive
from captions.readers import CaptionStore, lookup_keys
from captions.sources import SUFFIXES
from data.howto100m.prepare import Packed, pack_source, pair, write_list
from utils import InputError, input_error, printable, run_stoppable_script

LIST, CAPTIONS, WORDS, VECTORS = "videos.csv", "captions", "dict.npy", "word2vec.pth"
CLIPS_PER_GPU = 64  # as in the release's training of 512 clips on 8 GPUs
CLIPS_ON_CPU = 16
EPOCHS = 150  # main_distributed.py's default


def prepare(options: argparse.Namespace) -> None:
    from video_decoder import EXTENSIONS

    out = options.out or Path("data", "own", Path(options.folder).resolve().name)
    check_absent(out, "out")
    if options.word2vec_path:
        check_vectors(options)
    videos = files_below(options.folder, "FOLDER", EXTENSIONS)
    if not videos:
        raise InputError(f"FOLDER: there is no video in {options.folder}")
    # The folder is written atomically.
    partial = out.with_name(f".{out.name}.part")
    check_absent(partial, "out")
    make_folder(partial, "out")
    try:
        workers = len(os.sched_getaffinity(0))
        packed = pack_source(
            options.folder,
            partial / CAPTIONS,
            by_id=False,
            language=options.language,
            workers=workers,
            flag="FOLDER",
        )
        names = set(CaptionStore(partial / CAPTIONS).names)
        firsts = {}
        for video in videos:
            firsts.setdefault(caption_name(video), video)
        pairs, without, unlistable = pair(list(firsts.values()), names, by_id=False)
        skipped = explain(without, packed, options.language)
        skipped += [
            (video, "its name is not UTF-8, or contains a line break") for video in unlistable
        ]
        skipped += [
            (video, f"{printable(first)} has the same captions")
            for video in videos
            if (first := firsts[caption_name(video)]) != video
        ]
        skipped += remove_undecodable(options.folder, pairs, workers)
        for video, reason in skipped:
            print(f"skipped: {printable(video)}: {reason}")
        for name in sorted((names | packed.skipped.keys()) - firsts.keys()):
            print(f"skipped: the captions of {printable(name)}: there is no such video")
        if not pairs:
            raise InputError(f"FOLDER: no video of {len(videos):,} can be trained on; see above")
        with input_error("--out"):
            write_list(partial / LIST, pairs.values())
        if not options.word2vec_path:
            train_vectors(partial, options.min_count)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {len(pairs):,} of {len(videos):,} videos, {packed.captions:,} captions")
    print(
        "Train with", "", f"    {shlex.join(training_command(options, out, len(pairs)))}", sep="\n"
    )


def caption_name(video: str) -> str:
    [name] = lookup_keys(video)
    return name


def explain(without: list[str], packed: Packed, language: str) -> list[tuple[str, str]]:
    """Return (video, reason) for the videos without captions."""

    def reason(name):
        if error := packed.skipped.get(name):
            return str(error)
        files = ", ".join(f"{name}{suffix}" for suffix in (f".{language}.vtt", *SUFFIXES))
        return f"it has no captions; none of these files exists: {files}"

    return [(video, printable(reason(caption_name(video)))) for video in without]


def remove_undecodable(folder: str, pairs: dict[str, str], workers: int) -> list[tuple[str, str]]:
    """Remove the videos that cannot be decoded from the pairs. Returns (video, reason) for each."""
    with multiprocessing.pool.ThreadPool(workers) as pool:
        paths = [os.path.join(folder, video) for video in pairs.values()]
        faults = list(tqdm(pool.imap(find_fault, paths), "videos", len(paths), disable=None))
    broken = {name: fault for name, fault in zip(pairs, faults, strict=True) if fault}
    return [(pairs.pop(name), fault) for name, fault in broken.items()]


def find_fault(path: str) -> str:
    """Decode the first frame of a video. Returns the error, or "" if there is none."""
    from video_decoder import DecodeError, decode_clip

    try:
        decode_clip(path, 0, fps=5, num_frames=1, size=16)
    except DecodeError as error:
        return str(error)
    return ""


def check_vectors(options: argparse.Namespace) -> None:
    """Reject a vocabulary and vectors that a training would reject."""
    from s3dg import check_vocabulary, load_word_vectors, load_words

    check_file(options.word2vec_path, "word2vec_path")
    check_file(options.token_to_word_path, "token_to_word_path")
    with input_error("--token_to_word_path"):
        words = load_words(options.token_to_word_path)
    with input_error("--word2vec_path"):
        vectors = load_word_vectors(options.word2vec_path)
    with input_error("--token_to_word_path"):
        check_vocabulary(words, len(vectors), options.token_to_word_path)


def train_vectors(folder: Path, min_count: int) -> None:
    """Train word vectors on the captions in the folder, and write them and their vocabulary."""
    from data.word2vec.prepare import train_words, write_pair
    from s3dg import VOCABULARY_ROWS

    corpus = folder / "words"
    corpus.mkdir()
    try:
        words = train_words(folder / CAPTIONS, corpus, VOCABULARY_ROWS - 1, min_count)
    except InputError as error:
        raise InputError(f"{error}; or give --word2vec_path and --token_to_word_path") from None
    shutil.rmtree(corpus)
    with input_error("--out"):
        write_pair(folder, *words)


def training_command(options: argparse.Namespace, out: Path, num_videos: int) -> list[str]:
    """Return the command that trains on the folder, on this machine.

    A batch has at most CLIPS_PER_GPU or CLIPS_ON_CPU clips per process, and at least one. It has no
    video twice unless there are fewer videos than processes. --crop_only=0 scales pictures, as an
    unscaled crop would show only a small part of a large one.
    """
    import torch

    processes = max(1, torch.cuda.device_count())
    most = CLIPS_PER_GPU if torch.cuda.is_available() else CLIPS_ON_CPU
    batch_size = processes * max(1, min(most, num_videos // processes))
    steps = EPOCHS * num_videos // batch_size
    flags = {
        "train_csv": out / LIST,
        "video_path": options.folder,
        "caption_root": out / CAPTIONS,
        "token_to_word_path": options.token_to_word_path or out / WORDS,
        "word2vec_path": options.word2vec_path or out / VECTORS,
        "num_candidates": 4,
        "crop_only": 0,
        "batch_size": batch_size,
        "epochs": EPOCHS,
        "warmup_steps": steps // 10,
        "num_thread_reader": len(os.sched_getaffinity(0)),
        # The whole path, so as not to resume the training of another folder of the same name.
        "checkpoint_dir": str(out).strip(os.sep).replace(os.sep, "-"),
    }
    flags = [f"--{name}={value}" for name, value in flags.items()]
    return ["python", "main_distributed.py", *flags, "--resume"]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="the videos, with their captions beside them")
    add("--out", type=Path, help="a new folder (default: data/own/<name of FOLDER>)")
    add("--language", default="en", help="of the captions, if stated (default: %(default)s)")
    add("--word2vec_path", default="", help="use these word vectors instead of training them")
    add("--token_to_word_path", default="", help="the vocabulary of --word2vec_path")
    add(
        "--min_count",
        type=positive(int),
        default=1,
        help="how often a word must occur to get a vector (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if bool(options.word2vec_path) != bool(options.token_to_word_path):
        parser.error("--word2vec_path and --token_to_word_path belong together; give both")
    return options


def main(arguments: list[str] | None = None) -> None:
    prepare(parse_arguments(arguments))


if __name__ == "__main__":
    run_stoppable_script(main)
