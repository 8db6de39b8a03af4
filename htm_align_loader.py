"""HTM-Align for the alignment of narrations: videos of HowTo100M and their sentences."""

from pathlib import Path

from annotations.htm_align import Sentence
from localization_loader import LongVideos


class HTMAlign(LongVideos):
    """Narrated videos; see annotations.htm_align.htm_align_sentences. Names are the videos' ids.

    Files: <video_root>/<video>.{mp4,mkv,webm}. `sentences` has the sentences of each video by name.
    """

    def __init__(self, sentences: dict[str, list[Sentence]], video_root: str | Path | None):
        """Raise DataError if all videos are absent. video_root: see LongVideos."""
        self.sentences = sentences
        super().__init__({name: (name,) for name in sentences}, video_root)
