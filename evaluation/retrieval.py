"""Text-to-video retrieval: embeddings, scores, ranks and metrics (paper, section 4)."""

import numpy as np
import torch

from annotations.tables import log_notes
from args import check_decoder
from distributed.device import pick_device
from evaluation.features import inference_model, video_features
from evaluation.report import (
    SHOWN,
    check_report,
    evaluation_settings,
    retrieval_data,
    small_animation,
    write_page,
)
from retrieval_loader import RETRIEVAL_WORDS
from s3dg import Tokenizer
from utils import (
    InputError,
    check_folder,
    check_output,
    check_words_fit,
    input_error,
    print_metrics,
    read_words,
    setup_logging,
)
from video_decoder import ClipSpec


@torch.inference_mode()
def text_features(model, dataset, indices, device, batch_size=256):
    """Embeddings of these items' texts: float array [len(indices), 512]."""
    tokens = torch.stack([dataset.tokenizer(dataset.pairs[i].text) for i in indices])
    embeddings = [model(None, t.to(device), mode="text") for t in tokens.split(batch_size)]
    return torch.cat(embeddings).float().cpu().numpy()


def ground_truth_ranks(scores):
    """scores [N, N], text i against video j, text i belonging to video i -> the right videos' ranks
    [N], from 1.

    Ties count against the right video, so a constant embedding scores no better than last; so does
    a score that is not a number.
    """
    right = np.diag(scores)[:, None]
    return (~(scores < right)).sum(axis=1)  # the right one counts itself: from 1


def top_k_videos(scores, count):
    """The videos with the highest scores of each text, best first: int [N, min(count, N)].

    They agree with ground_truth_ranks: all that counts against the right video comes before it.
    """
    right = np.diag(scores)[:, None]
    place = np.where(scores < right, 2, 0)
    np.fill_diagonal(place, 1)
    return np.lexsort((-scores, place))[:, :count]


def retrieval_metrics(scores):
    """scores as ground_truth_ranks has them -> R1, R5, R10 (fractions) and MR, the median rank."""
    ranks = ground_truth_ranks(scores)
    return {
        "R1": float(np.mean(ranks <= 1)),
        "R5": float(np.mean(ranks <= 5)),
        "R10": float(np.mean(ranks <= 10)),
        "MR": float(np.median(ranks)),
    }


def retrieval_scores(model, dataset, device, **decoding):
    """Scores of texts against videos, [N, N], and the indices of these N items of the data set.

    A video is the mean of its windows' embeddings. Undecodable ones leave both sides. None where it
    was broken off. For the keyword arguments see video_features.
    """
    videos = video_features(model, dataset, device, **decoding)
    if videos is None:
        return None
    if not videos:
        raise InputError("--eval_video_root: none of the videos there can be decoded")
    texts = text_features(model, dataset, list(videos), device)
    means = np.stack([windows.mean(axis=0) for windows in videos.values()])
    return texts @ means.T, list(videos)


def count_retrieval(dataset, scores):
    """R1, R5, R10, MR and counts, of retrieval_scores' scores."""
    missing = dataset.num_missing + len(dataset) - len(scores)
    return {**retrieval_metrics(scores), "num_videos": len(scores), "num_missing": missing}


def evaluate_retrieval(model, dataset, device, **decoding):
    """Zero-shot text-to-video retrieval (paper, section 4): see retrieval_scores and
    count_retrieval. None where it was broken off.
    """
    found = retrieval_scores(model, dataset, device, **decoding)
    return None if found is None else count_retrieval(dataset, found[0])


def retrieval_set(args, dataset_class, read_annotations, csv, words):
    """YouCook2 or MSRVTT as the flags describe it."""
    with input_error("--eval_csv"):
        table, notes = read_annotations(csv)
    log_notes(csv, notes)
    check_folder(args.eval_video_root, "eval_video_root")
    with input_error("--eval_video_root"):
        return dataset_class(
            table,
            args.eval_video_root,
            Tokenizer(words, RETRIEVAL_WORDS),
            ClipSpec(args.num_frames, args.video_size, args.fps, args.decoder),
            num_windows=args.num_windows_test,
        )


def retrieval_script(args, dataset_class, read_annotations, default_csv):
    """The whole of a retrieval script: all input is checked first, then scored and reported."""
    setup_logging(args.verbose)
    with input_error("--device, --gpu"):
        device = pick_device(args.device, args.gpu)
    if args.output:
        check_output(args.output)
    if args.report:
        check_report(args.report)
    check_decoder(args)
    csv = args.eval_csv or default_csv
    words = read_words(args)
    dataset = retrieval_set(args, dataset_class, read_annotations, csv, words)
    model = inference_model(args, device)
    check_words_fit(words, model.text_module.word_embd.num_embeddings, args.token_to_word_path)
    settings = evaluation_settings(args, csv, flags=["fps"])
    pictures = {}

    def on_windows(index, windows):
        if args.report:
            pictures[index] = small_animation(windows)

    scores, kept = retrieval_scores(
        model,
        dataset,
        device,
        batch_size=args.batch_size_val,
        workers=args.num_thread_reader,
        sample_timeout=args.sample_timeout,
        on_windows=on_windows,
    )
    figures = count_retrieval(dataset, scores)
    print_metrics(dataset_class.__name__, figures, args.output)
    if args.report:
        data = retrieval_data(
            [dataset.pairs[index] for index in kept],
            args.eval_video_root,
            [pictures[index] for index in kept],
            scores,
            ground_truth_ranks(scores),
            top_k_videos(scores, SHOWN),
        )
        write_page(args.report, dataset_class.__name__, figures, settings, data)
