"""Word vectors for training: a word list, dict.npy, and its vectors, word2vec.pth.

    python data/word2vec/prepare.py --zip word2vec.zip
    python data/word2vec/prepare.py --vectors FILE --caption_root CAPTIONS
    python data/word2vec/prepare.py --vectors FILE --vocabulary WORDS
    python data/word2vec/prepare.py --train --caption_root CAPTIONS
    python data/word2vec/prepare.py --check

--zip takes the pair that the HowTo100M authors hand out, which may as well be unzipped into --out.
--vectors picks words out of a file in word2vec's format, text or binary, also gzipped, such as
GoogleNews-vectors-negative300.bin.gz: those of a list (a text file with a word on each line, or a
.npy word list) or the --num_words most frequent ones of the captions (a folder of caption files, a
caption store or the published JSON file). Sentences are lower-cased before words are looked up, so
a word takes the entry without capitals; where there is none, the first that differs from it by
capitals only. Words without a vector are left out. --train trains vectors on the captions instead
(skip-gram; a video's captions, in order, are one text). --check only looks whether the two files in
--out fit. A pair that is there is never written over: weights are of no use without the list they
go with.
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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, positive
from captions.readers import CaptionError
from captions.sources import iter_captions
from s3dg import VOCABULARY_ROWS, WORD_DIM, load_word_vectors, load_words, tokenize
from utils import (
    InputError,
    atomic_write,
    check_file,
    check_words_fit,
    make_folder,
    one_line,
    run_stoppable_script,
    shorten,
)

WORDS, VECTORS = "dict.npy", "word2vec.pth"
CHUNK = 1 << 20  # bytes read at a time
LONGEST_ENTRY = 1 << 16  # bytes: what has no end by then is not in the format
LONGEST_WORD = 100  # characters: numpy's array makes room for the longest at every word
NOT_FOUND, OTHER_CASE, EXACT = range(3)


# ---- the vocabulary ------------------------------------------------------------------------------


def choose(entries):
    """The distinct words among these that the tokenizer can find, and notes on the others."""
    entries = [entry.strip().lower() for entry in entries]
    words = [word for word in dict.fromkeys(entries) if word]
    good = [word for word in words if tokenize(word) == [word] and len(word) <= LONGEST_WORD]
    notes = []
    if twice := sum(map(bool, entries)) - len(words):
        notes.append(f"left out: {twice} words that are there twice, lower-cased")
    if other := len(words) - len(good):
        known = set(good)
        example = shorten(next(word for word in words if word not in known))
        notes.append(f"left out: {other} entries that are not a single word, such as {example}")
    return good, notes


def read_vocabulary(path):
    """The words of a list, a text file or a .npy word list, in its order; and notes."""
    check_file(path, "vocabulary")
    try:
        if str(path).endswith(".npy"):
            entries = load_words(path).tolist()
        else:
            entries = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except ValueError as error:  # undecodable bytes are one
        raise InputError(f"--vocabulary: {path} cannot be read ({one_line(error)})") from None
    words, notes = choose(entries)
    if not words:
        raise InputError(f"--vocabulary: {path} has no words in it: give one with a word a line")
    return words, notes


def count_words(root, corpus=None):
    """How often each word occurs in the captions of --caption_root: a Counter, and notes.

    Also writes each video's words to `corpus`, a file for text, on a line of its own.
    """
    counts, videos, faults = Counter(), 0, []
    for _, captions in iter_captions(root, len(os.sched_getaffinity(0))):
        if isinstance(captions, CaptionError):
            faults.append(str(captions))
            continue
        videos += 1
        found = [word for text in captions[2] for word in tokenize(text)]
        counts.update(found)
        if corpus and found:
            corpus.write(" ".join(found) + "\n")
    if not counts:
        reason = f" ({faults[0]})" if faults else ""
        raise InputError(f"--caption_root: no caption in {root} has words{reason}")
    notes = [f"read the captions of {videos} videos, {counts.total()} words"]
    if faults:
        notes.append(f"left out: {len(faults)} videos without usable captions ({faults[0]})")
    return counts, notes


def most_frequent(counts, num_words, min_count):
    """The most frequent words, at most num_words: a dict from word to count, and notes."""
    often = {w: n for w, n in counts.items() if n >= min_count and len(w) <= LONGEST_WORD}
    if not often:
        raise InputError(f"--min_count: no word of the captions occurs {min_count} times: lower it")
    ranked = sorted(often.items(), key=lambda item: (-item[1], item[0]))[:num_words]
    share = sum(count for _, count in ranked) / counts.total()
    return dict(ranked), [
        f"the vocabulary is {len(ranked)} of the captions' {len(counts)} distinct words, "
        f"{share:.2%} of what is said"
    ]


# ---- a file of vectors ---------------------------------------------------------------------------
#
# gensim's KeyedVectors reads these files too, but holds all of one: of the three million words of
# GoogleNews 3.6 GB, and another half in Python objects. Here only the chosen rows are held.


def select_vectors(path, words):
    """The vectors of these words: float32 [words, 300], and for each what was found (an array of
    NOT_FOUND, OTHER_CASE, EXACT)."""
    places = {word: place for place, word in enumerate(words)}
    vectors = np.zeros((len(words), WORD_DIM), np.float32)
    found = np.zeros(len(words), np.int8)
    with open_vectors(path) as file:
        count = read_header(file, path)
        entries, parse = (
            (text_entries, parse_text) if is_text(file) else (binary_entries, parse_binary)
        )
        entries = entries(file, count, path)
        for entry, numbers in tqdm(entries, total=count, unit="word", disable=None):
            word, kind = entry.decode("utf-8", "replace"), EXACT
            if word not in places:
                word, kind = word.lower(), OTHER_CASE
            place = places.get(word)
            if place is not None and found[place] < kind:
                vectors[place], found[place] = parse(numbers, word, path), kind
    return vectors, found


@contextlib.contextmanager
def open_vectors(path):
    """The file's content, unpacked. What cannot be read of it is an InputError."""
    check_file(path, "vectors")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
        if magic == b"PK\x03\x04":
            raise InputError(f"--vectors: {path} is a zip archive: give the file that is in it")
        packed = magic.startswith(b"\x1f\x8b")
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # gzip has three ways to say that it is cut
        raise InputError(
            f"--vectors: {path} is damaged or cut short ({error}): get it again"
        ) from None


def read_header(file, path):
    """The first line is the number of words and of each one's numbers. Returns the former."""
    line = file.readline(100)
    header = re.fullmatch(rb"\s*(\d+)\s+(\d+)\s*\n", line)
    if not header:
        raise InputError(
            f"--vectors: {path} does not start with a line `words numbers` but with "
            f"{line[:40]!r}: give a file in word2vec's format"
        )
    count, width = map(int, header.groups())
    if width != WORD_DIM:
        raise InputError(
            f"--vectors: {path} has vectors of {width} numbers: give one of {WORD_DIM}"
        )
    return count


def is_text(file):
    """Whether what follows is text: a vector's bytes are next to never UTF-8 without a NUL."""
    head = file.peek(4096)[:4096]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


def binary_entries(file, count, path):
    """Yields (word, its numbers' bytes) for each of `count` entries `word 0x20 floats`."""
    size = 4 * WORD_DIM
    buffer, start = b"", 0
    for number in range(count):
        while (space := buffer.find(b" ", start)) < 0 or len(buffer) < space + 1 + size:
            if len(buffer) - start > LONGEST_ENTRY:
                raise InputError(
                    f"--vectors: {path} is damaged at entry {number + 1}: get it again"
                )
            chunk = file.read(CHUNK)
            if not chunk:
                raise ends_early(path, number, count)
            buffer, start = buffer[start:] + chunk, 0
        yield buffer[start:space].lstrip(b"\n"), buffer[space + 1 : space + 1 + size]
        start = space + 1 + size
    refuse_more(buffer[start:] + file.read(CHUNK), count, path)


def text_entries(file, count, path):
    """Yields (word, its numbers' text) for each of `count` lines."""
    for number in range(count):
        line = file.readline(LONGEST_ENTRY)
        if not line.endswith(b"\n") and len(line.split()) <= WORD_DIM:
            raise ends_early(path, number, count)
        yield line.partition(b" ")[::2]
    refuse_more(file.read(CHUNK), count, path)


def ends_early(path, number, count):
    return InputError(
        f"--vectors: {path} is cut short, after {number} of its {count} words: get it again"
    )


def refuse_more(rest, count, path):
    if rest.strip():
        raise InputError(f"--vectors: {path} goes on after its {count} words: get it again")


def parse_binary(numbers, word, path):
    return check_vector(np.frombuffer(numbers, "<f4"), word, path)


def parse_text(numbers, word, path):
    try:
        vector = np.array(numbers.split(), dtype=np.float32)
    except ValueError:
        vector = np.array([])
    return check_vector(vector, word, path)


def check_vector(vector, word, path):
    if len(vector) != WORD_DIM or not np.isfinite(vector).all():
        raise InputError(
            f"--vectors: {path}: {shorten(word)} does not have {WORD_DIM} finite numbers"
        )
    return vector


# ---- training ------------------------------------------------------------------------------------


def train(corpus, counts, documents):
    """Word2Vec on a file of one text a line: (words, float32 [words, 300]).

    All cores work at once on the same vectors, so that no two runs give the same.
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


def check_pair(folder, flag="out"):
    """Refuses a pair that a training would; returns its size and notes on what else is odd."""
    for name in (WORDS, VECTORS):
        check_file(folder / name, flag)
    try:
        words = load_words(folder / WORDS)
        vectors = load_word_vectors(folder / VECTORS)
    except (OSError, ValueError) as error:
        raise InputError(f"--{flag}: {one_line(error)}") from None
    check_words_fit(words, len(vectors), folder / WORDS, flag)
    if not torch.isfinite(vectors).all():
        raise InputError(
            f"--{flag}: {folder / VECTORS} has numbers that are not finite: get another"
        )
    known, notes = choose(words.tolist())
    if len(known) < len(words):
        notes = [
            f"{len(words) - len(known)} words can never be found: they are there twice, or are "
            "not lower-case words"
        ]
    if vectors[0].any():
        notes.append("row 0, the padding's, is not zero")
    return len(words), notes


@contextlib.contextmanager
def new_pair(out):
    """A folder to write the pair to. It is checked, and then moved to `out`."""
    make_folder(out, "out")
    refuse_existing(out)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".word2vec.") as folder:
            folder = Path(folder)
            yield folder
            count, notes = check_pair(folder)
            refuse_existing(out)
            for name in (VECTORS, WORDS):
                os.replace(folder / name, out / name)
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written to: {one_line(error)}") from None
    print("\n".join([f"{out / WORDS}, {out / VECTORS}: {count} words", *notes]))


def refuse_existing(out):
    for name in (WORDS, VECTORS):
        if (out / name).exists():
            raise InputError(
                f"--out: {out / name} is there already, and weights may need it: name another "
                "folder, or move it away"
            )


def write_pair(folder, words, vectors):
    table = torch.zeros(len(words) + 1, WORD_DIM)  # row 0 is the padding's
    table[1:] = torch.from_numpy(vectors)
    with atomic_write(folder / VECTORS) as file:
        torch.save(table, file)
    with atomic_write(folder / WORDS) as file:
        np.save(file, np.array(words, dtype=np.str_))


def unzip(path, folder):
    """The two files of the released archive, wherever in it they are."""
    check_file(path, "zip")
    content = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (VECTORS, WORDS):
                found = [
                    member
                    for member in archive.infolist()
                    if member.filename.split("/")[-1] == name and "__MACOSX" not in member.filename
                ]
                if len(found) != 1:
                    raise InputError(f"--zip: {path} has {len(found)} files {name}: one is needed")
                content[name] = archive.read(found[0])
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InputError(
            f"--zip: {path} is damaged, cut short or not a zip archive ({one_line(error)}): get it "
            "again"
        ) from None
    for name, data in content.items():
        with atomic_write(folder / name) as file:
            file.write(data)


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--zip", help="the released archive of the two files")
    sources.add_argument("--vectors", help="a file of vectors in word2vec's format")
    sources.add_argument("--train", action="store_true", help="train vectors on --caption_root")
    sources.add_argument("--check", action="store_true", help="look at the pair in --out")
    parser.add_argument("--vocabulary", help="the words, for --vectors: a list, .txt or .npy")
    parser.add_argument(
        "--caption_root", help="captions, for --vectors or --train: folder, store or JSON file"
    )
    parser.add_argument(
        "--num_words",
        type=positive(int),
        default=VOCABULARY_ROWS - 1,
        help="most words to take from captions (default %(default)s, as the released list has)",
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


def main(argv=None):
    args = parse_arguments(argv)
    if args.check:
        count, notes = check_pair(args.out)
        print("\n".join([f"{args.out / WORDS}, {args.out / VECTORS}: {count} words", *notes]))
        return
    with new_pair(args.out) as folder:
        if args.zip:
            unzip(args.zip, folder)
        elif args.train:
            write_pair(folder, *trained(args, folder))
        else:
            write_pair(folder, *selected(args))


def selected(args):
    """The words and vectors of --vectors."""
    with open_vectors(args.vectors) as file:
        read_header(file, args.vectors)  # before the hours of reading captions
    if args.vocabulary:
        words, notes = read_vocabulary(args.vocabulary)
    else:
        counts, read = count_words(args.caption_root)
        frequent, notes = most_frequent(counts, args.num_words, args.min_count)
        words, notes = list(frequent), read + notes
    for note in notes:
        print(note, flush=True)
    vectors, found = select_vectors(args.vectors, words)
    if not found.any():
        raise InputError(
            f"--vectors: {args.vectors} has none of the {len(words)} words: give others"
        )
    exact, other, lost = ((found == kind).sum() for kind in (EXACT, OTHER_CASE, NOT_FOUND))
    print(f"{exact + other} of {len(words)} words have a vector, {other} of them in other capitals")
    if lost:
        print(f"left out: {lost} words without a vector, such as {words[found.argmin()]}")
    kept = [word for word, kind in zip(words, found, strict=True) if kind]
    return kept, vectors[found > 0]


def trained(args, folder):
    """The words and vectors of --train. The folder is for the text, which can be large."""
    corpus = folder / "corpus.txt"
    with open(corpus, "w", encoding="utf-8") as file:
        counts, read = count_words(args.caption_root, file)
    frequent, notes = most_frequent(counts, args.num_words, args.min_count)
    for note in read + notes:
        print(note, flush=True)
    with open(corpus, encoding="utf-8") as file:
        documents = sum(1 for _ in file)
    return train(corpus, frequent, documents)


if __name__ == "__main__":
    run_stoppable_script(main)
