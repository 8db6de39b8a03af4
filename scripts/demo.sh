#!/usr/bin/env bash
# From an empty clone to metrics: toy data, a training with two processes, the evaluations, a
# table, and a page of results each. About ten minutes on two cores plus the install; --quick:
# about four. What an earlier run left in data/toy, checkpoint/ and log/ is used again.
set -euo pipefail
name=demo epochs=70
if [ "${1:-}" = --quick ]; then
    name=demo_quick epochs=25
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/demo.sh [--quick]" >&2
    exit 2
fi
source "$(dirname "$0")/setup_env.sh" requirements.txt
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
    --ucf_root=$data/ucf --ucf_csv=$data/ucfTrainTestlist \
    --crosstask_root=$data/crosstask --crosstask_csv=$data/crosstask_release \
    --htm_align_root=$data/htm_align --htm_align_csv=$data/htm_align.json

python scripts/demo_table.py log/$name.evaluations $data
echo "checkpoint: $weights"
echo "log:        log/$name.txt, log/$name.jsonl"
