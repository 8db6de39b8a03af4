"""Zero-shot text-to-video retrieval on MSR-VTT: python eval_msrvtt.py --pretrain_cnn_path FILE"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_msrvtt")

from annotations.msrvtt import msrvtt_table
from args import (
    ANNOTATIONS,
    check_decoder,
    check_evaluation_outputs,
    evaluation_table,
    retrieval_set,
)
from distributed.device import pick_device
from evaluation.features import video_features
from evaluation.report import animate_middle_window, retrieval_data
from evaluation.retrieval import count_videos, retrieval_results, retrieval_scores
from evaluation_script import decoding_options, report_page, report_results, text_video_model
from msrvtt_loader import MSRVTT
from utils import input_error, run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_msrvtt")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)
    model, words, weights = text_video_model(args, device)

    # The 1k-A test list: one sentence per video.
    csv, table = evaluation_table(args, msrvtt_table, ANNOTATIONS["msrvtt"])
    dataset = retrieval_set(args, MSRVTT, table, words)

    # `videos` has the embeddings of evenly spaced windows. Their mean represents the video.
    thumbnails = {}

    def add_thumbnail(index, windows):
        if args.html_report:
            thumbnails[index] = animate_middle_window(windows)

    videos = video_features(
        model, dataset, device, **decoding_options(args), on_windows=add_thumbnail
    )

    # Each sentence ranks all videos by the dot product with its own embedding.
    with input_error("--eval_video_root"):
        scores = retrieval_scores(model, dataset, videos, device)
    results = retrieval_results(scores, count_videos(dataset, videos))
    report_results(args, "MSRVTT", results, weights)
    if args.html_report:
        pairs = [dataset.pairs[index] for index in videos]
        data = retrieval_data(pairs, args.eval_video_root, list(thumbnails.values()), scores)
        flags = {"num_windows_test": args.num_windows_test, "fps": args.fps}
        report_page(args, "MSRVTT", results, weights, data, table=csv, **flags)


if __name__ == "__main__":
    run_script(main)
