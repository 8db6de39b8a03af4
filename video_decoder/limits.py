"""What both backends accept of a file, and the error that they raise."""

# Demuxers of files that hold their own frames: no playlists, no image sequences, no devices.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
EXTENSIONS = {
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
}
# What a hostile header may make us allocate.
MAX_PIXELS = 8192 * 4608
MAX_BYTES = 1 << 30


class DecodeError(Exception):
    """A file that cannot be decoded; one line that names the file and the reason."""
