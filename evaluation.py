"""The evaluations: one loop over the videos, retrieval and its figures."""

import contextlib

import numpy as np
import torch
from tqdm import tqdm

from args import check_decoder
from checkpoint import load_model
from report_page import (
    SHOWN,
    check_report,
    evaluation_settings,
    retrieval_data,
    small_animation,
    write_page,
)
from retrieval_loader import TEXT_WORDS
from s3dg import Tokenizer, inference_copy
from utils import (
    PRECISIONS,
    InputError,
    check_clip_size,
    check_compiler,
    check_output,
    check_words_fit,
    inference_amp,
    lines_above,
    log,
    pick_device,
    read_words,
    report,
    setup_logging,
    to_unit_range,
)
from workers import described, sample_batches


def clip_batches(items, batch_size):
    """Windows of successive videos in batches: (owners, uint8 [batch_size or fewer, 3, T, H, W]).

    items: (owner, windows [W, 3, T, H, W]) pairs. At most batch_size windows are held, and what one
    video has over, so memory does not grow with the number of windows.
    """
    owners, clips = [], []
    for owner, windows in items:
        for clip in windows:
            owners.append(owner)
            clips.append(clip)
            if len(clips) == batch_size:
                yield owners, torch.stack(clips)
                owners, clips = [], []
    if clips:
        yield owners, torch.stack(clips)


@torch.inference_mode()
def window_features(model, items, device, *, batch_size, mixed5c=False):
    """Features of windows, as they are ready: yields (owner, float array [512 or 1024]).

    items: see clip_batches. The model is to be in evaluation mode.
    """
    for owners, clips in clip_batches(items, batch_size):
        output = model(to_unit_range(clips.to(device)), None, mode="video", mixed5c=mixed5c)
        yield from zip(owners, output.float().cpu().numpy(), strict=True)


def video_features(
    model,
    dataset,
    device,
    *,
    batch_size,
    workers,
    sample_timeout,
    mixed5c=False,
    rank=0,
    world_size=1,
    gather=lambda share: [share],
    on_windows=lambda index, windows: None,
    on_video=lambda: False,
):
    """Features of each video's windows: a dict from index to float array [W, 512 or 1024].

    Videos that cannot be decoded are named in the log and have no entry. With several ranks each
    takes every world_size-th video, and all of them get the whole, by gather, which lists what
    the ranks give it. on_windows gets the index and the windows, uint8 [W, 3, T, H, W], of each
    video that this rank has decoded. on_video is called after each video; where it says True on any
    rank, the evaluation is broken off, and None returned.
    """
    share = range(rank, len(dataset), world_size)
    videos = sample_batches(
        dataset,
        ([index] for index in share),
        workers=workers,
        timeout=sample_timeout,
    )

    def decoded():
        # No bar where there is no terminal: a log is not for it, and may be on a full disk.
        hidden = True if rank > 0 else None
        bar = tqdm(share, desc=type(dataset).__name__, unit="video", disable=hidden)
        with bar, lines_above(bar):
            for index, video in zip(bar, videos, strict=True):
                if error := video["errors"][0]:
                    reason = described(error, dataset.path(index))
                    log.warning("left out of the evaluation: %s", reason)
                else:
                    windows = video["video"][0].clone()  # its memory is used again
                    on_windows(index, windows)
                    yield index, windows
                nonlocal stopped
                stopped = on_video()
                if stopped:
                    return

    was_training = model.training
    model.eval()
    features, stopped = {}, False
    with contextlib.closing(videos):
        windows = window_features(model, decoded(), device, batch_size=batch_size, mixed5c=mixed5c)
        for owner, feature in windows:
            features.setdefault(owner, []).append(feature)
    model.train(was_training)
    features = {owner: np.stack(windows) for owner, windows in features.items()}
    shares = gather(None if stopped else features)
    if None in shares:
        return None
    return dict(sorted(item for share in shares for item in share.items()))


@torch.inference_mode()
def text_features(model, dataset, indices, device, batch_size=256):
    """Embeddings of these items' texts: float array [len(indices), 512]."""
    tokens = torch.stack([dataset.tokenizer(dataset.pairs[i][-1]) for i in indices])
    embeddings = [model(None, t.to(device), mode="text") for t in tokens.split(batch_size)]
    return torch.cat(embeddings).float().cpu().numpy()


def right_ranks(scores):
    """scores [N, N], text i against video j, text i belonging to video i -> the right videos' ranks
    [N], from 1.

    Ties count against the right video, so a constant embedding scores no better than last; so does
    a score that is not a number.
    """
    right = np.diag(scores)[:, None]
    return (~(scores < right)).sum(axis=1)  # the right one counts itself: from 1


def best_videos(scores, count):
    """The videos with the highest scores of each text, best first: int [N, min(count, N)].

    They agree with right_ranks: all that counts against the right video comes before it.
    """
    right = np.diag(scores)[:, None]
    place = np.where(scores < right, 2, 0)
    np.fill_diagonal(place, 1)
    return np.lexsort((-scores, place))[:, :count]


def retrieval_metrics(scores):
    """scores as right_ranks has them -> R1, R5, R10 (fractions) and MR, the median rank."""
    ranks = right_ranks(scores)
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


def retrieval_figures(dataset, scores):
    """R1, R5, R10, MR and counts, of retrieval_scores' scores."""
    missing = dataset.num_missing + len(dataset) - len(scores)
    return {**retrieval_metrics(scores), "num_videos": len(scores), "num_missing": missing}


def evaluate_retrieval(model, dataset, device, **decoding):
    """Zero-shot text-to-video retrieval (paper, section 4): see retrieval_scores and
    retrieval_figures. None where it was broken off.
    """
    found = retrieval_scores(model, dataset, device, **decoding)
    return None if found is None else retrieval_figures(dataset, found[0])


def inference_model(args, device, weights="pretrain_cnn_path"):
    """The model of --pretrain_cnn_path, or of another flag, as the evaluations use it."""
    if args.compile:
        check_compiler()
    model = load_model(getattr(args, weights), flag=weights)
    check_clip_size(args, model)
    if args.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    model = inference_copy(model.to(device), PRECISIONS[inference_amp(args)])
    if args.compile:
        model.compile()
    return model


def retrieval_set(args, dataset_class, default_csv, words):
    """YouCook2 or MSRVTT as the flags describe it."""
    return dataset_class(
        args.eval_csv or default_csv,
        args.eval_video_root,
        Tokenizer(words, TEXT_WORDS),
        num_frames=args.num_frames,
        size=args.video_size,
        fps=args.fps,
        num_windows=args.num_windows_test,
        decoder=args.decoder,
    )


def retrieval_script(args, dataset_class, default_csv):
    """The whole of a retrieval script: all input is checked first, then scored and reported."""
    setup_logging(args.verbose)
    device = pick_device(args)
    if args.output:
        check_output(args.output)
    if args.report:
        check_report(args.report)
    check_decoder(args)
    words = read_words(args)
    dataset = retrieval_set(args, dataset_class, default_csv, words)
    model = inference_model(args, device)
    check_words_fit(words, model.text_module.word_embd.num_embeddings, args.token_to_word_path)
    settings = evaluation_settings(args, args.eval_csv or default_csv, flags=["fps"])
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
    figures = retrieval_figures(dataset, scores)
    report(dataset_class.__name__, figures, args.output)
    if args.report:
        data = retrieval_data(
            [dataset.pairs[index] for index in kept],
            args.eval_video_root,
            [pictures[index] for index in kept],
            scores,
            right_ranks(scores),
            best_videos(scores, SHOWN),
        )
        write_page(args.report, dataset_class.__name__, figures, settings, data)
