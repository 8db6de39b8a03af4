#!/usr/bin/env bash
# From an empty clone to figures: toy data, a training with two processes, the evaluations, a
# table, and a page of results each. About ten minutes on two cores besides the install; --quick:
# about four. What an earlier run left in data/toy, checkpoint/ and log/ is used again.
set -euo pipefail
name=demo epochs=70
if [ "${1:-}" = --quick ]; then
    name=demo_quick epochs=25
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/demo.sh [--quick]" >&2
    exit 2
fi
source "$(dirname "$0")/setup_env.sh"
data=data/toy clips="--num_frames=8 --video_size=64 --num_thread_reader=2"

python data/toy/prepare.py --out $data

python main_distributed.py --nproc_per_node=2 --resume --checkpoint_dir=$name --epochs=$epochs \
    --train_csv=$data/howto100m_videos.csv --video_path=$data/videos --caption_root=$data/captions \
    --word2vec_path=$data/word2vec.pth --token_to_word_path=$data/dict.npy \
    $clips --crop_only=0 --centercrop=1 --batch_size=32 --num_candidates=1 --min_time=3 \
    --lr=0.0005 --warmup_steps=50  # at the default rate a batch this small is a lottery

weights=$(ls checkpoint/$name/epoch*.pth.tar | tail -n 1)
python evaluate_all.py --pretrain_cnn_path="$weights" --token_to_word_path=$data/dict.npy $clips \
    --verbose=0 --out=log/$name.evaluations \
    --youcook_root=$data/youcook --youcook_csv=$data/validation_youcook.csv \
    --msrvtt_root=$data/msrvtt --msrvtt_csv=$data/msrvtt_test.csv \
    --hmdb_root=$data/hmdb --hmdb_csv=$data/hmdb51.csv \
    --ucf_root=$data/ucf --ucf_csv=$data/ucfTrainTestlist

python - $name $data "$weights" <<'PYTHON'
import json
import sys

import pandas as pd

name, data, weights = sys.argv[1:]
with open(f"log/{name}.evaluations/results.json") as file:
    found = {task: row["results"] for task, row in json.load(file)["evaluations"].items()}
classes = {"hmdb": pd.read_csv(f"{data}/hmdb51.csv")["label"].nunique()}
with open(f"{data}/ucfTrainTestlist/classInd.txt") as file:
    classes["ucf"] = len(file.readlines())
print(f"\n{'toy data set and metric':<28}{'ours':>8}{'chance':>8}")
for task, title in (("youcook", "YouCook2-like"), ("msrvtt", "MSR-VTT-like")):
    videos = found[task]["num_videos"]
    for metric, k in (("R1", 1), ("R5", 5), ("R10", 10)):
        print(f"{title + ' ' + metric:<28}{found[task][metric]:>8.1%}{k / videos:>8.1%}")
    print(f"{title + ' median rank':<28}{found[task]['MR']:>8.1f}{(videos + 1) / 2:>8.1f}")
for task, title in (("hmdb", "HMDB-51-like"), ("ucf", "UCF-101-like")):
    print(f"{title + ' top-1':<28}{found[task]['mean']:>8.1%}{1 / classes[task]:>8.1%}")
print(f"\ncheckpoint: {weights}\nlog:        log/{name}.txt, log/{name}.jsonl")
print(f"report:     log/{name}.evaluations/index.html, with links to the page of each data set")
PYTHON
