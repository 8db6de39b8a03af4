"""Zero-shot text-to-video retrieval on YouCook2: python eval_youcook.py --pretrain_cnn_path FILE"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_youcook")

from annotations.youcook import youcook_table
from args import check_decoder, check_evaluation_outputs, inference_model, retrieval_set
from distributed.device import pick_device
from evaluation.features import video_features
from evaluation.report import animate_middle_window, describe_settings, retrieval_data, write_page
from evaluation.retrieval import count_videos, retrieval_metrics, retrieval_scores
from s3dg import check_vocabulary, load_words
from utils import input_error, print_metrics, run_script, setup_logging
from youcook_loader import YouCook2

TABLE = "data/validation_youcook.csv"


def main() -> None:
    args = get_args(__doc__, "eval_youcook")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)

    # The model, and the vocabulary that belongs to its weights.
    model = inference_model(args, device)
    with input_error("--token_to_word_path"):
        words = load_words(args.token_to_word_path)
        check_vocabulary(words, model.text_module.word_embd.num_embeddings, args.token_to_word_path)

    # The sentences of the validation segments, and the segments whose videos are present.
    dataset = retrieval_set(args, YouCook2, youcook_table, TABLE, words)

    # A segment is embedded as the mean of evenly spaced windows, all of them in `videos`.
    thumbnails = {}

    def add_thumbnail(index, windows):
        if args.html_report:
            thumbnails[index] = animate_middle_window(windows)

    videos = video_features(
        model,
        dataset,
        device,
        batch_size=args.batch_size_val,
        workers=args.num_thread_reader,
        sample_timeout=args.sample_timeout,
        on_windows=add_thumbnail,
    )

    # Each sentence ranks all segments by the dot product with its own embedding.
    with input_error("--eval_video_root"):
        scores = retrieval_scores(model, dataset, videos, device)
    metrics = {**retrieval_metrics(scores), **count_videos(dataset, videos)}
    print_metrics("YouCook2", metrics, args.metrics_json)

    if args.html_report:
        settings = describe_settings(
            args.eval_csv or TABLE,
            args.pretrain_cnn_path,
            num_windows_test=args.num_windows_test,
            num_frames=args.num_frames,
            video_size=args.video_size,
            fps=args.fps,
            amp=args.amp,
        )
        pairs = [dataset.pairs[index] for index in videos]
        data = retrieval_data(pairs, args.eval_video_root, list(thumbnails.values()), scores)
        with input_error("--html_report"):
            page = write_page(args.html_report, "YouCook2", metrics, settings, data)
        print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
