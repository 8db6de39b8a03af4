"""Linear action recognition on HMDB-51: python eval_hmdb.py --pretrain_cnn_path FILE

--feature_cache FILE stores the features. If FILE exists, they are read from it, and neither videos
nor weights are needed. Labels and splits are always those of --eval_csv.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_hmdb")

import argparse

import pandas as pd

from annotations.hmdb import hmdb_table
from args import ANNOTATIONS, check_evaluation_outputs, evaluation_table
from evaluation.linear_probe import predict_splits
from evaluation.recognition import top1_results
from evaluation.report import recognition_data
from evaluation_script import recognition_features, report_page, report_results
from hmdb_loader import HMDB51
from recognition_loader import Recognition
from utils import input_error, run_script, setup_logging


def evaluate(
    args: argparse.Namespace, title: str, data_set: type[Recognition], csv: str, table: pd.DataFrame
) -> None:
    """Evaluate a data set of action recognition: HMDB-51, or UCF-101 (eval_ucf.py).

    csv: the path of the annotations. table: its clips, with labels and splits.
    """
    # Pooled mixed_5c features of evenly spaced windows of each clip.
    dataset, found, checksum = recognition_features(args, data_set, table)

    # A linear SVM on each split's training windows; a test clip sums its windows' scores.
    with input_error("--eval_csv, --eval_video_root"):
        predictions = predict_splits(dataset, found.features)
    results = top1_results(predictions, found)
    report_results(args, title, results, checksum)
    if args.html_report:
        report_page(
            args,
            title,
            results,
            checksum,
            recognition_data(predictions),
            table=csv,
            features=args.feature_cache,
            num_windows_test=args.num_windows_test,
        )


def main() -> None:
    args = get_args(__doc__, "eval_hmdb")
    setup_logging(args.verbose)
    check_evaluation_outputs(args)
    csv, table = evaluation_table(args, hmdb_table, ANNOTATIONS["hmdb"])
    evaluate(args, "HMDB-51", HMDB51, csv, table)


if __name__ == "__main__":
    run_script(main)
