"""Data sets and lists read videos in tar files like plain files."""

import pytest
import torch

from annotations.hmdb import hmdb_table
from annotations.msrvtt import msrvtt_table
from annotations.youcook import youcook_table
from args import files_below
from captions.readers import open_captions
from hmdb_loader import HMDB51
from msrvtt_loader import MSRVTT
from s3dg import Tokenizer
from tests.helpers import pack_folder
from utils import DataError
from video_decoder import EXTENSIONS, ClipSpec
from video_loader import HowTo100M, read_video_list
from youcook_loader import YouCook2

CLIP = ClipSpec(4, 32)
TOKENIZER = Tokenizer(["cut", "the", "star"], 30)
EVALUATIONS = {
    "youcook": lambda toy, root: YouCook2(
        youcook_table(toy / "validation_youcook.csv")[0], root, TOKENIZER, CLIP
    ),
    "msrvtt": lambda toy, root: MSRVTT(
        msrvtt_table(toy / "msrvtt_test.csv")[0], root, TOKENIZER, CLIP
    ),
    "hmdb": lambda toy, root: HMDB51(hmdb_table(toy / "hmdb51.csv")[0], root, CLIP),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_reads_a_tar_file_like_its_folder(name, toy, tmp_path):
    shard = pack_folder(toy / name, tmp_path / f"{name}.tar")
    plain, packed = (EVALUATIONS[name](toy, root) for root in (toy / name, shard))
    assert len(packed) == len(plain) > 1
    for index in (0, len(plain) - 1):
        assert packed.path(index) == shard / plain.path(index).relative_to(toy / name)
        assert torch.equal(packed[index]["video"], plain[index]["video"])


@pytest.fixture
def shards(toy, tmp_path):
    """Pack the training videos into two shards; one shard has a video twice."""
    names = sorted(read_video_list(toy / "howto100m_videos.csv"))
    pack_folder(toy / "videos", tmp_path / "shards/a/00000.tar", [*names[:3], *names[:1]])
    pack_folder(toy / "videos", tmp_path / "shards/00001.tar", names[3:])
    return tmp_path / "shards"


def training_set(toy, names, root):
    class ById:
        """Captions of the toy set for videos in any folder."""

        captions = open_captions(toy / "captions")

        def read(self, name):
            return self.captions.read(name.rsplit("/", 1)[1])

    return HowTo100M(names, root, ById(), TOKENIZER, CLIP, crop_only=False)


def test_training_reads_shards_like_files(toy, shards):
    names = files_below(shards, "video_path", EXTENSIONS)
    files = sorted(read_video_list(toy / "howto100m_videos.csv"))
    assert [name.rsplit("/", 1)[1] for name in names] == [*files[3:], *files[1:3]]
    packed = training_set(toy, names, shards)
    plain = training_set(toy, [f"./{name.rsplit('/', 1)[1]}" for name in names], toy / "videos")
    packed.check_videos()
    for index in (0, len(names) - 1):
        for key, value in plain[7, index].items():
            assert torch.equal(packed[7, index][key], value)


def test_a_bad_member_is_an_item_with_an_error_and_absent_shards_are_refused(toy, shards):
    twice = "a/00000.tar/" + min(read_video_list(toy / "howto100m_videos.csv"))
    absent = ["a/00000.tar/absent.mp4", "b.tar/absent.mp4"]
    dataset = training_set(toy, [twice, twice.replace("mp4", "mkv"), *absent], shards)
    assert "in the shard more than once" in dataset[0, 0]["error"]
    dataset.check_videos()
    with pytest.raises(DataError, match="has no video of the list"):
        training_set(toy, absent, shards).check_videos()
