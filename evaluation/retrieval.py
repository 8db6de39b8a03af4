"""Text-to-video retrieval: scores, ranks and metrics (paper, section 4)."""

import numpy as np
import torch

from evaluation.features import embed_texts
from evaluation.results import Results, bootstrap_interval
from retrieval_loader import Retrieval

RECALLS = (1, 5, 10)  # k of R@k


def retrieval_scores(
    model: torch.nn.Module,
    dataset: Retrieval,
    videos: dict[int, np.ndarray],
    device: torch.device,
) -> np.ndarray:
    """Score the text of each decoded video against every decoded video: dot products [N, N].

    videos: {index: embeddings of its windows [W, 512]}, as features.video_features returns them. A
    video is represented by their mean. Videos that could not be decoded have neither row nor
    column. Raises ValueError if none could be decoded.
    """
    if not videos:
        raise ValueError("none of the videos can be decoded; check the files")
    sentences = [dataset.pairs[index].text for index in videos]
    texts = embed_texts(model, dataset.tokenizer, sentences, device)
    means = np.stack([windows.mean(axis=0) for windows in videos.values()])
    return texts @ means.T


def ground_truth_ranks(scores: np.ndarray) -> np.ndarray:
    """Return the rank of each text's own video, from 1: int [N].

    scores [N, N]: text i against video j; text i describes video i. Ties and NaN scores count
    against the text's own video, so a constant embedding ranks last.
    """
    own = np.diag(scores)[:, None]
    return (~(scores < own)).sum(axis=1)  # includes the own video: ranks start at 1


def top_k_videos(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k videos with the highest scores for each text, best first: int [N, min(k, N)].

    Agrees with ground_truth_ranks: all videos that count against the text's own come before it.
    """
    own = np.diag(scores)[:, None]
    place = np.where(scores < own, 2, 0)
    np.fill_diagonal(place, 1)
    return np.lexsort((-scores, place))[:, :k]


def retrieval_metrics(scores: np.ndarray) -> dict[str, float]:
    """Compute R1, R5, R10 (R@1, R@5, R@10: recalls, fractions) and MR (median rank).

    scores: [N, N].
    """
    ranks = ground_truth_ranks(scores)
    recalls = {f"R{k}": float(np.mean(ranks <= k)) for k in RECALLS}
    return {**recalls, "MR": float(np.median(ranks))}


def retrieval_results(scores: np.ndarray, videos: dict[str, int]) -> Results:
    """Compute retrieval_metrics with their counts and intervals over the queries.

    scores: [N, N]. videos: the result of count_videos.
    """
    ranks = ground_truth_ranks(scores)
    hits = {f"R{k}": ranks <= k for k in RECALLS}
    counts = {name: (int(hit.sum()), len(hit)) for name, hit in hits.items()}
    intervals = {name: bootstrap_interval(hit) for name, hit in hits.items()}
    intervals["MR"] = bootstrap_interval(ranks, np.median)
    return Results({**retrieval_metrics(scores), **videos}, counts, intervals)


def count_videos(dataset: Retrieval, videos: dict[int, np.ndarray]) -> dict[str, int]:
    """Count the videos that are scored, and those that are absent or cannot be decoded."""
    missing = dataset.num_missing + len(dataset) - len(videos)
    return {"num_videos": len(videos), "num_missing": missing}
