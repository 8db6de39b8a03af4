"""Prepare word vectors for training: a vocabulary, dict.npy, and its vectors, word2vec.pth.

    python data/word2vec/prepare.py --zip word2vec.zip
    python data/word2vec/prepare.py --vectors FILE --caption_root CAPTIONS
    python data/word2vec/prepare.py --vectors FILE --vocabulary WORDS
    python data/word2vec/prepare.py --train --caption_root CAPTIONS
    python data/word2vec/prepare.py --check

--zip extracts the pair that the HowTo100M authors publish, which may also be unzipped into --out.
--vectors selects words from a file in word2vec's format, text or binary, also gzipped, such as
GoogleNews-vectors-negative300.bin.gz. The words are those of a list (a text file with one word per
line, or a .npy vocabulary), or the --num_words most frequent ones of the captions (a caption store,
or any source that data/howto100m/prepare.py packs into one). Sentences are lower-cased before words
are looked up, so a word gets the vector of the entry without capitals or, if there is none, of the
first entry that differs only in capitals. Words without a vector are skipped. --train trains
vectors on the captions instead (skip-gram; a video's captions, in order, are one text). --check
only checks that the two files in --out fit together. An existing pair is never overwritten: weights
are of no use without their vocabulary.
"""

import argparse
import codecs
import contextlib
import gzip
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, check_file, make_folder, positive


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--zip", help="the released archive of the two files")
    sources.add_argument("--vectors", help="a file of vectors in word2vec's format")
    sources.add_argument("--train", action="store_true", help="train vectors on --caption_root")
    sources.add_argument("--check", action="store_true", help="check the pair in --out")
    parser.add_argument("--vocabulary", help="the words, for --vectors: a list, .txt or .npy")
    parser.add_argument(
        "--caption_root", help="captions, for --vectors or --train: folder, store or file"
    )
    parser.add_argument(
        "--language", default="en", help="of the captions, if stated (default %(default)s)"
    )
    parser.add_argument(
        "--num_words",
        type=positive(int),
        default=66249,  # s3dg.VOCABULARY_ROWS - 1; s3dg would import torch
        help="largest vocabulary from captions (default %(default)s, as in the release)",
    )
    parser.add_argument(
        "--min_count",
        type=positive(int),
        default=5,
        help="how often a word of --caption_root must occur (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (default data)")
    args = parser.parse_args(argv)
    if args.vectors and bool(args.vocabulary) == bool(args.caption_root):
        parser.error("--vectors needs either --vocabulary or --caption_root: give one of them")
    if args.train and not args.caption_root:
        parser.error("--train needs --caption_root: give the captions")
    return args


if __name__ == "__main__":  # before torch is imported, so that --help is fast
    parse_arguments()

import numpy as np
import torch
from tqdm import tqdm

from captions.readers import CaptionError
from captions.sources import OtherLanguage, iter_captions
from s3dg import (
    WORD_DIM,
    check_vocabulary,
    load_word_vectors,
    load_words,
    tokenize,
)
from utils import (
    DataError,
    InputError,
    atomic_write,
    input_error,
    one_line,
    plural,
    run_stoppable_script,
    shorten,
)

WORDS, VECTORS = "dict.npy", "word2vec.pth"
READ_SIZE = 1 << 20  # bytes read at a time
LONGEST_ENTRY = 1 << 16  # bytes; a longer one is not in the format
LONGEST_WORD = 100  # characters; in a numpy array, every word takes the space of the longest
NOT_FOUND, OTHER_CASE, EXACT = range(3)


# ---- the vocabulary ------------------------------------------------------------------------------


def find_words(entries: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the distinct words among these that the tokenizer can find, and notes on the rest."""
    entries = [entry.strip().lower() for entry in entries]
    words = [word for word in dict.fromkeys(entries) if word]
    good = [word for word in words if tokenize(word) == [word] and len(word) <= LONGEST_WORD]
    notes = []
    if duplicates := sum(map(bool, entries)) - len(words):
        notes.append(f"skipped: {plural(duplicates, 'duplicate')} after lower-casing")
    if others := len(words) - len(good):
        known = set(good)
        example = shorten(next(word for word in words if word not in known))
        notes.append(
            f"skipped: {plural(others, 'line')} without exactly one word, such as {example}"
        )
    return good, notes


def read_vocabulary(path: str) -> tuple[list[str], list[str]]:
    """Return the words of a text file or a .npy vocabulary, in their order, and notes.

    Raises DataError or OSError.
    """
    try:
        if str(path).endswith(".npy"):
            entries = load_words(path).tolist()
        else:
            entries = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:  # undecodable bytes are one
        raise DataError(path, f"is not a list of words ({one_line(error)}); give one") from None
    words, notes = find_words(entries)
    if not words:
        raise DataError(path, "has no words; give a list with one word per line")
    return words, notes


def read_source(root: str, language: str) -> Iterator:
    """Yield the outcomes of iter_captions for --caption_root."""
    with input_error("--caption_root"):
        yield from iter_captions(root, len(os.sched_getaffinity(0)), language=language)


def count_words(
    root: str, corpus: TextIO | None = None, language: str = "en"
) -> tuple[Counter, list[str]]:
    """Return how often each word occurs in the captions of --caption_root, and notes.

    Also writes each video's words to `corpus`, on a line of its own.
    """
    counts, videos, others, faults = Counter(), 0, 0, []
    for _, captions, _ in read_source(root, language):
        if isinstance(captions, OtherLanguage):
            others += 1
            continue
        if isinstance(captions, CaptionError):
            faults.append(str(captions))
            continue
        videos += 1
        words = [word for text in captions[2] for word in tokenize(text)]
        counts.update(words)
        if corpus and words:
            corpus.write(" ".join(words) + "\n")
    if not counts:
        reason = f" ({faults[0]})" if faults else ""
        raise InputError(f"--caption_root: no caption in {root} has words{reason}; give others")
    notes = [f"read the captions of {plural(videos, 'video')}, {plural(counts.total(), 'word')}"]
    if faults:
        unusable = plural(len(faults), "video")
        notes.append(f"skipped: {unusable} without usable captions ({faults[0]})")
    if others:
        notes.append(f"skipped: {plural(others, 'video')} with captions in another language")
    return counts, notes


def most_frequent(
    counts: Counter, num_words: int, min_count: int
) -> tuple[dict[str, int], list[str]]:
    """Return the num_words most frequent words, a dict from word to count, and notes."""
    often = {w: n for w, n in counts.items() if n >= min_count and len(w) <= LONGEST_WORD}
    if not often:
        times = plural(min_count, "time")
        raise InputError(f"--min_count: no word of the captions occurs {times}; lower it")
    ranked = sorted(often.items(), key=lambda item: (-item[1], item[0]))[:num_words]
    share = sum(count for _, count in ranked) / counts.total()
    return dict(ranked), [
        f"the vocabulary has {len(ranked):,} of the captions' {len(counts):,} distinct words, "
        f"{share:.2%} of all spoken words"
    ]


# ---- a file of vectors ---------------------------------------------------------------------------
#
# gensim's KeyedVectors reads these files too, but keeps whole files in memory: 474 MiB per 300,000
# words, and GoogleNews has three million. This reader keeps only the selected rows. Also, gensim
# cannot tell binary from text, and accepts infinite numbers, trailing words and text that is read
# as binary.


def select_vectors(path: str, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors of these words, float32 [words, 300], and how each word was found.

    The latter is an array of NOT_FOUND, OTHER_CASE and EXACT. Raises ValueError or OSError.
    """
    places = {word: place for place, word in enumerate(words)}
    vectors = np.zeros((len(words), WORD_DIM), np.float32)
    found = np.zeros(len(words), np.int8)
    with open_vectors(path) as file:
        count = read_header(file)
        text = is_text(file)
        entries = text_entries(file, count) if text else binary_entries(file, count)
        parse = parse_text if text else np.frombuffer
        for entry, numbers in tqdm(entries, total=count, unit="word", disable=None):
            word, kind = entry.decode("utf-8", "replace"), EXACT
            if word not in places:
                word, kind = word.lower(), OTHER_CASE
            place = places.get(word)
            if place is not None and found[place] < kind:
                vectors[place], found[place] = parse_vector(numbers, word, parse), kind
    return vectors, found


@contextlib.contextmanager
def open_vectors(path: str) -> Iterator[BinaryIO]:
    """Open a file and decompress it. Converts ValueErrors about its content to DataErrors."""
    with open(path, "rb") as file:
        magic = file.read(4)
    try:
        if magic == b"PK\x03\x04":
            raise ValueError("is a zip archive; give the file inside it")
        open_file = gzip.open if magic.startswith(b"\x1f\x8b") else open
        with open_file(path, "rb") as file:
            yield file
    except ValueError as error:
        raise DataError(path, str(error)) from None
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three on a damaged file
        raise DataError(path, f"is damaged or cut short ({error}); get it again") from None


def read_header(file: BinaryIO) -> int:
    """Read the first line, and return the number of words."""
    line = file.readline(100)
    header = re.fullmatch(rb"\s*(\d+)\s+(\d+)\s*\n", line)
    if not header:
        raise ValueError(
            f"does not start with a line `words numbers` but with {line[:40]!r}; give a file in "
            "word2vec's format"
        )
    count, width = map(int, header.groups())
    if width != WORD_DIM:
        raise ValueError(f"has vectors of {width} numbers; give a file with {WORD_DIM}")
    return count


def is_text(file: BinaryIO) -> bool:
    """Return whether the rest of the file is text. Bytes of vectors are hardly ever UTF-8."""
    head = file.peek(4096)[:4096]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def binary_entries(file: BinaryIO, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (word, the bytes of its numbers) for each of `count` entries `word 0x20 floats`."""
    size = 4 * WORD_DIM
    buffer, start = b"", 0
    for number in range(count):
        while (space := buffer.find(b" ", start)) < 0 or len(buffer) < space + 1 + size:
            if len(buffer) - start > LONGEST_ENTRY:
                raise ValueError(f"is damaged at entry {number + 1}; get it again")
            chunk = file.read(READ_SIZE)
            if not chunk:
                raise ends_early(number, count)
            buffer, start = buffer[start:] + chunk, 0
        yield buffer[start:space].lstrip(b"\n"), buffer[space + 1 : space + 1 + size]
        start = space + 1 + size
    check_end(buffer[start:] + file.read(READ_SIZE), count)


def text_entries(file: BinaryIO, count: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (word, the text of its numbers) for each of `count` lines."""
    for number in range(count):
        line = file.readline(LONGEST_ENTRY)
        if not line.endswith(b"\n") and len(line.split()) <= WORD_DIM:
            raise ends_early(number, count)
        yield line.partition(b" ")[::2]
    check_end(file.read(READ_SIZE), count)


def ends_early(number: int, count: int) -> ValueError:
    return ValueError(f"is cut short, after {number} of its {count} words; get it again")


def check_end(rest: bytes, count: int) -> None:
    if rest.strip():
        raise ValueError(f"continues after its {count} words; get it again")


def parse_text(numbers: bytes, dtype) -> np.ndarray:
    try:
        return np.array(numbers.split(), dtype=dtype)
    except ValueError:
        return np.array([])


def parse_vector(numbers: bytes, word: str, parse) -> np.ndarray:
    """Return the vector of a word, float32 [300]. parse: a function of its bytes and a type."""
    vector = parse(numbers, "<f4")
    if len(vector) != WORD_DIM or not np.isfinite(vector).all():
        raise ValueError(f"{shorten(word)} does not have {WORD_DIM} finite numbers; get it again")
    return vector


# ---- training ------------------------------------------------------------------------------------


def train(corpus: Path, counts: dict[str, int], documents: int) -> tuple[list[str], np.ndarray]:
    """Train Word2Vec on a file of one text per line. Returns words and float32 [words, 300].

    All cores update the same vectors at once, so results differ from run to run.
    """
    import gensim

    model = gensim.models.Word2Vec(
        vector_size=WORD_DIM, sg=1, min_count=1, workers=len(os.sched_getaffinity(0))
    )
    model.build_vocab_from_freq(counts, corpus_count=documents)
    model.train(
        corpus_file=str(corpus),
        total_examples=documents,
        total_words=sum(counts.values()),
        epochs=model.epochs,
    )
    return model.wv.index_to_key, model.wv.vectors


# ---- the pair ------------------------------------------------------------------------------------


def check_pair(folder: Path) -> tuple[int, list[str]]:
    """Reject a pair that training would reject. Returns its size, and notes on oddities."""
    for name in (WORDS, VECTORS):
        check_file(folder / name, "out")
    with input_error("--out"):
        words = load_words(folder / WORDS)
        vectors = load_word_vectors(folder / VECTORS)
        check_vocabulary(words, len(vectors), folder / WORDS)
        if not torch.isfinite(vectors).all():
            raise DataError(folder / VECTORS, "has numbers that are not finite; get another")
    listed, notes = set(words.tolist()), []
    if lost := len(words) - sum(tokenize(word, listed) == [word] for word in listed):
        reason = "can never be found: duplicated, or not a single word"
        notes.append(f"{plural(lost, 'word')} {reason}")
    if vectors[0].any():
        notes.append("row 0, which is for padding, is not zero")
    return len(words), notes


@contextlib.contextmanager
def new_pair(out: Path) -> Iterator[Path]:
    """Make a folder to write a pair to. Afterwards, check the pair and move it to `out`."""
    make_folder(out, "out")
    check_no_pair(out)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".word2vec.") as folder:
            folder = Path(folder)
            yield folder
            count, notes = check_pair(folder)
            check_no_pair(out)
            for name in (VECTORS, WORDS):
                os.replace(folder / name, out / name)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written to: {one_line(error)}") from None
    print_pair(out, count, notes)


def check_no_pair(out: Path) -> None:
    for name in (WORDS, VECTORS):
        if (out / name).exists():
            raise InputError(
                f"--out: {out / name} already exists, and weights may need it; give another "
                "folder, or move it away"
            )


def print_pair(out: Path, count: int, notes: list[str]) -> None:
    print(f"{out / WORDS}, {out / VECTORS}: {count} words", *notes, sep="\n")


def write_pair(folder: Path, words: list[str], vectors: np.ndarray) -> None:
    table = torch.zeros(len(words) + 1, WORD_DIM)  # row 0 is for padding
    table[1:] = torch.from_numpy(vectors)
    with atomic_write(folder / VECTORS) as file:
        torch.save(table, file)
    with atomic_write(folder / WORDS) as file:
        np.save(file, np.array(words, dtype=np.str_))


def unzip(path: str, folder: Path) -> None:
    """Extract the two files of the released archive, wherever they are in it."""
    content = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (VECTORS, WORDS):
                members = [
                    member
                    for member in archive.infolist()
                    if member.filename.split("/")[-1] == name and "__MACOSX" not in member.filename
                ]
                if len(members) != 1:
                    reason = f"has {len(members)} files {name} instead of one"
                    raise DataError(path, f"{reason}; give the released archive")
                content[name] = archive.read(members[0])
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        reason = f"is damaged, cut short or not a zip archive ({one_line(error)}); get it again"
        raise DataError(path, reason) from None
    for name, data in content.items():
        with atomic_write(folder / name) as file:
            file.write(data)


# ---- command line --------------------------------------------------------------------------------


def main(argv=None):
    args = parse_arguments(argv)
    if args.check:
        print_pair(args.out, *check_pair(args.out))
        return
    with new_pair(args.out) as folder:
        if args.zip:
            check_file(args.zip, "zip")
            with input_error("--zip"):
                unzip(args.zip, folder)
        elif args.train:
            chosen = args.num_words, args.min_count, args.language
            write_pair(folder, *train_words(args.caption_root, folder, *chosen))
        else:
            write_pair(folder, *select_words(args))


def select_words(args: argparse.Namespace) -> tuple[list[str], np.ndarray]:
    """Return the selected words of --vectors, and their vectors."""
    check_file(args.vectors, "vectors")
    with input_error("--vectors"), open_vectors(args.vectors) as file:
        read_header(file)  # before the hours of reading captions
    if args.vocabulary:
        with input_error("--vocabulary"):
            words, notes = read_vocabulary(args.vocabulary)
    else:
        counts, read = count_words(args.caption_root, language=args.language)
        frequent, notes = most_frequent(counts, args.num_words, args.min_count)
        words, notes = list(frequent), read + notes
    for note in notes:
        print(note, flush=True)
    with input_error("--vectors"):
        vectors, found = select_vectors(args.vectors, words)
        if not found.any():
            raise DataError(args.vectors, f"has none of the {len(words)} words; give others")
    exact, other, lost = ((found == kind).sum() for kind in (EXACT, OTHER_CASE, NOT_FOUND))
    print(f"{exact + other} of {len(words)} words have a vector, {other} of them in other capitals")
    if lost:
        example = words[found.argmin()]
        print(f"skipped: {plural(lost, 'word')} without a vector, such as {example}")
    return [word for word, kind in zip(words, found, strict=True) if kind], vectors[found > 0]


def train_words(
    root: str, folder: Path, num_words: int, min_count: int, language: str = "en"
) -> tuple[list[str], np.ndarray]:
    """Return the most frequent words of --caption_root, and vectors trained on its captions.

    folder: for the text, which can be large.
    """
    corpus = folder / "corpus.txt"
    with open(corpus, "w", encoding="utf-8") as file:
        counts, read = count_words(root, file, language)
    frequent, notes = most_frequent(counts, num_words, min_count)
    for note in read + notes:
        print(note, flush=True)
    if len(frequent) < 2:
        raise InputError(
            f"--caption_root: only one word occurs {plural(min_count, 'time')} or more, too few to "
            "train vectors; give more captions, or lower --min_count"
        )
    with open(corpus, encoding="utf-8") as file:
        documents = sum(1 for _ in file)
    return train(corpus, frequent, documents)


if __name__ == "__main__":
    run_stoppable_script(main)
