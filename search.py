"""Search your own videos for what is done in them.

    python search.py index FOLDER --weights FILE --out INDEX
    python search.py query INDEX "cut the tomato"
    python search.py serve INDEX

`index` embeds windows of every video below FOLDER and writes one file. Run again, it embeds the
videos that are new or have changed, and removes those that are gone. `query` prints the moments
that match a text best. `serve` shows them on a page for a browser on this machine.
"""

from args import get_search_args

if __name__ == "__main__":  # --help should not wait for torch
    get_search_args(__doc__)

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout

from args import (
    check_decoder,
    check_file,
    check_output,
    check_packages,
    check_video_folder,
    clip_spec,
    file_checksum,
    files_below,
    format_flag,
    inference_model,
)
from distributed.device import pick_device
from evaluation.feature_file import checksum, difference, feature_settings
from evaluation.features import Outcome, StridedWindows, strided_features, track_progress
from retrieval_loader import RETRIEVAL_WORDS
from s3dg import Tokenizer, check_vocabulary, load_model, load_words, summarize, tokenize
from utils import (
    STOP_SIGNALS,
    InputError,
    input_error,
    log,
    one_line,
    printable,
    run_script,
    setup_logging,
)
from video_decoder import EXTENSIONS, locate, video_exists
from video_search.index import (
    Embed,
    EmbeddedText,
    Index,
    IndexMetadata,
    Moment,
    Video,
    best_moments,
    explain_no_moments,
    format_scores,
    format_timestamp,
    read_index,
    write_index,
)

SAVE_EVERY = 300  # seconds of indexing that a crash may cost...
SAVE_FRACTION = 0.05  # ...or more, if the file is large: at most this part of the time is writing
MAX_TEXT_LENGTH = 1000  # characters


# --- index --------------------------------------------------------------------------------------


class FileStatus(NamedTuple):
    """The size and time of a file. If either differs, the video has changed.

    For a video in a tar file, the time is that of the tar file.
    """

    size: int  # bytes
    mtime_ns: int


class Plan(NamedTuple):
    """The difference between an index and its folder."""

    kept: dict[str, Video]  # by path below the folder
    to_do: dict[str, FileStatus]  # videos to embed
    outdated: bool  # whether to write the file even if there is nothing to embed


def index_videos(options: argparse.Namespace) -> None:
    """Bring the index up to date with the folder, see the module's docstring."""
    setup_logging(True)
    with input_error("--device, --gpu"):
        device = pick_device(options.device, options.gpu)
    check_output(options.out, "out")
    check_decoder(options)
    clip = clip_spec(options)
    windows = StridedWindows(clip, options.stride or clip.seconds / 2)
    weights = file_checksum(options.weights, "weights")
    settings = feature_settings(weights, amp=options.amp, weights_key="weights", **windows.settings)
    vocabulary = options.token_to_word_path
    with input_error("--token_to_word_path"):
        words = load_words(vocabulary)
        settings["token_to_word_path"] = checksum(vocabulary)
    folder, *files = map(os.path.abspath, (options.folder, options.weights, vocabulary))
    metadata = IndexMetadata(folder, settings, *files)
    failed = 0
    with lock_index(options.out):
        plan = make_plan(options, metadata)
        if plan.to_do:
            model = inference_model(options, device, weights="weights")
            with input_error("--token_to_word_path"):
                rows = model.text_module.word_embd.num_embeddings
                check_vocabulary(words, rows, vocabulary)
            outcomes = strided_features(
                model,
                [Path(options.folder, path) for path in plan.to_do],
                device,
                windows,
                batch_size=options.batch_size_val,
                workers=options.num_thread_reader,
                sample_timeout=options.sample_timeout,
            )
            failed = add_videos(options.out, metadata, plan, outcomes, model.num_classes)
        elif plan.outdated:
            with input_error("--out"):
                write_index(options.out, metadata, plan.kept.values())
    index = open_index(options.out, "out")
    log.info("%s: %d windows, %d videos", options.out, len(index.starts), len(index.videos))
    if failed:
        log.error("videos that could not be used: %d of %d", failed, len(plan.to_do))
        sys.exit(1)


def open_index(path: str, flag: str = "INDEX") -> Index:
    """Read the index that a flag names."""
    check_file(path, flag)
    with input_error(format_flag(flag)):
        return read_index(path)


def make_plan(options: argparse.Namespace, metadata: IndexMetadata) -> Plan:
    """Compare the index with the folder."""
    present = list_videos(options.folder)
    old = open_index(options.out, "out") if os.path.lexists(options.out) else None
    before = {video.path: video for video in old.videos} if old else {}
    kept = {
        path: video
        for path, video in before.items()
        if present.get(path) == (video.size, video.mtime_ns)
        and not (video.reason and options.retry_failed)
        and not video.is_outdated
    }
    if old:
        check_same_index(options.out, old.metadata, metadata, bool(before) and not kept)
        check_mounted(options.folder, sorted(before.keys() - present))
    to_do = {path: status for path, status in present.items() if path not in kept}
    again, gone = len(to_do.keys() & before), len(before.keys() - present)
    log.info(
        "%d videos: %d up to date, %d to embed again, %d new; %d gone",
        *(len(present), len(kept), again, len(to_do) - again, gone),
    )
    if failed := sum(bool(video.reason) for video in kept.values()):
        log.info("%d of them could not be used before; --retry_failed retries them", failed)
    return Plan(kept, to_do, bool(gone) or not old or metadata != old.metadata)


def list_videos(folder: str) -> dict[str, FileStatus]:
    """List the videos below a folder, by path below it."""
    found = {}
    for path in files_below(folder, "FOLDER", EXTENSIONS):
        try:
            source = locate(os.path.join(folder, path))
        except (FileNotFoundError, ValueError):  # gone since
            continue
        except OSError as error:
            raise InputError(
                f"FOLDER: {printable(path)} cannot be read: {error.strerror}"
            ) from None
        found[path] = FileStatus(source.size, source.mtime_ns)
    if not found:  # a disk that is not mounted would otherwise empty the index
        raise InputError(f"FOLDER: there are no videos in {folder}; give another")
    return found


def check_mounted(folder: str, gone: list[str]) -> None:
    """Reject the removal of videos whose folder is empty or a broken link.

    The mount point of a disk that is not mounted looks like that.
    """
    for path in gone:
        place = os.path.join(folder, path)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        empty = not os.path.exists(place)
        if os.path.isdir(place):
            with os.scandir(place) as entries:
                empty = not any(entries)
        if empty:
            raise InputError(
                f"FOLDER: {printable(place)} is empty, but the index has videos of it; mount its "
                "disk, or delete it to drop them from the index"
            )


def check_same_index(
    path: str, made: IndexMetadata, metadata: IndexMetadata, nothing_kept: bool
) -> None:
    """Reject an index of other settings or of another folder."""
    fix = "give another file to keep both, or delete it"
    if differ := difference(made.settings, metadata.settings):
        raise InputError(f"--out: {path} was made with {differ}; {fix}")
    exists = os.path.exists(made.folder)
    if exists and os.path.realpath(made.folder) == os.path.realpath(metadata.folder):
        return
    if exists or nothing_kept:
        raise InputError(f"--out: {path} indexes the videos in {made.folder}; {fix}")


@contextlib.contextmanager
def lock_index(path: str) -> Iterator[None]:
    """Allow one process at a time to bring an index up to date."""
    lock = FileLock(f"{os.path.realpath(path)}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"--out: {path} is being written by another process; wait for it"
        ) from None
    except OSError as error:
        raise InputError(f"--out: cannot lock {lock.lock_file}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock.lock_file)  # while locked: a process that has it open sees it is gone
        lock.release()


def add_videos(
    path: str, metadata: IndexMetadata, plan: Plan, outcomes: Iterator[Outcome], dim: int
) -> int:
    """Add videos as they are embedded. Returns how many could not be used.

    The index is written every SAVE_EVERY seconds or less often, and at the end, even after an
    error.
    """
    videos, to_do = dict(plan.kept), list(plan.to_do)
    failed, written, pause = 0, time.monotonic(), SAVE_EVERY

    def save():
        nonlocal written, pause
        began = time.monotonic()
        with input_error("--out"):
            write_index(path, metadata, videos.values())
        # Replace the tensors by those of the file, which are memory-mapped.
        videos.update((video.path, video) for video in open_index(path, "out").videos)
        written = time.monotonic()
        pause = max(SAVE_EVERY, (written - began) / SAVE_FRACTION)

    try:
        with contextlib.closing(outcomes):
            for outcome in track_progress(outcomes, len(to_do)):
                name = to_do[outcome.index]
                videos[name] = video = make_video(name, plan.to_do[name], outcome, dim)
                if video.reason:
                    failed += 1
                    log.warning("not indexed: %s", video.reason)
                if time.monotonic() > written + pause:
                    save()
    except KeyboardInterrupt:
        log.info("stopped; the same command resumes")
        raise
    finally:
        save()
    return failed


def make_video(path: str, status: FileStatus, outcome: Outcome, dim: int) -> Video:
    """Make an entry of the index. Black windows are skipped: some texts would match them."""
    if outcome.error:
        empty = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dim)
        return Video(path, *status, one_line(outcome.error), *empty)
    found = outcome.found
    visible = torch.ones(len(found.starts), dtype=torch.bool)
    visible[found.black] = False
    starts = torch.tensor(found.starts, dtype=torch.float64)
    ends = torch.tensor(found.ends, dtype=torch.float64)
    features = torch.from_numpy(found.features)
    return Video(path, *status, "", starts[visible], features[visible], ends[visible])


# --- query and serve ----------------------------------------------------------------------------


def load_embedder(options: argparse.Namespace, metadata: IndexMetadata) -> Embed:
    """Load the function that embeds a text with the weights of the index.

    Its files are those of the flags or, by default, of the index. The function raises InputError
    for a text that cannot be searched for.
    """
    weights = options.weights or metadata.weights
    vocabulary = options.token_to_word_path or metadata.words
    for flag, path in (("weights", weights), ("token_to_word_path", vocabulary)):
        check_file(path, flag)
        with input_error(f"--{flag}"):
            same = checksum(path) == metadata.settings[flag]
        if not same:
            raise InputError(
                f"--{flag}: {path} is not the file that {options.index} was made with; give that, "
                "or index the videos again with this one"
            )
    with input_error("--weights"):
        network = load_model(weights).text_module  # the video network is not needed
    with input_error("--token_to_word_path"):
        tokenizer = Tokenizer(load_words(vocabulary), RETRIEVAL_WORDS)

    @torch.inference_mode()
    def embed(text):
        if len(text) > MAX_TEXT_LENGTH:
            raise InputError(f"the text has more than {MAX_TEXT_LENGTH} characters; shorten it")
        words = tokenize(text, tokenizer.index)
        unknown = list(dict.fromkeys(word for word in words if word not in tokenizer.index))
        if not words:
            raise InputError("there is no word in the text; describe what is to be seen")
        if len(unknown) == len(set(words)):
            raise InputError(
                f"none of the words is in the vocabulary ({summarize(unknown, 10)}); use others"
            )
        notes = []
        if unknown:
            notes.append(f"not in the vocabulary, ignored: {summarize(unknown, 10)}")
        if sum(word in tokenizer.index for word in words) > RETRIEVAL_WORDS:
            notes.append(f"only the first {RETRIEVAL_WORDS} words count")
        return EmbeddedText(network(tokenizer(text)[None])[0], notes)

    return embed


def query(options: argparse.Namespace) -> None:
    """Print the best moments: score, from-to, file; or as JSON."""
    index = open_index(options.index)
    folder = video_folder(options, index.metadata)
    text = " ".join(options.text)
    vector, notes = load_embedder(options, index.metadata)(text)
    moments = best_moments(index, vector, options.top)
    warn_if_missing(folder, {index.videos[moment.video].path for moment in moments})
    if options.json:
        lines = [json.dumps(moments_to_json(text, notes, index, moments, folder), indent=2)]
    else:
        lines = [*notes, *list_moments(index, moments, folder)]
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def list_moments(index: Index, moments: list[Moment], folder: str) -> list[str]:
    """Format moments as the lines of a table, or explain that there are none."""
    if not moments:
        return [f"no moments found: {explain_no_moments(index)}"]
    scores = format_scores([moment.score for moment in moments])
    width = max(map(len, scores))
    lines = []
    for score, moment in zip(scores, moments, strict=True):
        path = os.path.join(folder, index.videos[moment.video].path)
        start, end = int(moment.start), math.ceil(moment.end)
        times = f"{format_timestamp(start)}-{format_timestamp(end)}"
        lines.append(f"{score:>{width}}  {times:>15}  {one_line(path)}")
    return lines


def moments_to_json(
    text: str, notes: list[str], index: Index, moments: list[Moment], folder: str
) -> dict:
    """Convert the result of a query to the JSON object that docs/search.md describes."""
    return {
        "text": text,
        "notes": notes if moments else [*notes, explain_no_moments(index)],
        "moments": [
            {
                "score": moment.score,
                "start": moment.start,
                "end": moment.end,
                "path": os.path.join(folder, index.videos[moment.video].path),
            }
            for moment in moments
        ],
    }


def video_folder(options: argparse.Namespace, metadata: IndexMetadata) -> str:
    """Return the folder of the videos: --video_path, by default that of the index."""
    if options.video_path:
        check_video_folder(options.video_path, "video_path")
    return os.path.abspath(options.video_path or metadata.folder)


def warn_if_missing(folder: str, paths: set[str]) -> None:
    """Warn on stderr if videos that are about to be listed are not where the index has them."""
    missing = sum(not video_exists(os.path.join(folder, path)) for path in paths)
    if not missing:
        return
    if os.path.exists(folder):
        problem = f"{missing} of {len(paths)} listed videos cannot be found in {printable(folder)}"
    else:
        problem = f"there is no folder {printable(folder)}, where the videos were indexed"
    print(f"warning: {problem}; give its present location with --video_path", file=sys.stderr)


def serve(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    check_packages("search.py serve", "flask", "waitress")
    from video_search.server import create_server

    index = open_index(options.index)
    folder = options.video_path or index.metadata.folder
    check_video_folder(folder, "video_path")
    embed = load_embedder(options, index.metadata)
    with input_error("--host, --port"):
        server = create_server(index, embed, folder, options.host, options.port)
    server.run()


def main(argv: list[str] | None = None) -> None:
    # A file's name may have bytes, and a terminal may lack letters, that cannot be printed.
    sys.stdout.reconfigure(errors="backslashreplace")
    options = get_search_args(__doc__, argv)
    {"index": index_videos, "query": query, "serve": serve}[options.command](options)


if __name__ == "__main__":
    for number in STOP_SIGNALS:  # stop as at Ctrl-C
        signal.signal(number, signal.default_int_handler)
    run_script(main)
