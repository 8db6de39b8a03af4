"""Search one's own videos by what is done in them.

    python search.py index FOLDER --weights FILE --out INDEX
    python search.py query INDEX "cut the tomato"
    python search.py serve INDEX

`index` embeds windows all along every video below FOLDER, and writes one file. Started again, it
embeds the videos that are new or have changed, and takes out those that are gone. `query` prints
the moments that fit a text best. `serve` shows them on a page for a browser on this machine.
"""

import argparse
import contextlib
import fcntl
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from args import (
    Parser,
    add_clip_flags,
    add_inference_flags,
    check_decoder,
    normalize_flags,
    not_negative,
    positive,
)
from distributed.device import pick_device
from evaluation.feature_file import checksum, difference, feature_settings
from evaluation.features import inference_model, strided_features, with_progress
from retrieval_loader import RETRIEVAL_WORDS
from s3dg import Tokenizer, load_model, summarize, tokenize
from utils import (
    STOP_SIGNALS,
    InputError,
    check_folder,
    check_output,
    check_words_fit,
    files_below,
    input_error,
    log,
    one_line,
    printable,
    read_words,
    run_script,
    setup_logging,
)
from video_decoder import EXTENSIONS
from video_search.index import (
    IndexMetadata,
    Video,
    best_moments,
    format_timestamp,
    read_index,
    write_index,
)
from video_search.server import serve_index

SAVE_EVERY = 300  # seconds of indexing that a crash may cost...
SAVE_SHARE = 0.05  # ...or more, where the file is large: at most this part of the time is writing
LONGEST_TEXT = 1000  # characters


# --- index --------------------------------------------------------------------------------------


def index_videos(options):
    """Brings the index up to date with the folder; see the top of this file."""
    setup_logging(True)
    with input_error("--device, --gpu"):
        device = pick_device(options.device, options.gpu)
    check_output(options.out, "out")
    check_decoder(options)
    options.stride = options.stride or options.num_frames / options.fps / 2
    settings = feature_settings(options, ("fps", "stride"), weights="weights")
    words = read_words(options)
    settings["token_to_word_path"] = checksum(options.token_to_word_path, "token_to_word_path")
    about = IndexMetadata(
        os.path.abspath(options.folder),
        settings,
        os.path.abspath(options.weights),
        os.path.abspath(options.token_to_word_path),
    )
    with only_writer(options.out):
        videos, to_do, outdated = plan(options, about)
        failed = 0
        if to_do:
            model = inference_model(options, device, weights="weights")
            rows = model.text_module.word_embd.num_embeddings
            check_words_fit(words, rows, options.token_to_word_path)
            failed = add_videos(options, about, videos, to_do, model, device)
        elif outdated:
            write_index(options.out, about, videos.values())
    index = read_index(options.out, "out")
    log.info("%s has %d windows of %d videos", options.out, len(index.starts), len(index.videos))
    if failed:
        log.error("%d videos could not be used", failed)
        sys.exit(1)


def plan(options, about):
    """The indexed videos that stay, by path; those to embed, as videos_there_are has them; and
    whether the file is out of date even if there are none.
    """
    listed = videos_there_are(options.folder)
    old = read_index(options.out, "out") if os.path.lexists(options.out) else None
    before = {video.path: video for video in old.videos} if old else {}
    videos = {
        path: video
        for path, video in before.items()
        if listed.get(path) == (video.size, video.mtime_ns)
        and not (video.reason and options.retry_failed)
    }
    if old:
        check_continues(options.out, old.about, about, bool(before) and not videos)
        check_gone(options.folder, sorted(before.keys() - listed))
    to_do = {path: status for path, status in listed.items() if path not in videos}
    again, gone = len(to_do.keys() & before), len(before.keys() - listed)
    log.info(
        "%d videos: %d are done, %d to do again, %d are new; %d are gone",
        *(len(listed), len(videos), again, len(to_do) - again, gone),
    )
    failed = sum(bool(video.reason) for video in videos.values())
    if failed:
        log.info("%d could not be used before: --retry_failed tries them again", failed)
    return videos, to_do, bool(gone) or not old or about != old.about


def videos_there_are(folder):
    """The videos below a folder: {path below it: (bytes, time of change in nanoseconds)}."""
    found = {}
    for path in files_below(folder, "FOLDER", EXTENSIONS):
        try:
            status = os.stat(os.path.join(folder, path))
        except FileNotFoundError:  # gone since
            continue
        except OSError as error:
            raise InputError(
                f"FOLDER: {printable(path)} cannot be read: {error.strerror}"
            ) from None
        found[path] = status.st_size, status.st_mtime_ns
    if not found:  # a disk that is not mounted must not empty an index
        raise InputError(f"FOLDER: there are no videos in {folder}: give another")
    return found


def check_gone(folder, gone):
    """Refuses to take out videos of which an empty folder or a link to nothing is left: that is
    how a disk looks that is not mounted.
    """
    for path in gone:
        place = os.path.join(folder, path)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        nothing = not os.path.exists(place)
        if os.path.isdir(place):
            with os.scandir(place) as entries:
                nothing = not any(entries)
        if nothing:
            raise InputError(
                f"FOLDER: nothing is in {printable(place)}, but the index has videos of it: mount "
                "its disk, or, to take them out, remove it"
            )


def check_continues(path, made, about, nothing_kept):
    """Refuses to bring an index up to date with other settings, or with another folder."""
    mend = "name another file to keep both, or delete it"
    if differ := difference(made.settings, about.settings):
        raise InputError(f"--out: {path} was made with {differ}: {mend}")
    there = os.path.isdir(made.folder)
    if there and os.path.realpath(made.folder) == os.path.realpath(about.folder):
        return
    if there or nothing_kept:
        raise InputError(f"--out: {path} is of the videos in {made.folder}: {mend}")


@contextlib.contextmanager
def only_writer(path):
    """Refuses to bring an index up to date while another process does, on this machine."""
    lock = f"{os.path.realpath(path)}.lock"
    try:
        file = open(lock, "a")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"--out: cannot write {lock}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                raise BlockingIOError  # it was removed, and another process may have a new one
        except (BlockingIOError, FileNotFoundError):
            raise InputError(
                f"--out: {path} is being written by another process: wait for it"
            ) from None
        except OSError as error:
            log.warning("two processes must not write %s: %s", path, error.strerror)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(lock)


def add_videos(options, about, videos, to_do, model, device):
    """Embeds videos and writes the index now and then, and at the end however that comes.

    videos: those that stay, by path, which the others are added to. Returns how many failed.
    """
    paths, failed, written, pause = list(to_do), 0, time.monotonic(), SAVE_EVERY

    def save():
        nonlocal written, pause
        began = time.monotonic()
        write_index(options.out, about, videos.values())
        # As they are in the file: they need no memory.
        videos.update((video.path, video) for video in read_index(options.out, "out").videos)
        written = time.monotonic()
        pause = max(SAVE_EVERY, (written - began) / SAVE_SHARE)

    outcomes = strided_features(
        model,
        [Path(options.folder, path) for path in paths],
        device,
        num_frames=options.num_frames,
        size=options.video_size,
        fps=options.fps,
        stride=options.stride,
        batch_size=options.batch_size_val,
        workers=options.num_thread_reader,
        sample_timeout=options.sample_timeout,
        decoder=options.decoder,
    )
    try:
        with contextlib.closing(outcomes):
            for number, found in with_progress(outcomes, len(paths)):
                path = paths[number]
                videos[path] = video = indexed(path, *to_do[path], found, model.num_classes)
                if video.reason:
                    failed += 1
                    log.warning("not indexed: %s", video.reason)
                if time.monotonic() > written + pause:
                    save()
    except KeyboardInterrupt:
        log.info("stopped: the same command goes on from here")
        raise
    finally:
        save()
    return failed


def indexed(path, size, mtime_ns, found, dim):
    """The Video of an outcome of strided_features. Its black windows, which show nothing, are left
    out: their embedding would be found for whatever text comes near it.
    """
    if isinstance(found, str):
        empty = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dim)
        return Video(path, size, mtime_ns, one_line(found), *empty)
    seen = torch.ones(len(found.starts), dtype=torch.bool)
    seen[found.black] = False
    starts = torch.tensor(found.starts, dtype=torch.float64)
    return Video(path, size, mtime_ns, "", starts[seen], torch.from_numpy(found.features)[seen])


# --- query and serve ----------------------------------------------------------------------------


def text_embedder(options, about):
    """A function from a text to its embedding, float32 [D], and what is to be said about the text.

    It raises InputError for a text that there is nothing to be found by.
    """
    for flag, path in (("weights", about.weights), ("token_to_word_path", about.words)):
        if not getattr(options, flag):
            setattr(options, flag, path)
        if checksum(getattr(options, flag), flag) != about.settings[flag]:
            raise InputError(
                f"--{flag}: {getattr(options, flag)} is not the file that {options.index} was made "
                "with: give that, or index the videos again with this one"
            )
    with input_error("--weights"):
        tower = load_model(options.weights).text_module
    tokenizer = Tokenizer(read_words(options), RETRIEVAL_WORDS)

    @torch.inference_mode()
    def embed(text):
        if len(text) > LONGEST_TEXT:
            raise InputError(f"the text has more than {LONGEST_TEXT} characters: shorten it")
        words = tokenize(text)
        unknown = list(dict.fromkeys(word for word in words if word not in tokenizer.index))
        if not words:
            raise InputError("there is no word in the text: say what is to be seen")
        if len(unknown) == len(set(words)):
            raise InputError(
                f"none of the words is in the word list ({summarize(unknown, 10)}): use others"
            )
        notes = []
        if unknown:
            notes.append(f"not in the word list, ignored: {summarize(unknown, 10)}")
        if sum(word in tokenizer.index for word in words) > RETRIEVAL_WORDS:
            notes.append(f"only the first {RETRIEVAL_WORDS} words count")
        return tower(tokenizer(text)[None])[0], notes

    return embed


def query(options):
    """Prints the best moments: score, from-to, file."""
    index = read_index(options.index)
    vector, notes = text_embedder(options, index.about)(options.text)
    moments = best_moments(index, vector, options.top)
    try:
        for note in notes:
            print(note)
        if not moments:
            print(f"there are no moments in {options.index}")
        for found in moments:
            path = os.path.join(index.about.folder, index.videos[found.video].path)
            times = f"{format_timestamp(int(found.start))}-{format_timestamp(math.ceil(found.end))}"
            print(f"{found.score:8.3f}  {times:>15}  {one_line(path)}")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve(options):
    """Shows the page until it is stopped."""
    index = read_index(options.index)
    folder = options.video_path or index.about.folder
    check_folder(folder, "video_path")
    serve_index(index, text_embedder(options, index.about), folder, options.host, options.port)


# --- command line -------------------------------------------------------------------------------


def port(text):
    """An argparse type: a TCP port, 0 for any that is free."""
    number = not_negative(int)(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is above 65535")
    return number


def parse_arguments(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="index|query|serve")

    def command(name, run, help):
        made = commands.add_parser(
            name,
            help=help,
            description=help,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    index = command("index", index_videos, "write an index of videos, or bring it up to date")
    add = index.add_argument
    add("folder", metavar="FOLDER", help="the videos, in folders of any depth")
    add("--weights", required=True, help="a checkpoint or the released weights")
    add("--token_to_word_path", default="data/dict.npy", help="word list of the weights")
    add("--out", required=True, help="the index")
    add(
        "--stride",
        type=positive(float),
        default=None,
        help="seconds from a window's start to the next one's (default: half a window's length)",
    )
    add("--retry_failed", action="store_true", help="try again what could not be used before")
    add_clip_flags(add)
    add_inference_flags(add)
    index.set_defaults(num_thread_reader=len(os.sched_getaffinity(0)))

    for name, run, help in (
        ("query", query, "print the moments that fit a text best"),
        ("serve", serve, "search on a page, in a browser"),
    ):
        add = command(name, run, help).add_argument
        add("index", metavar="INDEX", help="what `search.py index` wrote")
        add("--weights", default="", help="where they are now (default: where the index says)")
        add("--token_to_word_path", default="", help="the word list, likewise")
        if run is query:
            add("text", metavar="TEXT", help="what is to be seen")
            add("--top", type=positive(int), default=10, help="moments")
        else:
            add("--video_path", default="", help="the folder, likewise")
            add("--host", default="127.0.0.1", help="address to listen at")
            add("--port", type=port, default=8000, help="port to listen at; 0: any that is free")
    return parser.parse_args(normalize_flags(argv))


def main(argv=None):
    # A file's name may have bytes, and a terminal may lack letters, that cannot be printed.
    sys.stdout.reconfigure(errors="backslashreplace")
    options = parse_arguments(argv)
    options.run(options)


if __name__ == "__main__":
    for number in STOP_SIGNALS:  # stop as at Ctrl-C
        signal.signal(number, signal.default_int_handler)
    try:
        run_script(main)
    except KeyboardInterrupt:
        sys.exit(130)
