"""Zero-shot text-to-video retrieval on YouCook2: python eval_youcook.py --pretrain_cnn_path FILE"""

from annotations.youcook import youcook_table
from args import get_args
from evaluation.retrieval import retrieval_script
from utils import run_script
from youcook_loader import YouCook2


def main():
    retrieval_script(
        get_args(__doc__, "eval_youcook"), YouCook2, youcook_table, "data/validation_youcook.csv"
    )


if __name__ == "__main__":
    run_script(main)
