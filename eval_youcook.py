"""Zero-shot text-to-video retrieval on YouCook2: python eval_youcook.py --pretrain_cnn_path FILE"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_youcook")

from annotations.youcook import youcook_table
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
from utils import input_error, run_script, setup_logging
from youcook_loader import YouCook2


def main() -> None:
    args = get_args(__doc__, "eval_youcook")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)
    model, words, weights = text_video_model(args, device)

    # The sentences of the validation segments, and the segments whose videos are present.
    csv, table = evaluation_table(args, youcook_table, ANNOTATIONS["youcook"])
    dataset = retrieval_set(args, YouCook2, table, words)

    # `videos` has the embeddings of evenly spaced windows. Their mean represents the segment.
    thumbnails = {}

    def add_thumbnail(index, windows):
        if args.html_report:
            thumbnails[index] = animate_middle_window(windows)

    videos = video_features(
        model, dataset, device, **decoding_options(args), on_windows=add_thumbnail
    )

    # Each sentence ranks all segments by the dot product with its own embedding.
    with input_error("--eval_video_root"):
        scores = retrieval_scores(model, dataset, videos, device)
    results = retrieval_results(scores, count_videos(dataset, videos))
    report_results(args, "YouCook2", results, weights)
    if args.html_report:
        pairs = [dataset.pairs[index] for index in videos]
        data = retrieval_data(pairs, args.eval_video_root, list(thumbnails.values()), scores)
        flags = {"num_windows_test": args.num_windows_test, "fps": args.fps}
        report_page(args, "YouCook2", results, weights, data, table=csv, **flags)


if __name__ == "__main__":
    run_script(main)
