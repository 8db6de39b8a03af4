"""Linear action recognition on HMDB-51: python eval_hmdb.py --pretrain_cnn_path FILE

--features FILE keeps the features. Where FILE exists they are read from it: then neither videos nor
weights are needed, while labels and splits are those of --eval_csv in every run.
"""

import os

from annotations.hmdb import hmdb_table
from annotations.tables import log_notes
from args import check_decoder, get_args
from distributed.device import pick_device
from evaluation.feature_file import feature_settings, read_features, write_features
from evaluation.features import inference_model
from evaluation.linear_probe import evaluate_hmdb, hmdb_features
from evaluation.report import check_report, evaluation_settings, hmdb_data, write_page
from hmdb_loader import HMDB51
from utils import (
    check_folder,
    check_output,
    input_error,
    print_metrics,
    run_script,
    setup_logging,
)
from video_decoder import ClipSpec


def make_features(args, table):
    """Decodes the videos and runs the model: the data set, the features, what has none and why."""
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    if args.features:
        check_output(args.features, "features")
    check_decoder(args)
    check_folder(args.eval_video_root, "eval_video_root")
    with input_error("--eval_video_root"):
        dataset = HMDB51(
            table,
            args.eval_video_root,
            ClipSpec(args.num_frames, args.video_size, decoder=args.decoder),
            num_windows=args.num_windows_test,
        )
    # The weights' sum is taken now: a training may remove its old checkpoints in the meantime.
    settings = feature_settings(args) if args.features else None
    features, left_out = hmdb_features(
        inference_model(args, device),
        dataset,
        device,
        batch_size=args.batch_size_val,
        workers=args.num_thread_reader,
        sample_timeout=args.sample_timeout,
    )
    if args.features:
        write_features(args.features, settings, features, left_out)
    return dataset, features, left_out


def main():
    args = get_args(__doc__, "eval_hmdb")
    setup_logging(args.verbose)
    if args.output:
        check_output(args.output)
    if args.report:
        check_report(args.report)
    csv = args.eval_csv or "data/hmdb51.csv"
    with input_error("--eval_csv"):
        table, notes = hmdb_table(csv)
    log_notes(csv, notes)
    if os.path.isfile(args.features):
        dataset = HMDB51(table, video_root=None)
        features, left_out = read_features(args.features, feature_settings(args), dataset.names)
    else:
        dataset, features, left_out = make_features(args, table)
    figures, outcomes = evaluate_hmdb(dataset, features, left_out)
    print_metrics("HMDB-51", figures, args.output)
    if args.report:
        counts = {"num_videos": len(features), "num_missing": len(left_out)}
        settings = evaluation_settings(args, csv)
        write_page(args.report, "HMDB-51", {**figures, **counts}, settings, hmdb_data(outcomes))


if __name__ == "__main__":
    run_script(main)
