"""The filters of the ffmpeg command: upright, crop, scale, flip."""

import math
import struct

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer

from video_decoder.limits import DecodeError


def crop_filters(size, crop_only, crop, flip):
    """The filters after fps, as (name, options) pairs. The first, which scales frames smaller
    than the crop, has a place only where it is needed: it changes how pixels are converted."""
    if size < 1:
        raise ValueError(f"size {size} must be positive")
    left, top = (float(fraction) for fraction in crop)
    if not (0 <= left <= 1 and 0 <= top <= 1):
        raise ValueError(f"crop {crop} must be two fractions from 0 to 1")
    if crop_only:
        enlarge = {
            "w": f"if(lte(iw,ih),{size},round(iw*{size}/ih))",
            "h": f"if(lte(iw,ih),round(ih*{size}/iw),{size})",
        }
        square = {"w": f"{size}", "h": f"{size}"}
        square |= {"x": f"(iw-{size})*{left!r}", "y": f"(ih-{size})*{top!r}"}
        if size % 2:
            square["exact"] = "1"
        filters = [("scale", enlarge), ("crop", square)]
    else:
        side = "min(iw,ih)"
        square = {"w": side, "h": side}
        square |= {"x": f"(iw-{side})*{left!r}", "y": f"(ih-{side})*{top!r}"}
        filters = [None, ("crop", square), ("scale", {"w": f"{size}", "h": f"{size}"})]
    return filters + [("hflip", {})] * bool(flip)


def build_converter(path, filters):
    """A function from a decoded frame to an array [height, width, 3]: upright, cropped, scaled."""
    key = source = sink = graph = None

    def convert(frame):
        nonlocal key, source, sink, graph
        matrix = display_matrix(frame)
        new_key = (frame.width, frame.height, frame.format.name, frame.colorspace)
        new_key += (frame.color_range, matrix)
        try:
            if new_key != key:
                graph, source, sink = build_graph(frame, matrix, filters)
                key = new_key
            source.push(frame)
            picture = sink.pull()
        except av.error.FFmpegError as error:
            raise DecodeError(f"{path}: its frames cannot be converted: {error}") from None
        plane = picture.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(picture.height, plane.line_size)
        return rows[:, : 3 * picture.width].reshape(picture.height, picture.width, 3)

    return convert


def build_graph(frame, matrix, filters):
    """The filters of the command for frames like this one."""
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
    turn = upright_filters(matrix)
    enlarge, *others = filters
    if enlarge and min(frame.width, frame.height) < int(others[0][1]["w"]):
        others = [enlarge, *others]
    chain = [*turn, *others, ("format", {"pix_fmts": "rgb24"}), ("buffersink", {})]
    nodes = [source] + [graph.add(name, **options) for name, options in chain]
    graph.link_nodes(*nodes).configure()
    return graph, source, nodes[-1]


def display_matrix(frame):
    """The nine integers of the file's rotation tag, or None."""
    # Not frame.side_data: the frame would keep it and, as it knows the frame, never be freed
    # before a garbage collection, pictures and all.
    side_data = SideDataContainer(frame)
    try:
        return struct.unpack("<9i", bytes(side_data["DISPLAYMATRIX"]))
    except (KeyError, struct.error):
        return None


def upright_filters(matrix):
    """The filters ffmpeg puts first so that the picture stands upright (ffmpeg_filter.c)."""
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
