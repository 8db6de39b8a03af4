"""Linear action recognition on UCF-101: python eval_ucf.py --pretrain_cnn_path FILE

--feature_cache FILE stores the features. If FILE exists, they are read from it, and neither videos
nor weights are needed. Labels and splits are always those of --eval_csv.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_ucf")

from annotations.ucf import ucf_table
from args import ANNOTATIONS, check_evaluation_outputs, evaluation_table
from eval_hmdb import evaluate
from ucf_loader import UCF101
from utils import run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_ucf")
    setup_logging(args.verbose)
    check_evaluation_outputs(args)
    csv, table = evaluation_table(args, ucf_table, ANNOTATIONS["ucf"])
    evaluate(args, "UCF-101", UCF101, csv, table)


if __name__ == "__main__":
    run_script(main)
