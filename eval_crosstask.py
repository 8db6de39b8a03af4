"""Zero-shot step localization on CrossTask: python eval_crosstask.py --pretrain_cnn_path FILE

--eval_csv is the folder of the official release. --feature_cache FILE stores the features. If FILE
exists, they are read from it, and no videos are needed.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_crosstask")

from annotations.crosstask import crosstask_videos
from annotations.tables import log_notes
from args import ANNOTATIONS, check_decoder, check_evaluation_outputs
from crosstask_loader import CrossTask
from distributed.device import pick_device
from evaluation.feature_file import log_left_out
from evaluation.features import embed_texts
from evaluation.localization import crosstask_results, place_steps
from evaluation.report import crosstask_data
from evaluation_script import (
    localization_set,
    report_page,
    report_results,
    second_features,
    text_video_model,
)
from retrieval_loader import RETRIEVAL_WORDS
from s3dg import Tokenizer
from utils import input_error, run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_crosstask")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)

    # The primary tasks, and the annotated videos of the subset.
    release = args.eval_csv or ANNOTATIONS["crosstask"]
    with input_error("--eval_csv"):
        tasks, videos, notes = crosstask_videos(release, args.eval_subset)
    log_notes(release, notes)
    dataset = localization_set(args, CrossTask, videos)

    # The model, and the embeddings of each task's steps [N, 512].
    model, words, weights = text_video_model(args, device)
    tokenizer = Tokenizer(words, RETRIEVAL_WORDS)
    steps = {
        name: embed_texts(model, tokenizer, task.steps, device) for name, task in tasks.items()
    }

    # The embedding of the window around each second of a video [T, 512].
    found = second_features(args, model, weights, device, dataset)
    log_left_out(found.left_out)

    # Each step of the task gets one second, in the steps' order, so that the sum of the dot
    # products is the largest. It is a hit if the video's annotations show the step in that second.
    placed = {
        name: place_steps(seconds @ steps[video.task].T, video.segments)
        for name, seconds in found.features.items()
        for video in [dataset.videos[name]]
    }
    by_task = {
        task: [places for name, places in placed.items() if dataset.videos[name].task == task]
        for task in tasks
    }
    titles = {name: task.title for name, task in tasks.items()}
    results = crosstask_results(by_task, titles, len(found.left_out))
    report_results(args, "CrossTask", results, weights)
    if args.html_report:
        data = crosstask_data(tasks, dataset.videos, found, placed, results.metrics["tasks"])
        flags = {"eval_subset": args.eval_subset, "fps": args.fps}
        report_page(args, "CrossTask", results, weights, data, table=release, **flags)


if __name__ == "__main__":
    run_script(main)
