#!/usr/bin/env bash
# From an empty clone to metrics: toy data, a training with two processes, six evaluations, their
# metrics beside chance, and a report page for each. Less than five minutes on two cores besides the
# install. Reuses what an earlier run left in data/toy, checkpoint/ and log/.
set -euo pipefail
if [ $# -gt 0 ]; then
    echo "usage: bash scripts/demo.sh" >&2
    exit 2
fi
echo "0/3  installing requirements.txt into .venv, unless it is there"
source "$(dirname "$0")/setup_env.sh" requirements.txt
data=data/toy clips="--num_frames=4 --fps=3 --video_size=64 --num_thread_reader=2"

echo "1/3  drawing the toy videos"
python data/toy/prepare.py --out $data

echo "2/3  training"
# At the default rate of 0.001, training with a batch this small is unreliable.
python main_distributed.py --nproc_per_node=2 --resume --checkpoint_dir=toy --epochs=50 \
    --train_csv=$data/howto100m_videos.csv --video_path=$data/videos --caption_root=$data/captions \
    --word2vec_path=$data/word2vec.pth --token_to_word_path=$data/dict.npy \
    $clips --crop_only=0 --centercrop=1 --batch_size=32 --num_candidates=1 --min_time=3 \
    --lr=0.0003 --warmup_steps=50 --n_display=25 --checkpoint_every=0

echo "3/3  evaluating"
weights=$(ls checkpoint/toy/epoch*.pth.tar | tail -n 1)
python evaluate_all.py --pretrain_cnn_path="$weights" --token_to_word_path=$data/dict.npy $clips \
    --verbose=0 --out=log/toy.evaluations >log/toy.evaluations.txt \
    --youcook_root=$data/youcook --youcook_csv=$data/validation_youcook.csv \
    --msrvtt_root=$data/msrvtt --msrvtt_csv=$data/msrvtt_test.csv \
    --hmdb_root=$data/hmdb --hmdb_csv=$data/hmdb51.csv \
    --ucf_root=$data/ucf --ucf_csv=$data/ucfTrainTestlist \
    --crosstask_root=$data/crosstask --crosstask_csv=$data/crosstask_release \
    --htm_align_root=$data/htm_align --htm_align_csv=$data/htm_align.json

python scripts/demo_table.py log/toy.evaluations $data
echo "checkpoint: $weights"
echo "logs:       log/toy.txt, log/toy.jsonl, log/toy.evaluations.txt"
