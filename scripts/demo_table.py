"""Print the demo's results beside chance: python scripts/demo_table.py EVALUATIONS TOY_DATA"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from annotations.crosstask import crosstask_videos
from annotations.hmdb import hmdb_table
from annotations.htm_align import htm_align_sentences
from annotations.ucf import ucf_table
from evaluation.localization import crosstask_metrics, place_sentences, place_steps
from evaluation.results import format_metric
from video_decoder import probe_duration

DRAWS = 100  # of random similarities


def random_scores(path: Path, num_texts: int) -> list[np.ndarray]:
    """Draw DRAWS matrices of similarities [T, num_texts] of a video's seconds and texts."""
    rng = np.random.default_rng(0)
    return [rng.random((int(probe_duration(path)), num_texts)) for _ in range(DRAWS)]


def crosstask_chance(data: Path) -> float:
    """Return the mean recall of random similarities."""
    tasks, videos, _ = crosstask_videos(data / "crosstask_release", "test")
    scores = [
        random_scores(data / "crosstask" / v.task / f"{v.video}.mp4", len(tasks[v.task].steps))
        for v in videos
    ]
    recalls = []
    for drawn in zip(*scores, strict=True):
        placed = {task: [] for task in tasks}
        for video, matrix in zip(videos, drawn, strict=True):
            placed[video.task].append(place_steps(matrix, video.segments))
        recalls.append(crosstask_metrics(placed, dict.fromkeys(tasks, ""), 0)["recall"])
    return float(np.mean(recalls))


def htm_align_chance(data: Path) -> float:
    """Return the mean R@1 of random similarities."""
    narrations, _ = htm_align_sentences(data / "htm_align.json")
    hits = [
        place_sentences(matrix.T, sentences).hits[[s.alignable for s in sentences]]
        for video, sentences in narrations.items()
        for matrix in random_scores(data / "htm_align" / f"{video}.mp4", len(sentences))
    ]
    return float(np.mean(np.concatenate(hits)))


def main() -> None:
    evaluations, data = map(Path, sys.argv[1:])
    content = json.loads((evaluations / "results.json").read_text())["evaluations"]
    chance = {
        "hmdb": {"mean": 1 / hmdb_table(data / "hmdb51.csv")[0]["label"].nunique()},
        "ucf": {"mean": 1 / ucf_table(data / "ucfTrainTestlist")[0]["label"].nunique()},
        "crosstask": {"recall": crosstask_chance(data)},
        "htm_align": {"R1": htm_align_chance(data), "AUC": 0.5},
    }
    for name in ("youcook", "msrvtt"):
        videos = content[name]["results"]["num_videos"]
        chance[name] = {f"R{k}": k / videos for k in (1, 5, 10)} | {"MR": (videos + 1) / 2}
    print(f"\n{'toy data set and metric':<28}{'ours':>8}{'chance':>8}")
    for name, row in content.items():
        for metric, expected in chance[name].items():
            ours = format_metric(metric, row["results"][metric])
            label = f"{row['title']}-like {metric}"
            print(f"{label:<28}{ours:>8}{format_metric(metric, expected):>8}")
    print(f"\npages: {evaluations}/index.html, with links to those of the data sets")


if __name__ == "__main__":
    main()
