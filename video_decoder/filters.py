"""The filters of the ffmpeg command: rotate upright, crop, scale, flip."""

import math
import struct
from typing import NamedTuple

import av
import numpy as np
from av.filter.context import FilterContext
from av.sidedata.sidedata import SideDataContainer

from video_decoder.limits import DecodeError, FilePath

Filter = tuple[str, dict[str, str]]  # name, options


class CropFilters(NamedTuple):
    """The filters that follow fps."""

    # Enlarges frames smaller than the crop; None without crop_only. It is added to the graph only
    # if needed, because it changes how pixels are converted.
    enlarge: Filter | None
    chain: list[Filter]


def crop_filters(size: int, crop_only: bool, crop: tuple[float, float], flip: bool) -> CropFilters:
    """Return the filters for the crop arguments of decode_clips.

    Raises ValueError for arguments out of range.
    """
    if size < 1:
        raise ValueError(f"size {size} must be positive")
    left, top = (float(fraction) for fraction in crop)
    if not (0 <= left <= 1 and 0 <= top <= 1):
        raise ValueError(f"crop {crop} must be two fractions from 0 to 1")
    side = f"{size}" if crop_only else "min(iw,ih)"
    square = {"w": side, "h": side, "x": f"(iw-{side})*{left!r}", "y": f"(ih-{side})*{top!r}"}
    mirror = [("hflip", {})] if flip else []
    if not crop_only:
        scale = ("scale", {"w": f"{size}", "h": f"{size}"})
        return CropFilters(None, [("crop", square), scale, *mirror])
    if size % 2:
        square["exact"] = "1"
    enlarge = {
        "w": f"if(lte(iw,ih),{size},round(iw*{size}/ih))",
        "h": f"if(lte(iw,ih),round(ih*{size}/iw),{size})",
    }
    return CropFilters(("scale", enlarge), [("crop", square), *mirror])


class FrameConverter:
    """Convert the decoded frames of one file to upright, cropped and scaled RGB pictures."""

    def __init__(self, path: FilePath, filters: CropFilters):
        self.path, self.filters = path, filters
        self.key = self.graph = self.source = self.sink = None
        self.frame = self.picture = None  # the last one; several windows may display it

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """Return a frame's picture, uint8 [height, width, 3]."""
        if frame is self.frame:
            return self.picture
        matrix = read_display_matrix(frame)
        key = (frame.width, frame.height, frame.format.name, frame.colorspace)
        key += (frame.color_range, matrix)
        try:
            if key != self.key:
                self.graph, self.source, self.sink = build_graph(frame, matrix, self.filters)
                self.key = key
            self.source.push(frame)
            output = self.sink.pull()
        except av.error.FFmpegError as error:
            raise DecodeError(f"{self.path}: its frames cannot be converted: {error}") from None
        plane = output.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(output.height, plane.line_size)
        pixels = rows[:, : 3 * output.width]
        self.frame, self.picture = frame, pixels.reshape(output.height, output.width, 3)
        return self.picture


def build_graph(
    frame: av.VideoFrame, matrix: tuple[int, ...] | None, filters: CropFilters
) -> tuple[av.filter.Graph, FilterContext, FilterContext]:
    """Build the command's filter graph for frames like this one; return (graph, source, sink)."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add(
        "buffer",
        video_size=f"{frame.width}x{frame.height}",
        pix_fmt=frame.format.name,
        time_base="1/1000",
        pixel_aspect="1/1",
        colorspace=str(int(frame.colorspace)),
        range=str(int(frame.color_range)),
    )
    chain = upright_filters(matrix)
    if filters.enlarge and min(frame.width, frame.height) < int(filters.chain[0][1]["w"]):
        chain.append(filters.enlarge)
    chain += [*filters.chain, ("format", {"pix_fmts": "rgb24"}), ("buffersink", {})]
    nodes = [source] + [graph.add(name, **options) for name, options in chain]
    graph.link_nodes(*nodes).configure()
    return graph, source, nodes[-1]


def read_display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """Return the nine integers of the file's rotation tag, or None without a tag."""
    # frame.side_data would create a reference cycle, and only the garbage collector would free the
    # frame's memory.
    side_data = SideDataContainer(frame)
    try:
        return struct.unpack("<9i", bytes(side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return None


def upright_filters(matrix: tuple[int, ...] | None) -> list[Filter]:
    """Return the filters by which ffmpeg rotates a picture upright (ffmpeg_filter.c)."""
    if matrix is None:
        return []
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return []
    angle = math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))
    angle = math.copysign(math.floor(abs(angle) + 0.5), angle)
    angle -= 360 * math.floor(angle / 360 + 0.9 / 360)
    if abs(angle - 90) < 1:
        return [("transpose", {"dir": "cclock_flip" if matrix[3] > 0 else "clock"})]
    if abs(angle - 180) < 1:
        return [("hflip", {})] * (matrix[0] < 0) + [("vflip", {})] * (matrix[4] < 0)
    if abs(angle - 270) < 1:
        return [("transpose", {"dir": "clock_flip" if matrix[3] < 0 else "cclock"})]
    if abs(angle) > 1:
        return [("rotate", {"angle": f"{angle:f}*PI/180"})]
    return [("vflip", {})] * (matrix[4] < 0)
