"""Zero-shot text-to-video retrieval on MSR-VTT: python eval_msrvtt.py --pretrain_cnn_path FILE"""

from annotations.msrvtt import msrvtt_table
from args import get_args
from evaluation.retrieval import retrieval_script
from msrvtt_loader import MSRVTT
from utils import run_script


def main():
    retrieval_script(get_args(__doc__, "eval_msrvtt"), MSRVTT, msrvtt_table, "data/msrvtt_test.csv")


if __name__ == "__main__":
    run_script(main)
