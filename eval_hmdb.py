"""Linear action recognition on HMDB-51: python eval_hmdb.py --pretrain_cnn_path FILE

--feature_cache FILE stores the features. If FILE exists they are read from it, and neither videos
nor weights are needed. Labels and splits are always those of --eval_csv.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_hmdb")

import argparse
import os

import pandas as pd

from annotations.hmdb import hmdb_table
from annotations.tables import log_notes
from args import (
    check_decoder,
    check_evaluation_outputs,
    check_file,
    check_output,
    check_video_folder,
    clip_spec,
    inference_model,
)
from distributed.device import pick_device
from evaluation.feature_file import FeatureSet, feature_settings, read_features, write_features
from evaluation.linear_probe import check_splits, hmdb_features, predict_splits, top1_metrics
from evaluation.report import describe_settings, hmdb_data, write_page
from hmdb_loader import HMDB51
from utils import input_error, log, one_line, print_metrics, run_script, setup_logging


def window_flags(args: argparse.Namespace) -> dict[str, int]:
    """Return the flags that describe the windows, {name: value}."""
    names = ("num_windows_test", "num_frames", "video_size")
    return {name: getattr(args, name) for name in names}


def cache_settings(args: argparse.Namespace) -> dict:
    """Return the settings that the features depend on, see feature_settings."""
    if args.pretrain_cnn_path:
        check_file(args.pretrain_cnn_path, "pretrain_cnn_path")
    return feature_settings(
        args.pretrain_cnn_path, **window_flags(args), amp=args.amp, decoder=args.decoder
    )


def extract_features(args: argparse.Namespace, table: pd.DataFrame) -> tuple[HMDB51, FeatureSet]:
    """Decode the videos, run the model on their windows, and write --feature_cache if given."""
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    if args.feature_cache:
        check_output(args.feature_cache, "feature_cache")
    check_decoder(args)
    check_video_folder(args.eval_video_root, "eval_video_root")
    with input_error("--eval_video_root"):
        dataset = HMDB51(
            table, args.eval_video_root, clip_spec(args), num_windows=args.num_windows_test
        )
    # Compute the checksum of the weights now: a training may remove its old checkpoints meanwhile.
    settings = cache_settings(args) if args.feature_cache else {}
    with input_error("--eval_csv, --eval_video_root"):  # before the hours of decoding
        check_splits(dataset, dataset.names)
    found = hmdb_features(
        inference_model(args, device),
        dataset,
        device,
        batch_size=args.batch_size_val,
        workers=args.num_thread_reader,
        sample_timeout=args.sample_timeout,
    )
    with input_error("--eval_csv, --eval_video_root"):
        check_splits(dataset, found.features)
    if args.feature_cache:
        try:
            write_features(args.feature_cache, settings, found)
        except OSError as error:  # the metrics do not need the file
            log.error(
                "--feature_cache: could not write %s: %s", args.feature_cache, one_line(error)
            )
    return dataset, found


def main() -> None:
    args = get_args(__doc__, "eval_hmdb")
    setup_logging(args.verbose)
    check_evaluation_outputs(args)

    # The clips with their labels and splits.
    csv = args.eval_csv or "data/hmdb51.csv"
    with input_error("--eval_csv"):
        table, notes = hmdb_table(csv)
    log_notes(csv, notes)

    # Pooled mixed_5c features of evenly spaced windows of each clip.
    if os.path.isfile(args.feature_cache):
        dataset = HMDB51(table, video_root=None)
        settings = cache_settings(args)
        with input_error("--feature_cache"):
            found = read_features(args.feature_cache, settings, dataset.names)
    else:
        dataset, found = extract_features(args, table)
    if reasons := list(found.left_out.values()):
        counts = reasons.count("absent"), reasons.count("undecodable")
        log.info("skipped: %d absent videos, %d undecodable", *counts)

    # A linear SVM on each split's training windows; a test clip sums its windows' scores.
    with input_error("--eval_csv, --eval_video_root"):
        predictions = predict_splits(dataset, found.features)
    metrics = top1_metrics(predictions)
    print_metrics("HMDB-51", metrics, args.metrics_json)

    if args.html_report:
        flags = {**window_flags(args), "amp": args.amp}
        settings = describe_settings(csv, args.pretrain_cnn_path, args.feature_cache, **flags)
        counts = {"num_videos": len(found.features), "num_missing": len(found.left_out)}
        data = hmdb_data(predictions)
        with input_error("--html_report"):
            page = write_page(args.html_report, "HMDB-51", {**metrics, **counts}, settings, data)
        print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
