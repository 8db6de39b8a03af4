"""The ids of evaluation videos, from the files that the authors publish."""

import json

import pytest

from annotations.video_ids import read_video_ids
from utils import DataError

FILES = {
    "htm_align.json": json.dumps({"a-1": [[1, 0.5, 2, "text"]], "_b": []}),
    "youcook.json": json.dumps({"database": {"a-1": {"subset": "training"}, "_b": {}}}),
    "videos_val.csv": "123,a-1,https://host/watch?v=a-1\n456,_b,http://host/watch?v=_b\n",
    "youcook.csv": 'end,start,task,text,video_id\n1,0,7,"a,\nb",a-1\n2,1,7,c,_b\n3,2,7,d,a-1\n',
    "htm_aa.csv": "vid,timestamp,text\na-1,1,x\n_b,2,y\n",
    "list.txt": "a-1\n\n _b \r\n",
    "list.csv": "\ufeffvideo_id\na-1\n_b\n",
}


@pytest.mark.parametrize("name", FILES)
def test_ids_are_found_in_every_kind_of_file(tmp_path, name):
    (tmp_path / name).write_text(FILES[name])
    assert read_video_ids(tmp_path / name) == {"a-1", "_b"}


WRONG = {
    "empty.txt": ("", "has no video ids"),
    "empty.json": ("{}", "has no video ids"),
    "list.json": ("[1]", "is not an object"),
    "cut.json": ('{"a": [', "is not JSON"),
    "other.json": ('{"version": 3}', "has '3' as annotations of 'version'"),
    "msrvtt.json": ('{"videos": [{"video_id": "video1"}], "sentences": []}', "of 'videos'; fix it"),
    "info.json": ('{"info": {}, "videos": []}', "has '{}' as annotations of 'info'"),
    "paths.csv": ("video_path\na/b.mp4\n", r"line 2: 'a/b.mp4' is not a video id"),
    "words.txt": ("a-1\nnot an id\n", r"words\.txt, line 2: 'not an id' is not a video id"),
    "other.csv": (
        "start,end,text\n0,1,a\n",
        r"other\.csv, line 1: 'start,end,text' is not a video",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_without_ids_is_refused(tmp_path, name):
    content, reason = WRONG[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        read_video_ids(tmp_path / name)
