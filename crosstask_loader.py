"""CrossTask for step localization: videos of tasks whose steps are known."""

from collections.abc import Iterable
from pathlib import Path

from annotations.crosstask import AnnotatedVideo
from localization_loader import LongVideos


class CrossTask(LongVideos):
    """Annotated videos; see annotations.crosstask.crosstask_videos. Names are <task>/<video>.

    Files: <video_root>/<video>.{mp4,mkv,webm} or <video_root>/<task>/<video>.{mp4,mkv,webm}.
    `videos` has the annotations by name.
    """

    def __init__(self, videos: Iterable[AnnotatedVideo], video_root: str | Path | None):
        """Raise DataError if all videos are absent. video_root: see LongVideos."""
        self.videos = {f"{video.task}/{video.video}": video for video in videos}
        super().__init__(
            {name: (video.video, name) for name, video in self.videos.items()}, video_root
        )
