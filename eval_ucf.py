"""Linear action recognition on UCF-101: python eval_ucf.py --pretrain_cnn_path FILE

--feature_cache FILE stores the features. If FILE exists they are read from it, and neither videos
nor weights are needed. Labels and splits are always those of --eval_csv.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_ucf")

from annotations.ucf import ucf_table
from args import ANNOTATIONS, check_evaluation_outputs, evaluation_table
from evaluation.linear_probe import predict_splits
from evaluation.recognition import top1_results
from evaluation.report import recognition_data
from evaluation_script import recognition_features, report_page, report_results
from ucf_loader import UCF101
from utils import input_error, run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_ucf")
    setup_logging(args.verbose)
    check_evaluation_outputs(args)

    # The clips with their labels and splits.
    csv, table = evaluation_table(args, ucf_table, ANNOTATIONS["ucf"])

    # Pooled mixed_5c features of evenly spaced windows of each clip.
    dataset, found, checksum = recognition_features(args, UCF101, table)

    # A linear SVM on each split's training windows; a test clip sums its windows' scores.
    with input_error("--eval_csv, --eval_video_root"):
        predictions = predict_splits(dataset, found.features)
    results = top1_results(predictions, found)
    report_results(args, "UCF-101", results, checksum)
    if args.html_report:
        report_page(
            args,
            "UCF-101",
            results,
            checksum,
            recognition_data(predictions),
            table=csv,
            features=args.feature_cache,
            num_windows_test=args.num_windows_test,
        )


if __name__ == "__main__":
    run_script(main)
