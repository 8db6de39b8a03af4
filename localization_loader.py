"""Data sets of localization: long videos that are embedded second by second."""

from collections.abc import Iterable
from pathlib import Path

from utils import DataError
from video_decoder import find_video, video_exists


class LongVideos:
    """The videos of a data set whose files exist: `names`, and their `paths`.

    `absent` has the names of the others.
    """

    def __init__(self, stems: dict[str, Iterable[str]], video_root: str | Path | None):
        """stems: for each name, the paths without a suffix that its file below video_root may have.

        video_root: None to use the names of all videos, without files. Raises DataError if all
        videos are absent.
        """
        self.names, self.paths, self.absent = list(stems), [], []
        if video_root is None:
            return
        found = {
            name: find_video(*(Path(video_root, stem) for stem in options))
            for name, options in stems.items()
        }
        present = {name: video_exists(path) for name, path in found.items()}
        self.names = [name for name in found if present[name]]
        self.paths = [found[name] for name in self.names]
        self.absent = [name for name in found if not present[name]]
        if not self.names:
            raise DataError(video_root, "has no video of the annotations; give their folder")
