"""Zero-shot step localization on CrossTask: python eval_crosstask.py --pretrain_cnn_path FILE

--eval_csv is the folder of the official release. --feature_cache FILE stores the features. If FILE
exists they are read from it, and no videos are needed.
"""

from args import get_args

if __name__ == "__main__":  # --help should not wait for torch
    get_args(__doc__, "eval_crosstask")

from annotations.crosstask import crosstask_videos
from annotations.tables import log_notes
from args import (
    check_decoder,
    check_evaluation_outputs,
    inference_model,
    localization_set,
    second_features,
    text_tokenizer,
)
from crosstask_loader import CrossTask
from distributed.device import pick_device
from evaluation.feature_file import log_left_out
from evaluation.features import embed_texts
from evaluation.localization import crosstask_metrics, place_steps
from evaluation.report import crosstask_data, describe_settings, write_page
from retrieval_loader import RETRIEVAL_WORDS
from utils import input_error, print_metrics, run_script, setup_logging


def main() -> None:
    args = get_args(__doc__, "eval_crosstask")
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    check_evaluation_outputs(args)
    check_decoder(args)

    # The primary tasks, and the annotated videos of the subset.
    release = args.eval_csv or "data/crosstask_release"
    with input_error("--eval_csv"):
        tasks, videos, notes = crosstask_videos(release, args.eval_subset)
    log_notes(release, notes)
    dataset = localization_set(args, CrossTask, videos)

    # The model, and the embeddings of each task's steps [N, 512].
    model = inference_model(args, device)
    tokenizer = text_tokenizer(args, model, RETRIEVAL_WORDS)
    steps = {id: embed_texts(model, tokenizer, task.steps, device) for id, task in tasks.items()}

    # The embedding of the window around each second of a video [T, 512].
    found = second_features(args, model, device, dataset)
    log_left_out(found.left_out)

    # All steps of the task get one second each, in their order, that maximize the sum of the dot
    # products. A hit is a second in which the annotations of this video show the step.
    placed = {
        name: place_steps(seconds @ steps[video.task].T, video.segments)
        for name, seconds in found.features.items()
        for video in [dataset.videos[name]]
    }
    by_task = {
        id: [places for name, places in placed.items() if dataset.videos[name].task == id]
        for id in tasks
    }
    titles = {id: task.title for id, task in tasks.items()}
    metrics = crosstask_metrics(by_task, titles, len(found.left_out))
    print_metrics("CrossTask", metrics, args.metrics_json)

    if args.html_report:
        settings = describe_settings(
            release,
            args.pretrain_cnn_path,
            eval_subset=args.eval_subset,
            num_frames=args.num_frames,
            video_size=args.video_size,
            fps=args.fps,
            amp=args.amp,
        )
        data = crosstask_data(tasks, dataset.videos, found, placed, metrics["tasks"])
        numbers = {name: value for name, value in metrics.items() if name != "tasks"}
        with input_error("--html_report"):
            page = write_page(args.html_report, "CrossTask", numbers, settings, data)
        print(f"report: {page}")


if __name__ == "__main__":
    run_script(main)
