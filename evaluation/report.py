"""--report DIR: the results of an evaluation as one page, DIR/index.html, with all that it shows.

The page is report_page.html with a JSON object in it, which its script turns into text and pictures
in the browser: nothing of the data is ever read as HTML, and nothing is fetched.
"""

import base64
import json
import os
import time
from pathlib import Path

import numpy as np

from annotations.hmdb import SPLITS
from distributed.device import inference_amp
from evaluation.thumbnails import thumbnail
from utils import InputError, atomic_write, check_output, format_metric, make_folder, one_line

TEMPLATE = Path(__file__).with_name("report.html")
SLOT = "{{ data }}"
SHOWN = 5  # videos of a query
BIN_ENDS = (1, 5, 10, 50, 100, 500, 1000)  # of the histogram of ranks
CONFUSED = 20  # pairs of classes that are listed


def page_path(folder):
    return Path(folder, "index.html")


def check_report(folder):
    """Makes the folder of --report. Raises InputError where the page could not be written there."""
    make_folder(folder, "report")
    check_output(page_path(folder), "report")


def write_page(folder, title, figures, settings, data):
    """Writes the page, over one that is there, and prints where it is.

    figures: what utils.report shows; settings: (name, value) pairs; data: of retrieval_data or
    hmdb_data. Raises InputError where it cannot be written.
    """
    shown = [(name, format_metric(value)) for name, value in figures.items()]
    data = {"title": title, "figures": shown, "settings": settings, **data}
    # With "<" spelled otherwise, no sentence can end the element that the JSON is in.
    content = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    page = TEMPLATE.read_text(encoding="utf-8").replace(SLOT, content)
    path = page_path(folder)
    try:
        with atomic_write(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise InputError(f"--report: could not write {path} ({one_line(error)})") from None
    print(f"report: {path}")


def evaluation_settings(args, csv, flags=()):
    """What the figures depend on, as (name, value) pairs; of paths the files' names only."""
    weights = args.pretrain_cnn_path or args.features
    flags = ("num_windows_test", "num_frames", "video_size", *flags)
    return [
        ("table", Path(csv).name),
        ("weights" if args.pretrain_cnn_path else "features", Path(weights).name),
        *((f"--{flag}", str(getattr(args, flag))) for flag in flags),
        ("--amp", inference_amp(args.amp)),
        ("date", time.strftime("%Y-%m-%d %H:%M")),
    ]


def small_animation(windows):
    """The thumbnail of a video's middle window, uint8 [W, 3, T, H, W]: 2 to 4 kB of WebP.

    The page has one for each query: 3 to 5 MB for 1,000 of them.
    """
    clip = windows[len(windows) // 2]
    return thumbnail(clip, size=112, frames=4, milliseconds=400, quality=20)


def retrieval_data(pairs, root, pictures, scores, ranks, best):
    """What a page shows of a retrieval.

    pairs: the N of Retrieval that were scored; root: the folder that their paths are told from.
    pictures: their thumbnails. scores [N, N], ranks [N]: of ground_truth_ranks.
    best: of top_k_videos.
    """
    videos = [
        {**video_name(pair, root), "picture": base64.b64encode(picture).decode()}
        for pair, picture in zip(pairs, pictures, strict=True)
    ]
    queries = [
        {
            "text": pair.text if isinstance(pair.text, str) else "",  # an empty cell of the table
            "rank": int(ranks[text]),
            "score": f"{scores[text, text]:.4g}",
            "best": [[int(video), f"{scores[text, video]:.4g}"] for video in best[text]],
        }
        for text, pair in enumerate(pairs)
    ]
    return {"ranks": rank_histogram(ranks), "videos": videos, "queries": queries}


def video_name(pair, root):
    """How a page names a video: its file, its path below root and, of a segment, the seconds."""
    path, start, end, _ = pair
    part = "" if end is None else f"{start:g}-{end:g} s"
    return {"name": Path(path).name, "path": os.path.relpath(path, root), "part": part}


def rank_histogram(ranks):
    """(bin, count) pairs: how many of the N ranks, of 1 to N, are in each of BIN_ENDS' bins."""
    firsts = [1, *(end + 1 for end in BIN_ENDS if end < len(ranks))]
    lasts = [*(first - 1 for first in firsts[1:]), len(ranks)]
    return [
        (
            f"{first}" if first == last else f"{first}-{last}",
            int(((ranks >= first) & (ranks <= last)).sum()),
        )
        for first, last in zip(firsts, lasts, strict=True)
    ]


def hmdb_data(outcomes):
    """What a page shows of an action recognition; outcomes: of linear_probe.evaluate_hmdb.

    "classes": a row for each class that has test videos, the worst first: its name, its top-1 in
    each split, where it has test videos there, and the mean of these. "confusion": how many videos,
    of all splits, of each of "names" were taken for each of them. "confused": (class, what it was
    taken for, how many, of how many), the most first.
    """
    names = sorted({str(name) for pair in outcomes for labels in pair for name in labels})
    counts = np.zeros((len(SPLITS), len(names), len(names)), dtype=int)
    for split, pair in enumerate(outcomes):
        np.add.at(counts[split], tuple(np.searchsorted(names, labels) for labels in pair), 1)
    total, right = counts.sum(axis=2), np.diagonal(counts, axis1=1, axis2=2)
    classes = []
    for place, name in enumerate(names):
        tested = total[:, place] > 0
        if tested.any():
            top1 = right[tested, place] / total[tested, place]
            of_split = iter(top1.tolist())
            shown = [next(of_split) if there else None for there in tested]
            classes.append((name, *shown, float(top1.mean())))
    confusion = counts.sum(axis=0)
    wrong = confusion - np.diag(np.diag(confusion))
    most = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    confused = [
        (names[truth], names[taken], int(wrong[truth, taken]), int(confusion[truth].sum()))
        for truth, taken in zip(*np.unravel_index(most, wrong.shape), strict=True)
        if wrong[truth, taken]
    ]
    return {
        "splits": SPLITS,
        "classes": sorted(classes, key=lambda row: row[-1]),
        "names": names,
        "confusion": confusion.tolist(),
        "confused": confused,
    }
