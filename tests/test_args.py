import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import args
import eval_hmdb
import evaluation_script
import video_decoder
from annotations.crosstask import SUBSETS
from args import get_args
from distributed.device import PRECISIONS
from tests.helpers import ROOT

# The public release's flags and defaults, which command lines in the wild rely on.
DEFAULTS = {
    "train_csv": "data/howto100m_videos.csv",
    "video_path": "",
    "caption_root": "",
    "eval_video_root": "",
    "checkpoint_root": "checkpoint",
    "checkpoint_dir": "",
    "log_root": "log",
    "optimizer": "adam",
    "lr": 0.001,
    "momentum": 0.9,
    "weight_init": "uniform",
    "num_class": 512,
    "batch_size": 256,
    "num_thread_reader": 20,
    "word2vec_path": "data/word2vec.pth",
    "pretrain_cnn_path": "",
    "dist_file": "dist-file",
    "dist_backend": "nccl",
    "num_frames": 16,
    "video_size": 224,
    "fps": 5,
    "crop_only": 1,
    "centercrop": 0,
    "random_flip": 1,
    "min_time": 5.0,
    "num_candidates": 1,
    "num_windows_test": 4,
    "batch_size_val": 32,
    "epochs": 150,
    "start_epoch": 0,
    "warmup_steps": 5000,
    "resume": False,
    "evaluate": False,
    "pin_memory": False,
    "cudnn_benchmark": 0,
    "verbose": 1,
    "n_display": 10,
    "world_size": -1,
    "rank": -1,
    "gpu": None,
    "seed": 1,
    "multiprocessing_distributed": False,
    "token_to_word_path": "data/dict.npy",
}


def parse(line):
    return get_args(argv=line.split())


def test_defaults_are_the_public_releases(monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_distributed.py"])
    found = vars(get_args())
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", [name for name in DEFAULTS if "_" in name])
def test_each_flag_is_known_with_hyphens_and_with_underscores(name):
    is_switch = isinstance(DEFAULTS[name], bool)
    value = "" if is_switch else " sgd" if name == "optimizer" else " 1"
    if name == "weight_init":
        value = " uniform"
    parsed = [vars(parse(f"--{s}{value}"))[name] for s in (name, name.replace("_", "-"))]
    assert parsed[0] == parsed[1] == (True if is_switch else parsed[0])
    if not is_switch:
        assert vars(parse(f"--{name.replace('_', '-')}={value.strip()}"))[name] == parsed[0]


def test_hyphens_in_values_stay():
    assert parse("--checkpoint-dir=my-run --dist-file a-b").checkpoint_dir == "my-run"


def test_the_releases_command_parses():
    args = parse(
        "--n_display=1 --multiprocessing-distributed --batch_size=256 --num_thread_reader=40 "
        "--cudnn_benchmark=1 --pin_memory --checkpoint_dir=milnce --num_candidates=4 --resume "
        "--lr=0.001 --warmup_steps=10000 --epochs=300 --caption_root=DIR --video_path=DIR"
    )
    assert (args.num_candidates, args.epochs, args.resume) == (4, 300, True)


def test_old_spellings_work_but_the_help_hides_them(capsys):
    assert parse("--momemtum 0.5 --pretrained").momentum == 0.5
    named = parse("--output a.json --report b --features=c.npz")
    assert (named.metrics_json, named.html_report, named.feature_cache) == ("a.json", "b", "c.npz")
    assert parse("").feature_cache == ""
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for old in ("momemtum", "--pretrained ", "--output", "--report", "--features"):
        assert old not in text


@pytest.mark.parametrize(
    "line",
    [
        "--batch_size 0",
        "--batch_size many",
        "--lr -1",
        "--optimizer lamb",
        "--decoder gstreamer",
        "--no_such_flag",
        "--seed -1",
        "--crop_only 2",
        "--shard 4/4",
        "--shard 1",
        "--stride 0",
        "--layer fc",
        "--eval_subset train",
    ],
)
def test_a_wrong_flag_exits_with_status_2_and_one_line_that_names_it(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(line)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and line.split()[0] in error


# --- the help -------------------------------------------------------------------------------------

EVALUATIONS = ["eval_youcook", "eval_msrvtt", "eval_hmdb", "eval_ucf"]
EVALUATIONS += ["eval_crosstask", "eval_htm_align"]
SCRIPTS = ["main_distributed", *EVALUATIONS, "extract_features"]
SHARED = [Path(module.__file__).read_text() for module in (args, evaluation_script, eval_hmdb)]


def flags_read(source):
    """Return the attributes of `args` that a program reads, in functions that it calls, too."""
    functions = {
        node.name: node
        for module in SHARED
        for node in ast.parse(module).body
        if isinstance(node, ast.FunctionDef)
    }
    read, nodes, seen = set(), [ast.parse(source)], set()
    while nodes:
        tree = nodes.pop()
        parts = [part for part in ast.walk(tree) if isinstance(part, ast.Attribute)]
        read |= {p.attr for p in parts if ast.unparse(p.value) in ("args", "state.args")}
        called = set(re.findall(r"\b(\w+)\(args\b", ast.unparse(tree))) & functions.keys() - seen
        seen |= called
        nodes += [functions[name] for name in called]
    if "inference_model" in seen:
        read.add("pretrain_cnn_path")
    return read


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_shows_the_flags_that_the_script_reads(script):
    parser = argparse.ArgumentParser(add_help=False)
    args.add_flags(parser, script, others=False)
    shown = {action.dest for action in parser._actions}
    source = (ROOT / f"{script}.py").read_text()
    read = flags_read(source)
    if script == "main_distributed":
        read |= {"pin_memory", "multiprocessing_distributed"}  # listed as having no effect
    if script in args.RECOGNITION:
        read.remove("fps")  # it decodes at the videos' own rate
    assert shown == read


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_accepts_every_flag_of_the_release(script):
    parsed = vars(get_args("", script, ["--batch_size=4", "--random-flip=0", "--momemtum=0.5"]))
    assert parsed.keys() >= DEFAULTS.keys()
    assert (parsed["batch_size"], parsed["random_flip"], parsed["momentum"]) == (4, 0, 0.5)


DATA_SCRIPTS = ["howto100m/prepare", "howto100m/transcode", "word2vec/prepare"]
OTHER_SCRIPTS = ["search", "evaluate_all", "scripts/plot_training"]
OTHER_SCRIPTS += [f"data/{name}" for name in DATA_SCRIPTS]


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHER_SCRIPTS])
def test_the_help_appears_without_torch(script):
    program = (
        "import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not {'torch', 'av'} & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", program, f"{script}.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0 and "usage: " in ended.stdout, ended.stderr


def test_copies_of_constants_agree_with_the_modules_that_define_them():
    assert args.BACKENDS == video_decoder.BACKENDS
    assert tuple(PRECISIONS) == args.PRECISIONS
    assert args.SUBSETS == SUBSETS
