"""Figures of this model that others have published, in per cent; MR is a rank. None are ours."""

from typing import NamedTuple


class Published(NamedTuple):
    """A source's figures on a data set, keyed by the names of our metrics."""

    source: str
    figures: dict[str, float]


LONG, SHORT = "paper [1], 2645 epochs, batch 8192", "paper [1], 206 epochs, batch 512"
RELEASE_300, RELEASE_150 = (
    "PyTorch release, 300 epochs, batch 1024",
    "PyTorch release, 150 epochs, batch 512",
)
PAPER = "S3D MIL-NCE [1]"
TAN = "reproduced by TAN (CVPR 2022)"
RECALLS = ("R1", "R5", "R10", "MR")


def recalls(source: str, *figures: float) -> Published:
    return Published(source, dict(zip(RECALLS, figures, strict=True)))


# Keyed by the data set's name in evaluate_all.py.
PUBLISHED = {
    "youcook": [
        recalls(LONG, 15.1, 38.0, 51.2, 10),
        recalls(SHORT, 8.2, 24.6, 36.2, 23),
        recalls(RELEASE_300, 8.8, 24.3, 34.6, 23),
        recalls(RELEASE_150, 7.4, 21.5, 32.2, 29),
    ],
    "msrvtt": [
        recalls(LONG, 9.9, 24.0, 32.4, 29.5),
        recalls(SHORT, 8.6, 21.5, 28.6, 36),
        recalls(RELEASE_300, 8.2, 21.5, 29.5, 40),
        recalls(RELEASE_150, 7.7, 19.0, 27.3, 37),
    ],
    "hmdb": [
        Published(LONG, {"mean": 53.1}),
        Published(SHORT, {"mean": 54.2}),
        Published(RELEASE_300, {"mean": 54.3}),
        Published(RELEASE_150, {"mean": 53.5}),
        Published(TAN, {"mean": 55.2}),
    ],
    "ucf": [Published(PAPER, {"mean": 82.7}), Published(TAN, {"mean": 82.1})],
    "crosstask": [Published(PAPER, {"recall": 40.5})],
    "htm_align": [Published(TAN, {"R1": 28.7, "AUC": 73.3, "R1_64": 34.2, "AUC_64": 73.4})],
}
