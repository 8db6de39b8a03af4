"""Code that the evaluation scripts share: features and reports, as their flags request them."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

import pandas as pd
import torch

from args import (
    check_decoder,
    check_file,
    check_output,
    check_video_folder,
    clip_spec,
    file_checksum,
    inference_model,
)
from distributed.device import pick_device
from evaluation.feature_file import (
    FeatureSet,
    feature_settings,
    read_features,
    read_settings,
    write_features,
)
from evaluation.features import SecondWindows
from evaluation.localization import localization_features
from evaluation.recognition import check_splits, clip_features
from evaluation.report import describe_settings, write_page
from evaluation.results import Results, print_results, write_results
from localization_loader import LongVideos
from recognition_loader import Recognition
from s3dg import S3D, check_vocabulary, load_words
from utils import DataError, InputError, input_error, log, one_line


def text_video_model(args: argparse.Namespace, device: torch.device) -> tuple[S3D, list[str], str]:
    """Load the model: (model, the vocabulary that belongs to its weights, their checksum)."""
    weights = file_checksum(args.pretrain_cnn_path, "pretrain_cnn_path")
    model = inference_model(args, device)
    with input_error("--token_to_word_path"):
        words = load_words(args.token_to_word_path)
        check_vocabulary(words, model.text_module.word_embd.num_embeddings, args.token_to_word_path)
    return model, words, weights


def decoding_options(args: argparse.Namespace) -> dict:
    """Return the options of evaluation.features.video_features that are flags."""
    return {
        "batch_size": args.batch_size_val,
        "workers": args.num_thread_reader,
        "sample_timeout": args.sample_timeout,
    }


# --- features, kept in --feature_cache ----------------------------------------------------------


def recognition_settings(args: argparse.Namespace) -> dict:
    """Return the settings that the features depend on, see feature_settings."""
    path = args.pretrain_cnn_path
    return feature_settings(
        file_checksum(path, "pretrain_cnn_path") if path else None,
        num_windows_test=args.num_windows_test,
        num_frames=args.num_frames,
        video_size=args.video_size,
        amp=args.amp,
        decoder=args.decoder,
    )


def recognition_features(
    args: argparse.Namespace, data_set: type[Recognition], table: pd.DataFrame
) -> tuple[Recognition, FeatureSet, str | None]:
    """Return the data set, the features of its clips and the checksum of the weights.

    The features are read from --feature_cache if it exists; otherwise the videos are decoded.
    """
    if os.path.isfile(args.feature_cache):
        dataset = data_set(table, video_root=None)
        settings = recognition_settings(args)
        with input_error("--feature_cache"):
            found = read_features(args.feature_cache, settings, dataset.names)
            settings = read_settings(args.feature_cache)
    else:
        dataset, found, settings = extract_clips(args, data_set, table)
    if reasons := list(found.left_out.values()):
        counts = reasons.count("absent"), reasons.count("undecodable")
        log.info("skipped videos: %d absent, %d undecodable", *counts)
    return dataset, found, settings.get("pretrain_cnn_path")


def extract_clips(
    args: argparse.Namespace, data_set: type[Recognition], table: pd.DataFrame
) -> tuple[Recognition, FeatureSet, dict]:
    """Decode the videos, run the model on their windows, and write --feature_cache if given."""
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    if args.feature_cache:
        check_output(args.feature_cache, "feature_cache")
    check_decoder(args)
    check_video_folder(args.eval_video_root, "eval_video_root")
    root, windows = args.eval_video_root, args.num_windows_test
    with input_error("--eval_video_root"):
        dataset = data_set(table, root, clip_spec(args), num_windows=windows)
    check_file(args.pretrain_cnn_path, "pretrain_cnn_path")
    settings = recognition_settings(args)
    with input_error("--eval_csv, --eval_video_root"):  # before the hours of decoding
        check_splits(dataset, dataset.names)
    model = inference_model(args, device, joint_space=False)
    found = clip_features(model, dataset, device, **decoding_options(args))
    with input_error("--eval_csv, --eval_video_root"):
        check_splits(dataset, found.features)
    if args.feature_cache:
        store_features(args, settings, found)
    return dataset, found, settings


def localization_set(
    args: argparse.Namespace, data_set: type[LongVideos], annotations: Sequence | dict
) -> LongVideos:
    """Build a localization data set from annotations and --eval_video_root.

    If --feature_cache exists, no videos are needed.
    """
    if os.path.isfile(args.feature_cache):
        return data_set(annotations, video_root=None)
    if args.feature_cache:
        check_output(args.feature_cache, "feature_cache")
    check_video_folder(args.eval_video_root, "eval_video_root")
    with input_error("--eval_video_root"):
        return data_set(annotations, args.eval_video_root)


def second_features(
    args: argparse.Namespace,
    model: S3D,
    weights: str,
    device: torch.device,
    dataset: LongVideos,
) -> FeatureSet:
    """Embed every second of the videos of a localization_set, or read --feature_cache if it exists.

    weights: their checksum. Raises InputError if the file does not fit or no video can be decoded.
    """
    windows = SecondWindows(clip_spec(args))
    settings = feature_settings(weights, amp=args.amp, **windows.settings)
    if os.path.isfile(args.feature_cache):
        with input_error("--feature_cache"):
            found = read_features(args.feature_cache, settings, dataset.names)
            if not found.features:
                raise DataError(args.feature_cache, "has features of none of the videos; delete it")
        return found
    found = localization_features(model, dataset, device, windows, **decoding_options(args))
    if not found.features:
        raise InputError("--eval_video_root: none of the videos can be decoded; check the files")
    if args.feature_cache:
        store_features(args, settings, found)
    return found


def store_features(args: argparse.Namespace, settings: dict, found: FeatureSet) -> None:
    """Write --feature_cache. An error is logged: the metrics do not need the file."""
    try:
        write_features(args.feature_cache, settings, found)
    except OSError as error:
        log.error("--feature_cache: could not write %s: %s", args.feature_cache, one_line(error))


# --- reports --------------------------------------------------------------------------------------


def describe_run(weights_checksum: str | None) -> dict[str, str | None]:
    """Return the provenance of a run: its command, and the checksum of its weights."""
    command = shlex.join(["python", *sys.argv])
    return {"command": command, "weights_checksum": weights_checksum}


def report_results(
    args: argparse.Namespace, title: str, results: Results, weights_checksum: str | None
) -> None:
    """Print the results, and write them to --metrics_json if it is given."""
    print_results(title, results)
    if args.metrics_json:
        with input_error("--metrics_json"):
            write_results(args.metrics_json, results, **describe_run(weights_checksum))


def report_page(
    args: argparse.Namespace,
    title: str,
    results: Results,
    weights_checksum: str | None,
    data: dict,
    *,
    table: str,
    features: str = "",
    **flags: object,
) -> None:
    """Write the page to --html_report, and print its path.

    data: see evaluation.report.write_page. table: the path of the annotations. features: the path
    of the feature file, shown if no weights are given. flags: {name: value} of the flags that the
    results depend on, in addition to those of every evaluation.
    """
    settings = describe_settings(
        table,
        args.pretrain_cnn_path,
        features,
        num_frames=args.num_frames,
        video_size=args.video_size,
        **flags,
        amp=args.amp,
    )
    run = describe_run(weights_checksum)
    settings += [(name.replace("_", " "), value or "unknown") for name, value in run.items()]
    with input_error("--html_report"):
        page = write_page(args.html_report, title, results, settings, data)
    print(f"report: {page}")
