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
evaluate="--pretrain_cnn_path=$weights --token_to_word_path=$data/dict.npy $clips --verbose=0"
python eval_youcook.py $evaluate --eval_csv=$data/validation_youcook.csv \
    --eval_video_root=$data/youcook --metrics_json=log/$name.youcook.json --html_report=log/$name.youcook
python eval_msrvtt.py $evaluate --eval_csv=$data/msrvtt_test.csv \
    --eval_video_root=$data/msrvtt --metrics_json=log/$name.msrvtt.json --html_report=log/$name.msrvtt
python eval_hmdb.py $evaluate --eval_csv=$data/hmdb51.csv \
    --eval_video_root=$data/hmdb --metrics_json=log/$name.hmdb.json --html_report=log/$name.hmdb
python eval_crosstask.py $evaluate --eval_csv=$data/crosstask_release --eval_video_root=$data/crosstask \
    --metrics_json=log/$name.crosstask.json --html_report=log/$name.crosstask
python eval_htm_align.py $evaluate --eval_csv=$data/htm_align.json --eval_video_root=$data/htm_align \
    --metrics_json=log/$name.htm_align.json --html_report=log/$name.htm_align

python - $name $data "$weights" <<'PYTHON'
import json
import sys

import numpy as np
import pandas as pd

from annotations.crosstask import crosstask_videos
from annotations.htm_align import htm_align_sentences
from evaluation import localization
from video_decoder import probe_duration


def localization_chance(data, times=100):
    """The mean metrics of random similarities."""
    rng = np.random.default_rng(0)
    tasks, videos, _ = crosstask_videos(f"{data}/crosstask_release", "test")
    said, _ = htm_align_sentences(f"{data}/htm_align.json")

    def scores(path, count):
        return [rng.random((int(probe_duration(path)), count)) for _ in range(times)]

    random = [
        scores(f"{data}/crosstask/{v.task}/{v.video}.mp4", len(tasks[v.task].steps)) for v in videos
    ]
    recalls = []
    for drawn in zip(*random):
        placed = {task: [] for task in tasks}
        for video, matrix in zip(videos, drawn):
            placed[video.task].append(localization.place_steps(matrix, video.segments))
        metrics = localization.crosstask_metrics(placed, dict.fromkeys(tasks, ""), 0)
        recalls.append(metrics["recall"])
    hits = [
        localization.place_sentences(matrix.T, sentences).hits[[s.alignable for s in sentences]]
        for video, sentences in said.items()
        for matrix in scores(f"{data}/htm_align/{video}.mp4", len(sentences))
    ]
    r1 = np.mean(np.concatenate(hits))
    return {"crosstask": {"recall": np.mean(recalls)}, "htm_align": {"R1": r1, "AUC": 0.5}}


name, data, weights = sys.argv[1:]
classes = pd.read_csv(f"{data}/hmdb51.csv")["label"].nunique()
print(f"\n{'toy data set and metric':<28}{'ours':>8}{'chance':>8}")
for task, title in (("youcook", "YouCook2-like"), ("msrvtt", "MSR-VTT-like")):
    with open(f"log/{name}.{task}.json") as file:
        figures = json.load(file)
    videos = figures["num_videos"]
    for metric, k in (("R1", 1), ("R5", 5), ("R10", 10)):
        print(f"{title + ' ' + metric:<28}{figures[metric]:>8.3f}{k / videos:>8.3f}")
    print(f"{title + ' median rank':<28}{figures['MR']:>8.1f}{(videos + 1) / 2:>8.1f}")
with open(f"log/{name}.hmdb.json") as file:
    print(f"{'HMDB-51-like top-1':<28}{json.load(file)['mean']:>8.3f}{1 / classes:>8.3f}")
chance = localization_chance(data)
for task, title in (("crosstask", "CrossTask-like"), ("htm_align", "HTM-Align-like")):
    with open(f"log/{name}.{task}.json") as file:
        figures = json.load(file)
    for metric, expected in chance[task].items():
        print(f"{title + ' ' + metric:<28}{figures[metric]:>8.3f}{expected:>8.3f}")
print(f"\ncheckpoint: {weights}\nlog:        log/{name}.txt, log/{name}.jsonl")
for task in ("youcook", "msrvtt", "hmdb", "crosstask", "htm_align"):
    print(f"report:     log/{name}.{task}/index.html")
PYTHON
