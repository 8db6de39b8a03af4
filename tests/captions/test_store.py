"""Captions: the same from a folder of CSV files and from a store, which detects damage."""

import json

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captions.packing import write_store
from captions.readers import (
    CAPTIONS,
    INDEX,
    MANIFEST,
    CaptionError,
    CaptionFolder,
    CaptionStore,
    PackedStrings,
    lookup_keys,
    open_captions,
    read_captions,
)
from distributed.workers import sample_batches
from tests.helpers import private_memory, write_csv
from utils import DataError

# ---- a caption file ------------------------------------------------------------------------------


def test_captions_keep_null_as_a_word_and_an_empty_cell_as_an_empty_text(tmp_path):
    (tmp_path / "a.csv").write_text('start,end,text\n0,1,null\n1.5,2,\n3,4,"say ""hi"",\nthere"\n')
    starts, ends, texts = read_captions(tmp_path / "a.csv")
    assert starts.tolist() == [0, 1.5, 3] and ends.tolist() == [1, 2, 4]
    assert texts == ["null", "", 'say "hi",\nthere']


def test_captions_that_end_before_they_start_are_kept_and_rows_without_times_skipped(tmp_path):
    (tmp_path / "a.csv").write_text("start,end,text\n9,3,back\n,4,a\n4,,b\n-1,2,c\n1,2e6,d\n")
    starts, ends, texts = read_captions(tmp_path / "a.csv")
    assert (starts.tolist(), ends.tolist(), texts) == ([9], [3], ["back"])


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"start,end,text\n",
        b"start,text\n1,a\n",
        b"start,end,text\nx,2,a\n",
        b"start,end,text\nnan,nan,a\ninf,inf,a\n0,inf,a\n0,1e19,a\n1e10,1e10,a\n-5,-1,a\n",
        b"start,end,text\n0,1,caf\xe9\n",
        b'start,end,text\n0,1,"never ends\n',
    ],
)
def test_unusable_caption_files_are_one_error_that_names_them(tmp_path, content):
    if content is not None:
        (tmp_path / "a\n.csv").write_bytes(content)
    with pytest.raises(CaptionError, match=r"a \.csv") as error:
        read_captions(tmp_path / "a\n.csv")
    assert "\n" not in str(error.value)


def test_captions_are_looked_up_by_path_without_extension_and_by_id_also_by_name():
    assert lookup_keys("a/b.c.mp4") == ["a/b.c"]
    assert lookup_keys("./a//b.mp4", by_id=True) == ["a/b", "b"]
    assert lookup_keys("-x_", by_id=True) == ["-x_", "-x_"]


STRINGS = ["a/b.mp4", "", "größe/日本/🙂.mp4", "x" * 100_000, "a/b.mp4", "z"]


def test_packed_strings_are_the_strings():
    packed = PackedStrings(iter(STRINGS))
    assert len(packed) == len(STRINGS)
    assert [packed[i] for i in range(len(packed))] == STRINGS
    assert [packed[np.int64(i)] for i in (5, 0)] == ["z", "a/b.mp4"]


# ---- the store -----------------------------------------------------------------------------------

VIDEOS = {
    "b/größe": [(0.1, 2.05, "null"), (1.5, 2, ""), (4, 3, 'say "hi",\nthere 🙂')],
    "-a": [(3.8999999999999986, 1e5, "")],
    "b": [(i, i + 1, f"caption {i}") for i in range(500)],
}


def arrays(rows):
    starts, ends, texts = zip(*rows, strict=True)
    return np.array(starts, float), np.array(ends, float), list(texts)


def lists(captions):
    starts, ends, texts = captions
    assert starts.dtype == ends.dtype == np.float64
    return starts.tolist(), ends.tolist(), texts


@pytest.fixture
def store(tmp_path):
    videos = ((name, *arrays(rows)) for name, rows in VIDEOS.items())
    assert write_store(tmp_path / "store", videos) == (3, 504)
    return tmp_path / "store"


def test_a_store_returns_the_captions_written_to_it(store):
    captions = open_captions(store)
    assert isinstance(captions, CaptionStore) and len(captions) == 3
    for name, rows in VIDEOS.items():
        assert captions.has(f"{name}.mp4")
        assert lists(captions.read(f"{name}.mp4")) == lists(arrays(rows))


@pytest.mark.parametrize("absent", ["größe.mp4", "a/-a.mp4", "z.mp4", ".mp4", "b/.mp4", "bb", "\0"])
def test_a_video_that_is_not_in_a_store_is_one_error_that_names_it(store, absent):
    captions = CaptionStore(store)
    assert not captions.has(absent)
    with pytest.raises(CaptionError) as error:
        captions.read(absent)
    assert str(store) in str(error.value) and absent in str(error.value)


def test_by_id_a_video_is_looked_up_by_path_first_and_then_by_name(tmp_path):
    videos = [("x", *arrays([(0, 1, "x")])), ("c/x", *arrays([(0, 1, "c/x")]))]
    write_store(tmp_path / "store", videos, by_id=True)
    captions = CaptionStore(tmp_path / "store")
    for video, text in {"x.mp4": "x", "a/b/x.webm": "x", "c/x.mp4": "c/x"}.items():
        assert captions.read(video)[2] == [text]
    assert not captions.has("x/y.mp4")


TIMES = st.one_of(
    st.floats(-1, 2e6), st.sampled_from([None, 0, 7, 1e6, 999999.9999999999, 0.1 + 0.2])
)
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters='\n",'))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(TIMES, TIMES, TEXTS)), min_size=1, max_size=4))
def test_folder_and_store_give_the_same_captions(tmp_path_factory, tables):
    folder = tmp_path_factory.mktemp("captions")
    videos = []
    for number, rows in enumerate(tables):
        write_csv(folder / f"{number}.csv", ("start", "end", "text"), *rows)
        try:
            videos.append((str(number), *read_captions(folder / f"{number}.csv")))
        except CaptionError:
            assert all(s is None or e is None or not 0 <= s < 1e6 > e >= 0 for s, e, _ in rows)
    if videos:
        write_store(folder / "store", videos)
        captions = [CaptionFolder(folder), CaptionStore(folder / "store")]
        for name, *_ in videos:
            first, second = (lists(source.read(f"{name}.mp4")) for source in captions)
            assert first == second


def test_the_header_of_an_array_is_numpys(store):
    """Arrays are written piece by piece, but the files equal those of np.save."""
    for name, dtype in {**INDEX, **CAPTIONS}.items():
        values = np.load(store / f"{name}.npy")
        np.save(store / "again.npy", values)
        assert values.dtype.str == dtype
        assert (store / "again.npy").read_bytes() == (store / f"{name}.npy").read_bytes()


# ---- damaged stores ------------------------------------------------------------------------------

FILES = [MANIFEST, *(f"{name}.npy" for name in (*INDEX, *CAPTIONS))]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def refusal(store):
    with pytest.raises(DataError, match=r"prepare\.py pack") as refused:
        open_captions(store)
    assert str(store) in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", FILES)
def test_a_store_with_a_file_missing_or_cut_short_is_refused(store, name):
    path = store / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:40], b""):
        path.write_bytes(content)
        assert (content == whole[:-1] and name == MANIFEST) or refusal(store)
    path.unlink()
    assert f"{name} is missing" in refusal(store)


@pytest.mark.parametrize("name", INDEX)
def test_a_store_with_a_damaged_index_is_refused(store, name):
    path = store / f"{name}.npy"
    damage = {-1: f"{name}.npy does not match", 2: "pickle"}  # 2: in numpy's magic string
    for place, reason in damage.items():
        flip(path, place)
        assert reason in refusal(store)
        flip(path, place)
    assert len(open_captions(store)) == len(VIDEOS)


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", "{", '{"format": "other", "version": 1}'])
def test_a_store_with_another_manifest_is_refused(store, manifest):
    (store / MANIFEST).write_text(manifest)
    assert "is not an intact caption store" in refusal(store)


def test_a_store_of_another_version_is_refused(store):
    manifest = json.loads((store / MANIFEST).read_text())
    (store / MANIFEST).write_text(json.dumps({**manifest, "version": 2}))
    assert "version 2" in refusal(store)


@pytest.mark.parametrize("name", CAPTIONS)
def test_damaged_captions_affect_only_their_video(store, name):
    flip(store / f"{name}.npy", -1)  # of the video that was written last
    captions = CaptionStore(store)
    with pytest.raises(CaptionError, match="captions of b are damaged"):
        captions.read("b.mp4")
    for video in ("-a", "b/größe"):
        assert lists(captions.read(f"{video}.mp4")) == lists(arrays(VIDEOS[video]))


def test_a_lost_block_in_the_middle_is_detected(store):
    """An interrupted copy may leave a sparse file."""
    content = bytearray((store / "text.npy").read_bytes())
    content[2000:3000] = bytes(1000)
    (store / "text.npy").write_bytes(content)
    with pytest.raises(CaptionError, match="damaged"):
        CaptionStore(store).read("b.mp4")


def test_a_file_is_not_a_caption_root(tmp_path):
    (tmp_path / "caption.json").write_text("{}")
    with pytest.raises(DataError, match=r"caption\.json: is a file; .*pack"):
        open_captions(tmp_path / "caption.json")


# ---- writing -------------------------------------------------------------------------------------


def stop_after(videos, exception):
    yield from videos
    raise exception


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), MemoryError(), DataError("a", "b")])
def test_a_store_is_written_atomically(tmp_path, exception):
    videos = [(name, *arrays(rows)) for name, rows in VIDEOS.items()]
    with pytest.raises(type(exception)):
        write_store(tmp_path / "store", stop_after(videos, exception))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_that_names_the_store(tmp_path):
    full = OSError(28, "No space left on device")
    with pytest.raises(DataError, match=r"store: cannot be written: No space left"):
        write_store(tmp_path / "store", stop_after([], full))
    assert not list(tmp_path.iterdir())


def test_a_store_does_not_overwrite_another_or_interfere_with_a_run_that_writes_it(store):
    before = {path: path.read_bytes() for path in store.iterdir()}
    with pytest.raises(DataError, match=r"store: already exists"):
        write_store(store, [])
    store.with_name("other.part").mkdir()
    with pytest.raises(DataError, match=r"other\.part: exists; wait"):
        write_store(store.with_name("other"), [])
    assert before == {path: path.read_bytes() for path in store.iterdir()}
    assert store.with_name("other.part").is_dir()


def test_a_store_without_videos_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        write_store(tmp_path / "store", [])
    assert not list(tmp_path.iterdir())


# ---- memory and open files -----------------------------------------------------------------------


class ReadAll:
    """Read all captions per item, and measure the worker's memory and open files around it."""

    def __init__(self, captions, names):
        self.captions, self.names = captions, names
        self.item_spec = {"private": ((2,), torch.int64), "files": ((2,), torch.int64)}

    def __getitem__(self, key):
        process = psutil.Process()
        self.captions.read(self.names[0])
        before = private_memory(), process.num_fds()
        characters = sum(len(text) for n in self.names for text in self.captions.read(n)[2])
        assert characters > 100 * len(self.names)
        after = private_memory(), process.num_fds()
        return {
            name: torch.tensor(pair)
            for name, pair in zip(self.item_spec, zip(before, after, strict=True), strict=True)
        }


class Held:
    """All captions as Python objects, which is what a store avoids."""

    def __init__(self, videos):
        self.captions = {name: captions for name, *captions in videos}

    def read(self, name):
        return self.captions[name]


def growth(captions, names):
    """Return the bytes by which each of three workers grows; none may open more files."""
    [batch] = sample_batches(ReadAll(captions, names), [[0, 1, 2]], workers=3, timeout=60)
    assert batch["errors"] == [None] * 3
    assert batch["files"][:, 0].tolist() == batch["files"][:, 1].tolist()
    return batch["private"][:, 1] - batch["private"][:, 0]


def test_workers_share_the_captions_and_open_no_more_files(tmp_path):
    names = [f"{number:04d}" for number in range(2000)]
    times = np.arange(100.0)
    videos = [(n, times, times, [f"{n} {i} {'word ' * 20}" for i in range(100)]) for n in names]
    write_store(tmp_path / "store", videos)
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    files = psutil.Process().num_fds()
    captions = CaptionStore(tmp_path / "store")
    assert psutil.Process().num_fds() == files + len(INDEX) + len(CAPTIONS)
    assert growth(captions, names).max() < size / 4 < growth(Held(videos), names).min()
