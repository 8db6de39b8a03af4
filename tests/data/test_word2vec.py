"""data/word2vec/prepare.py: make dict.npy and word2vec.pth from word vectors or captions."""

import gzip
import importlib.util
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from gensim.models import KeyedVectors

from captions.packing import write_store
from captions.readers import read_captions
from s3dg import S3D, VOCABULARY_ROWS, load_word_vectors, load_words
from tests.helpers import ROOT, rolling_vtt, run_python, write_csv
from utils import InputError

SCRIPT = ROOT / "data" / "word2vec" / "prepare.py"
ENTRIES = ["the", "Paris", "cut", "PARIS", "New_York", "Tomato", "don't", "tomato", "日本"]
VECTORS = np.random.default_rng(0).standard_normal((len(ENTRIES), 300), dtype=np.float32)


def vector(entry):
    return VECTORS[ENTRIES.index(entry)]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_word2vec", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write ENTRIES to every kind of file."""
    folder = tmp_path_factory.mktemp("vectors")
    made = KeyedVectors(300)
    made.add_vectors(ENTRIES, VECTORS)
    made.save_word2vec_format(folder / "a.bin", binary=True)
    made.save_word2vec_format(folder / "a.txt")
    for name in ("a.bin", "a.txt"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    rows = [
        word.encode() + b" " + row.tobytes() for word, row in zip(ENTRIES, VECTORS, strict=True)
    ]
    # As the C tool writes them: a line end after each vector, a space after each number.
    (folder / "c.bin").write_bytes(b"9 300\n" + b"".join(row + b"\n" for row in rows))
    text = (folder / "a.txt").read_text().replace("\n", " \n").replace(" \n", "\n", 1)
    (folder / "c.txt").write_text(text)
    return folder


def pair(out):
    """Read the pair as training does: a dict from word to row."""
    words, vectors = load_words(out / "dict.npy"), load_word_vectors(out / "word2vec.pth")
    stored = torch.load(out / "word2vec.pth", weights_only=True)
    assert stored.dtype == torch.float32 and stored.shape == (len(words) + 1, 300)
    assert not vectors[0].any()
    return dict(zip(words.tolist(), vectors[1:].numpy(), strict=True))


def word_list(folder, *words):
    path = folder / "words.txt"
    path.write_text("".join(f"{word}\n" for word in words))
    return path


def run(prepare, *flags):
    prepare.main([str(flag) for flag in flags])


# ---- a file of vectors ---------------------------------------------------------------------------

FORMATS = ["a.bin", "a.bin.gz", "a.txt", "a.txt.gz", "c.bin", "c.txt"]


@pytest.mark.parametrize("name", FORMATS)
def test_the_words_of_a_list_get_their_vectors_in_the_order_of_the_list(
    prepare, files, name, tmp_path, capsys
):
    words = word_list(tmp_path, "tomato", "unheard", "the", "日本", "don't")
    run(prepare, "--vectors", files / name, "--vocabulary", words, "--out", tmp_path / "out")
    found = pair(tmp_path / "out")
    assert list(found) == ["tomato", "the", "日本", "don't"]
    for word, row in found.items():
        np.testing.assert_array_equal(row, vector(word))
    output = capsys.readouterr().out
    assert "4 of 5 words have a vector, 0 of them in other capitals" in output
    assert "skipped: 1 word without a vector, such as unheard" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dict.npy",
        "word2vec.pth",
    ]


@pytest.mark.parametrize("name", ["a.bin", "a.txt"])
def test_the_entry_without_capitals_is_preferred_and_then_the_first_other(
    prepare, files, name, tmp_path, capsys
):
    words = word_list(tmp_path, "tomato", "paris", "new_york")
    run(prepare, "--vectors", files / name, "--vocabulary", words, "--out", tmp_path / "out")
    found = pair(tmp_path / "out")
    for word, entry in (("tomato", "tomato"), ("paris", "Paris"), ("new_york", "New_York")):
        np.testing.assert_array_equal(found[word], vector(entry))
    assert "3 of 3 words have a vector, 2 of them in other capitals" in capsys.readouterr().out


def test_words_are_normalized_like_the_tokenizers(prepare, files, tmp_path, capsys):
    words = word_list(tmp_path, " Tomato ", "cut the", "tomato", "", "x" * 101, "CUT")
    run(prepare, "--vectors", files / "a.bin", "--vocabulary", words, "--out", tmp_path / "out")
    assert list(pair(tmp_path / "out")) == ["tomato", "cut"]
    output = capsys.readouterr().out
    assert "skipped: 1 duplicate after lower-casing" in output
    assert "skipped: 2 lines without exactly one word, such as 'cut the'" in output


def test_a_numpy_vocabulary_is_accepted(prepare, files, tmp_path):
    np.save(tmp_path / "dict.npy", np.array(["cut", "the"]))
    list_of = tmp_path / "dict.npy"
    run(prepare, "--vectors", files / "a.bin", "--vocabulary", list_of, "--out", tmp_path / "out")
    assert list(pair(tmp_path / "out")) == ["cut", "the"]


def test_the_model_loads_the_pair(prepare, files, tmp_path):
    words = word_list(tmp_path, "the", "tomato")
    run(prepare, "--vectors", files / "a.bin", "--vocabulary", words, "--out", tmp_path)
    model = S3D(word2vec_path=tmp_path / "word2vec.pth", token_to_word_path=tmp_path / "dict.npy")
    assert model.text_module.word_embd.num_embeddings == 3
    assert model.text_module(["The tomato!"], raw_text=True).shape == (1, 512)


def test_memory_does_not_grow_with_the_file(prepare, tmp_path):
    """Only the selected rows and one chunk are in memory, as GoogleNews has 3.6 GB."""
    count, row = 20_000, np.ones(300, np.float32).tobytes()
    with open(tmp_path / "big.bin", "wb") as file:
        file.write(b"%d 300\n" % count)
        file.writelines(b"word%d %b" % (i, row) for i in range(count))
    size = (tmp_path / "big.bin").stat().st_size
    tracemalloc.start()
    try:
        _, found = prepare.select_vectors(tmp_path / "big.bin", ["word3", "word19999"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.all() and size > 20 << 20 and peak < 6 << 20


# ---- captions ------------------------------------------------------------------------------------


@pytest.fixture
def captions(tmp_path):
    """Caption files: the (5), tomato (4), cut (3), zest and aroma (2), rare (1)."""
    folder = tmp_path / "captions"
    (folder / "deep").mkdir(parents=True)
    lines = ["Cut the TOMATO", "the the tomato zest", "", "cut, cut the tomato: aroma zest"]
    rows = [(i, i + 1, line) for i, line in enumerate(lines)]
    write_csv(folder / "a.csv", ("start", "end", "text"), *rows)
    write_csv(folder / "deep" / "b.csv", ("start", "end", "text"), (0, 1, "the tomato aroma rare"))
    (folder / "broken.csv").write_text("nothing,of,use\n")
    return folder


def test_the_most_frequent_words_of_captions_become_the_vocabulary(
    prepare, files, captions, tmp_path, capsys
):
    flags = [
        "--caption_root",
        captions,
        "--min_count=2",
        "--num_words=4",
        "--out",
        tmp_path / "out",
    ]
    run(prepare, "--vectors", files / "a.bin", *flags)
    assert list(pair(tmp_path / "out")) == ["the", "tomato", "cut"]  # aroma has no vector
    output = capsys.readouterr().out
    assert "read the captions of 2 videos, 17 words" in output
    assert "skipped: 1 video without usable captions" in output and "broken.csv" in output
    assert "the vocabulary has 4 of the captions' 6 distinct words" in output
    assert "skipped: 1 word without a vector, such as aroma" in output


def test_an_invalid_file_of_vectors_is_refused_before_the_captions_are_read(
    prepare, tmp_path, capsys
):
    (tmp_path / "v.txt").write_text("1 100\nword 1\n")
    for vectors, named in (("v.txt", "vectors of 100 numbers"), ("no.bin", "there is no file")):
        with pytest.raises(InputError, match=f"--vectors: .*{named}"):
            flags = ["--vectors", tmp_path / vectors, "--caption_root", tmp_path / "absent"]
            run(prepare, *flags, "--out", tmp_path / "out")


def test_the_default_size_is_that_of_the_released_vocabulary(prepare):
    args = prepare.parse_arguments(["--train", "--caption_root", "captions"])
    assert args.num_words + 1 == VOCABULARY_ROWS


def test_folder_store_and_json_file_of_captions_give_the_same_words(prepare, captions, tmp_path):
    (captions / "broken.csv").unlink()
    videos = {name: read_captions(captions / f"{name}.csv") for name in ("a", "deep/b")}
    write_store(tmp_path / "store", ((name, *found) for name, found in videos.items()))
    columns = {
        name: {"start": starts.tolist(), "end": ends.tolist(), "text": texts}
        for name, (starts, ends, texts) in videos.items()
    }
    (tmp_path / "captions.json").write_text(json.dumps(columns))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/to").symlink_to(captions)
    counts = [prepare.count_words(source) for source in (captions, tmp_path / "store")]
    counts.append(prepare.count_words(tmp_path / "captions.json"))
    counts.append(prepare.count_words(tmp_path / "linked"))
    assert counts[0][0]["the"] == 5 and counts[0][1] == ["read the captions of 2 videos, 17 words"]
    assert counts == counts[:1] * 4


def test_words_are_read_from_subtitles_in_one_language(prepare, tmp_path):
    spoken = [(0, 1, "stir it"), (1, 2, "stir it again")]
    for name, text in {"a.en": "", "b.de": " ja"}.items():
        lines = [(start, end, line + text) for start, end, line in spoken]
        (tmp_path / f"{name}.vtt").write_text(rolling_vtt(lines))
    counts, notes = prepare.count_words(tmp_path)
    assert counts == {"stir": 2, "it": 2, "again": 1}
    assert notes[1] == "skipped: 1 video with captions in another language"


def test_vectors_are_trained_on_captions(prepare, tmp_path, capsys):
    """Words that occur together get similar vectors."""
    folder, rng = tmp_path / "captions", np.random.default_rng(0)
    folder.mkdir()
    topics = [[f"{topic}{n}" for n in range(10)] for topic in ("cook", "car")]
    for n in range(60):
        rows = [(i, i + 1, " ".join(rng.choice(topics[n % 2], 8))) for i in range(25)]
        write_csv(folder / f"{n}.csv", ("start", "end", "text"), *rows)
    run(prepare, "--train", "--caption_root", folder, "--out", tmp_path / "out")
    found = pair(tmp_path / "out")
    words = [*topics[0], *topics[1]]
    assert sorted(found) == sorted(words)
    rows = torch.tensor(np.stack([found[word] for word in words]))
    rows = torch.nn.functional.normalize(rows)
    alike = rows @ rows.T
    assert alike[:10, :10].mean() > alike[:10, 10:].mean() + 0.1
    assert "20 of the captions' 20 distinct words, 100.00%" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dict.npy",
        "word2vec.pth",
    ]


def test_one_word_is_too_few_to_train(prepare, tmp_path):
    (tmp_path / "captions").mkdir()
    write_csv(tmp_path / "captions/a.csv", ("start", "end", "text"), (0, 1, "stir stir stir"))
    flags = ["--train", "--caption_root", tmp_path / "captions", "--out", tmp_path / "out"]
    with pytest.raises(InputError, match="--caption_root: only one word occurs 1 time or more"):
        run(prepare, *flags, "--min_count", 1)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("source", ["--train", "--vectors"])
def test_captions_without_words_are_refused(prepare, files, source, captions, tmp_path):
    source = ["--train"] if source == "--train" else ["--vectors", files / "a.bin"]
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"--caption_root: .*empty: has no caption file"):
        run(prepare, *source, "--caption_root", tmp_path / "empty", *out)
    write_csv(tmp_path / "empty/a.csv", ("start", "end", "text"), (0, 1, ""), (1, 2, "..."))
    with pytest.raises(InputError, match=r"--caption_root: no caption in .* has words"):
        run(prepare, *source, "--caption_root", tmp_path / "empty", *out)
    with pytest.raises(InputError, match=r"--caption_root: .*absent: is not an existing"):
        run(prepare, *source, "--caption_root", tmp_path / "absent", *out)
    with pytest.raises(InputError, match=r"--min_count: no word .* 9 times"):
        run(prepare, *source, "--caption_root", captions, "--min_count", 9, *out)
    assert list((tmp_path / "out").iterdir()) == []


# ---- invalid files -------------------------------------------------------------------------------


def select(prepare, path, content, *words):
    path.write_bytes(content)
    words = word_list(path.parent, *(words or ["the", "tomato"]))
    out = path.parent / "out"
    with pytest.raises(InputError) as caught:
        run(prepare, "--vectors", path, "--vocabulary", words, "--out", out)
    assert list(out.iterdir()) == []  # not even half a pair
    message = str(caught.value)
    assert message.startswith(f"--vectors: {path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_a_truncated_file_is_refused_wherever_it_is_cut(prepare, files, name, tmp_path):
    content = (files / name).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        message = select(prepare, tmp_path / name, content[: int(share * len(content))])
        assert "cut short" in message, message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "does not start with a line"),
        (b"the 0.1 0.2\ncut 0.3 0.4\n", "does not start with a line `words numbers`"),
        (b"\x80\x04\x95\xff\xff" * 50, "does not start with a line"),
        (b"2 200\nthe " + b"0.1 " * 200 + b"\n", "vectors of 200 numbers; give a file with 300"),
        (b"1 300\nthe " + b"0.1 " * 299 + b"\n", "'the' does not have 300"),
        (b"1 300\nthe " + b"0.1 " * 299 + b"x\n", "'the' does not have 300"),
        (b"1 300\nthe " + b"0.1 " * 299 + b"nan\n", "'the' does not have 300 finite"),
        (b"1 300\nthe " + np.full(300, np.inf, "f4").tobytes(), "'the' does not have 300 finite"),
        (b"1 300\nthe " + b"0.1 " * 300 + b"\ncut " + b"0.1 " * 300, "continues after its 1 words"),
        (b"2 300\n" + b"\xff" * 100_000, "damaged at entry 1"),
        (b"0 300\n", "has none of the 2 words"),
        (b"1 300\nother " + b"0.1 " * 300 + b"\n", "has none of the 2 words"),
        (b"PK\x03\x04" + b"\0" * 50, "is a zip archive; give the file inside it"),
        (b"\x1f\x8b" + b"\0" * 50, "damaged"),
    ],
)
def test_a_file_in_another_format_is_refused(prepare, content, complaint, tmp_path):
    assert complaint in select(prepare, tmp_path / "v.bin", content)


def test_a_damaged_gzip_file_is_refused(prepare, files, tmp_path):
    content = bytearray((files / "a.bin.gz").read_bytes())
    content[-6] ^= 1  # of its sum
    assert "damaged" in select(prepare, tmp_path / "v.bin.gz", bytes(content))


def test_entries_that_are_not_utf_8_are_skipped(prepare, files, tmp_path):
    content = (files / "a.bin").read_bytes().replace("日本 ".encode(), b"\xff\xfe ")
    (tmp_path / "v.bin").write_bytes(content)
    words = word_list(tmp_path, "cut", "日本")
    run(prepare, "--vectors", tmp_path / "v.bin", "--vocabulary", words, "--out", tmp_path)
    assert list(pair(tmp_path)) == ["cut"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("w.txt", b"", "no words"),
        ("w.txt", b"cut the\n\n", "no words"),
        ("w.txt", b"caf\xe9\n", "is not a list of words"),
        ("w.npy", b"no list", "is not a list of words"),
        ("absent/w.txt", None, "No such file"),
    ],
)
def test_unusable_vocabularies_are_refused(prepare, files, name, content, complaint, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"^--vocabulary: .*{complaint}"):
        run(prepare, "--vectors", files / "a.bin", "--vocabulary", path, "--out", tmp_path)


# ---- the released pair ---------------------------------------------------------------------------


def released(folder, words=("the", "cut"), rows=3, name=lambda file: f"word2vec/{file}"):
    """Make an archive like the published one."""
    np.save(folder / "dict.npy", np.array(words))
    table = torch.arange(rows * 300.0).reshape(rows, 300) - torch.arange(300.0)
    table[0] = 0
    torch.save(table, folder / "word2vec.pth")
    with zipfile.ZipFile(folder / "word2vec.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word2vec/readme", "hello")
        archive.writestr("__MACOSX/word2vec/dict.npy", "x")
        for file in ("dict.npy", "word2vec.pth"):
            archive.write(folder / file, name(file))
    return folder / "word2vec.zip"


@pytest.mark.parametrize("name", [str, "word2vec/{}".format, "../../{}".format], ids=range(3))
def test_the_two_files_of_the_released_archive_are_extracted_unchanged(
    prepare, name, tmp_path, capsys
):
    path = released(tmp_path, name=name)
    run(prepare, "--zip", path, "--out", tmp_path / "deep" / "out")
    for file in ("dict.npy", "word2vec.pth"):
        assert (tmp_path / "deep" / "out" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert "word2vec.pth: 2 words\n" in capsys.readouterr().out
    run(prepare, "--check", "--out", tmp_path / "deep" / "out")


def test_an_archive_truncated_or_damaged_anywhere_is_refused(prepare, tmp_path):
    path = released(tmp_path)
    content = path.read_bytes()
    damaged = [content[: int(share * len(content))] for share in (0, 0.1, 0.5, 0.9, 0.99)]
    middle = content.index(b"word2vec.pth") + 200
    damaged.append(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"^--zip: .*word2vec\.zip: is damaged, cut short"):
            run(prepare, "--zip", path, "--out", tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("archive", "complaint"),
    [
        ({"rows": 5}, "2 words, but the word embedding has 5 rows"),
        ({"name": "other/x{}".format}, "has 0 files word2vec.pth instead of one"),
        ({"words": (1.0, 2.0)}, "not a vocabulary"),
    ],
)
def test_an_archive_with_other_content_is_refused(prepare, archive, complaint, tmp_path):
    with pytest.raises(InputError, match=complaint):
        run(prepare, "--zip", released(tmp_path, **archive), "--out", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_check_accepts_a_matching_pair_and_refuses_others(prepare, tmp_path, capsys):
    released(tmp_path, words=("the", "the"))
    run(prepare, "--check", "--out", tmp_path)
    output = capsys.readouterr().out
    assert "2 words\n" in output and "1 word can never be found" in output
    released(tmp_path, words=("the", "cut", "it"))
    with pytest.raises(InputError, match=r"--out: .*dict\.npy has 3 words"):
        run(prepare, "--check", "--out", tmp_path)
    torch.save(torch.full((4, 300), torch.nan), tmp_path / "word2vec.pth")
    with pytest.raises(InputError, match=r"--out: .*word2vec\.pth: has numbers that are not"):
        run(prepare, "--check", "--out", tmp_path)
    (tmp_path / "word2vec.pth").unlink()
    with pytest.raises(InputError, match=r"--out: .*word2vec\.pth"):
        run(prepare, "--check", "--out", tmp_path)


def test_an_existing_pair_is_never_overwritten(prepare, files, tmp_path):
    path = released(tmp_path)
    before = (tmp_path / "dict.npy").read_bytes()
    words = word_list(tmp_path, "tomato")
    (tmp_path / "word2vec.pth").unlink()
    for source in (["--zip", path], ["--vectors", files / "a.bin", "--vocabulary", words]):
        with pytest.raises(InputError, match=r"--out: .*dict\.npy already exists"):
            run(prepare, *source, "--out", tmp_path)
    assert (tmp_path / "dict.npy").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--zip"),
        (["--vectors", "v.bin"], "--vocabulary"),
        (["--vectors", "v.bin", "--vocabulary", "w", "--caption_root", "c"], "--vocabulary"),
        (["--train"], "--caption_root"),
        (["--train", "--check"], "--check"),
        (["--train", "--caption_root", "c", "--num_words", "0"], "--num_words"),
    ],
)
def test_an_invalid_call_is_refused_in_one_line_with_status_2(
    prepare, flags, named, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        run(prepare, *flags, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and named in error
    assert not (tmp_path / "out").exists()


def test_the_script_runs_as_a_command(files, tmp_path):
    words = word_list(tmp_path, "the", "tomato")
    flags = ["--vectors", files / "a.bin", "--vocabulary", words, "--out", tmp_path / "data"]
    done = run_python("data/word2vec/prepare.py", *flags, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].endswith("word2vec.pth: 2 words")
    assert list(pair(tmp_path / "data")) == ["the", "tomato"]
