"""Limits on the files that both backends accept, and the error for all others."""

import os

FilePath = str | os.PathLike

# Demuxers of files that hold their own frames: no playlists, no image sequences, no devices.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
EXTENSIONS = {
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
# Bounds on the memory that a hostile header can make us allocate.
MAX_PIXELS = 8192 * 4608
MAX_BYTES = 1 << 30


class DecodeError(Exception):
    """Raised for a file that cannot be decoded; one line with the path and the reason."""
