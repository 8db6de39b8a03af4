"""Serve the search page to a browser on this machine.

Serves the page, moments, thumbnails and the indexed videos. Videos are requested by their number
in the index: no request contains a path. The addresses of thumbnails and videos are valid for one
run of the server, as another index has other videos under these numbers. At a loopback address, the
default, it serves only requests whose Host header is a loopback name, which protects from DNS
rebinding.
"""

import functools
import io
import ipaddress
import itertools
import math
import os
import secrets
import threading
from urllib.parse import urlsplit

import waitress
from flask import Flask, Response, abort, g, jsonify, render_template, request, send_file

from evaluation.thumbnails import encode_thumbnail
from utils import InputError, one_line, printable
from video_decoder import DecodeError, MemberFile, Source, decode_clip, locate
from video_search.index import (
    Embed,
    Index,
    Moment,
    Video,
    best_moments,
    explain_no_moments,
    format_scores,
    format_timestamp,
    get_moment,
)

MOMENTS = 24  # on the page
# Searches to start with. The page offers the first few whose words the model knows. The captions of
# HowTo100M may come without articles, hence none. The last ones suit the toy data.
SUGGESTIONS = (
    *("cut tomato", "whisk eggs", "stir pan", "knead dough", "paint wall", "plant seeds"),
    *("red ball", "blue star", "white ring spin", "green box rise"),
)
SUGGESTED = 4
THUMBNAIL_SIZE = 192  # pixels
CACHED_THUMBNAILS = 2000  # in memory, some 10 KB each
MAX_RANGE = 4 << 20  # bytes of a video per response, so that a paused player blocks no thread
POLICY = (  # with the nonce of the response
    "default-src 'none'; script-src {0}; style-src {0}; img-src 'self' data:; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
THREADS = 16
MIME_TYPES = {  # under which browsers try to play the containers that some of them know
    **dict.fromkeys((".m4v", ".mov", ".mp4"), "video/mp4"),
    **dict.fromkeys((".mkv", ".webm"), "video/webm"),
    ".ogv": "video/ogg",
}


def create_app(index: Index, embed: Embed, folder: str, host: str | None = "localhost") -> Flask:
    """Create the Flask application.

    folder: the folder of the videos. host: a name that Host headers may have, in addition to
    loopback names; None accepts all names.
    """
    folder = os.path.abspath(folder)  # Flask resolves relative paths otherwise
    run = secrets.token_hex(4)
    app = Flask(__name__, static_folder=None, template_folder=os.path.dirname(__file__) or ".")
    app.json.sort_keys = False
    protect(app, host)
    decoding = threading.Semaphore(len(os.sched_getaffinity(0)))

    suggestions = suggest_searches(embed) if len(index.starts) else []

    @app.get("/")
    def page():
        return render_template(
            "page.html",
            folder=printable(folder),
            videos=sum(not video.reason for video in index.videos),
            windows=len(index.starts),
            suggestions=suggestions,
            empty="" if len(index.starts) else explain_no_moments(index),
        )

    @app.get("/moments")
    def moments():
        try:
            vector, notes = embed(request.args.get("text", ""))
        except InputError as error:
            return jsonify(error=str(error))
        found = best_moments(index, vector, MOMENTS)
        if not found:
            return jsonify(error=f"No moments found: {explain_no_moments(index)}")
        scores = format_scores([moment.score for moment in found])
        shown = [moment_to_json(index, *pair, run) for pair in zip(found, scores, strict=True)]
        return jsonify(notes=notes, moments=shown)

    def check_run(requested):
        if requested != run:
            abort(404, "The server was restarted; search again.")

    @app.get("/thumbnail/<requested_run>/<row>")
    def thumbnail(requested_run, row):
        check_run(requested_run)
        try:
            data = cached_thumbnail(parse_number(row, len(index.starts)))
        except DecodeError as error:
            abort(404, printable(str(error)))
        response = Response(data, mimetype="image/webp")
        response.headers["Cache-Control"] = "private, max-age=3600"
        return response

    @functools.lru_cache(CACHED_THUMBNAILS)
    def cached_thumbnail(row):
        return make_thumbnail(index, folder, row, decoding)

    @app.get("/video/<requested_run>/<number>")
    def video(requested_run, number):
        check_run(requested_run)
        return send_video(folder, index.videos[parse_number(number, len(index.videos))], number)

    return app


def suggest_searches(embed: Embed) -> list[str]:
    """Pick the first SUGGESTED of SUGGESTIONS whose words are all in the vocabulary."""

    def is_known(text):
        try:
            return not embed(text).notes
        except InputError:
            return False

    return list(itertools.islice(filter(is_known, SUGGESTIONS), SUGGESTED))


def protect(app: Flask, host: str | None) -> None:
    """Check the Host header of each request, see create_app, and set the security headers."""

    @app.before_request
    def check_host():
        name = host_name(request.host)
        if host and name != host.lower() and not is_loopback(name):
            abort(403, "This server is for this machine only; open it as localhost.")
        g.nonce = secrets.token_urlsafe()

    @app.after_request
    def add_headers(response):
        policy = POLICY.format(f"'nonce-{g.get('nonce', '')}'")
        response.headers.update({"Content-Security-Policy": policy, **HEADERS})
        return response

    @app.errorhandler(403)
    @app.errorhandler(404)
    @app.errorhandler(500)
    def plain_text_error(error):
        return Response(error.description, error.code, mimetype="text/plain")


def make_thumbnail(index: Index, folder: str, row: int, decoding: threading.Semaphore) -> bytes:
    """Decode the window in a row of the index, and encode it as WebP. Raises DecodeError."""
    moment, settings = get_moment(index, row), index.metadata.settings
    video = index.videos[moment.video]
    locate_video(folder, video)
    with decoding:
        clip = decode_clip(
            os.path.join(folder, video.path),
            moment.start,
            fps=settings["fps"],
            num_frames=settings["num_frames"],
            size=THUMBNAIL_SIZE,
        )
        return encode_thumbnail(clip, size=THUMBNAIL_SIZE, quality=50)


def send_video(folder: str, video: Video, number: str) -> Response:
    """Respond with the file of a video, or with the range of it that is requested."""
    source = locate_video(folder, video)
    limit_range()
    suffix = os.path.splitext(video.path)[1].lower()
    kind = MIME_TYPES.get(suffix, "application/octet-stream")
    # Its own name may have bytes that fit neither into a header nor into an ETag.
    name = f"video{number}{suffix}"
    if source.start is None:
        return send_file(
            source.file, mimetype=kind, download_name=name, conditional=True, etag=False
        )
    response = send_file(
        io.BufferedReader(MemberFile(source)),
        mimetype=kind,
        download_name=name,
        etag=False,
        last_modified=source.mtime_ns // 10**9,
    )
    response.content_length = source.size  # which send_file does not know of such a file
    return response.make_conditional(
        request.environ, accept_ranges=True, complete_length=source.size
    )


def host_name(host: str) -> str:
    """Return the name in a Host header, which may have a port, or '' if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a name or address is a loopback one."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_number(text: str, count: int) -> int:
    """Parse a number in a request, from 0 to count - 1; otherwise respond with 404."""
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) < count):
        abort(404, "The index has no such number.")
    return int(text)


def locate_video(folder: str, video: Video) -> Source:
    """Find the bytes of an indexed video; respond with 404 if it is gone or has changed."""
    if video.reason:
        abort(404, f"It could not be indexed: {printable(video.reason)}")
    try:
        source = locate(os.path.join(folder, video.path))
    except (OSError, ValueError):
        abort(404, f"{printable(video.path)} is gone; index the videos again.")
    if source.size != video.size:
        abort(404, f"{printable(video.path)} has changed; index the videos again.")
    return source


def limit_range() -> None:
    """Shorten a range request to MAX_RANGE, as a server may: players request the rest later."""
    requested = request.range
    if requested and requested.units == "bytes" and len(requested.ranges) == 1:
        begin, end = requested.ranges[0]
        if begin is not None and begin >= 0 and (end is None or end - begin > MAX_RANGE):
            request.environ["HTTP_RANGE"] = f"bytes={begin}-{begin + MAX_RANGE - 1}"


def moment_to_json(index: Index, moment: Moment, score: str, run: str) -> dict:
    """Convert a Moment to the JSON object that the page expects."""
    return {
        "thumbnail": f"thumbnail/{run}/{moment.row}",
        "video": f"video/{run}/{moment.video}",
        "path": printable(index.videos[moment.video].path),
        "start": moment.start,
        "from": format_timestamp(int(moment.start)),
        "to": format_timestamp(math.ceil(moment.end)),
        "score": score,
    }


def create_server(
    index: Index, embed: Embed, folder: str, host: str, port: int
) -> waitress.server.BaseWSGIServer:
    """Listen at an address and print the page's URL; the server's run() serves it.

    Raises ValueError if it cannot listen there.
    """
    try:
        # The application depends on the addresses that the host name resolved to.
        server = waitress.create_server(
            lambda *call: app(*call), host=host, port=port, threads=THREADS, ident=None
        )
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(
            f"cannot listen at {host}, port {port} ({reason}); choose others"
        ) from None
    listening = getattr(server, "effective_listen", None) or [
        (server.effective_host, server.effective_port)
    ]
    local = all(is_loopback(address) for address, _ in listening)
    app = create_app(index, embed, folder, host if local else None)
    if not local:
        print(f"anyone who can reach {host} can search and watch these videos")
    name = f"[{host}]" if ":" in host else host
    print(
        f"http://{name}:{listening[0][1]}/ searches {len(index.starts):,} moments; Ctrl-C stops it",
        flush=True,
    )
    return server
