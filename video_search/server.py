"""The page of a search: a small web server for the browser of the person who runs it.

It gives out the page, moments, thumbnails and the indexed videos, which are asked for by their
number in the index: no request names a path. The addresses of pictures and videos are of one run of
the server: with another index they would lead to others. At a loopback address, the default, it
answers only to requests that call it so: a foreign page cannot have its own name lead here and read
the answers.
"""

import functools
import ipaddress
import math
import os
import secrets
import stat
import threading
from urllib.parse import urlsplit

import waitress
from flask import Flask, Response, abort, g, jsonify, render_template, request, send_file

from evaluation.thumbnails import thumbnail
from utils import InputError, one_line, printable
from video_decoder import DecodeError, decode_clips
from video_search.index import best_moments, format_timestamp, moment

MOMENTS = 24  # on the page
THUMBNAIL = 192  # pixels
KEPT = 2000  # thumbnails in memory, some 10 KB each
PIECE = 4 << 20  # bytes of a video in one answer: a player that pauses holds up no thread
THREADS = 16
KINDS = {  # as what browsers try to play the containers that some of them know
    **dict.fromkeys((".m4v", ".mov", ".mp4"), "video/mp4"),
    **dict.fromkeys((".mkv", ".webm"), "video/webm"),
    ".ogv": "video/ogg",
}


def create_app(index, embed, folder, host="localhost"):
    """The Flask application. embed: from a text to its embedding and notes, or an InputError.

    host: a name of this machine to itself, by which it may be called besides localhost; None where
    all who ask by whatever name are answered.
    """
    folder = os.path.abspath(folder)  # Flask's own idea of a relative path is another
    run = secrets.token_hex(4)
    app = Flask(__name__, static_folder=None, template_folder=os.path.dirname(__file__) or ".")
    app.json.sort_keys = False
    decoding = threading.Semaphore(len(os.sched_getaffinity(0)))

    @app.before_request
    def check_host():
        name = host_name(request.host)
        if host and name != host.lower() and not is_loopback(name):
            abort(403, "This server is for this machine only: call it localhost.")
        g.nonce = secrets.token_urlsafe()

    @app.after_request
    def protect(response):
        own = f"'nonce-{g.get('nonce', '')}'"
        response.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src {own}; style-src {own}; img-src 'self' data:; "
            "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.errorhandler(403)
    @app.errorhandler(404)
    @app.errorhandler(500)
    def in_words(error):
        return Response(error.description, error.code, mimetype="text/plain")

    @app.get("/")
    def page():
        return render_template(
            "page.html",
            folder=printable(folder),
            videos=sum(not video.reason for video in index.videos),
            windows=len(index.starts),
        )

    @app.get("/moments")
    def moments():
        try:
            vector, notes = embed(request.args.get("text", ""))
        except InputError as error:
            return jsonify(error=str(error))
        found = best_moments(index, vector, MOMENTS)
        return jsonify(notes=notes, moments=[described(index, one, run) for one in found])

    def check_run(asked):
        if asked != run:
            abort(404, "The server has been started again since: search again.")

    @app.get("/thumbnail/<asked>/<row>")
    def picture(asked, row):
        check_run(asked)
        try:
            data = draw(numbered(row, len(index.starts)))
        except DecodeError as error:
            abort(404, printable(str(error)))
        response = Response(data, mimetype="image/webp")
        response.headers["Cache-Control"] = "private, max-age=3600"
        return response

    @functools.lru_cache(KEPT)
    def draw(row):
        place = moment(index, row)
        path = video_file(folder, index.videos[place.video])
        settings = index.about.settings
        with decoding:
            clips = decode_clips(
                path,
                [place.start],
                fps=settings["fps"],
                num_frames=settings["num_frames"],
                size=THUMBNAIL,
            )
            return thumbnail(clips[0], size=THUMBNAIL, quality=50)

    @app.get("/video/<asked>/<number>")
    def video(asked, number):
        check_run(asked)
        path = video_file(folder, index.videos[numbered(number, len(index.videos))])
        ask_for_a_piece()
        ending = os.path.splitext(path)[1].lower()
        kind = KINDS.get(ending, "application/octet-stream")
        # Its own name may have bytes that fit neither into a header nor into an ETag.
        name = f"video{number}{ending}"
        return send_file(path, mimetype=kind, download_name=name, conditional=True, etag=False)

    return app


def host_name(host):
    """The name in a Host header, which may have a port, or ''."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host):
    """Whether a name or address is that of this machine to itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def numbered(text, count):
    """The number, from 0 and below count, that a request asks for."""
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) < count):
        abort(404, "There is nothing of this number in the index.")
    return int(text)


def video_file(folder, video):
    """The path of an indexed video's file, which is still as it was."""
    if video.reason:
        abort(404, f"It could not be indexed: {printable(video.reason)}")
    path = os.path.join(folder, video.path)
    try:
        status = os.stat(path)
    except OSError:
        status = None
    if not status or not stat.S_ISREG(status.st_mode):
        abort(404, f"{printable(video.path)} is gone: index the videos again.")
    if status.st_size != video.size:
        abort(404, f"{printable(video.path)} has changed: index the videos again.")
    return path


def ask_for_a_piece():
    """Shortens a request for a large part of a file, as a server may: players ask for the rest."""
    asked = request.range
    if asked and asked.units == "bytes" and len(asked.ranges) == 1:
        begin, end = asked.ranges[0]
        if begin is not None and begin >= 0 and (end is None or end - begin > PIECE):
            request.environ["HTTP_RANGE"] = f"bytes={begin}-{begin + PIECE - 1}"


def described(index, found, run):
    """A Moment as the page has it."""
    return {
        "thumbnail": f"thumbnail/{run}/{found.row}",
        "video": f"video/{run}/{found.video}",
        "path": printable(index.videos[found.video].path),
        "start": found.start,
        "from": format_timestamp(int(found.start)),
        "to": format_timestamp(math.ceil(found.end)),
        "score": round(found.score, 3),
    }


def serve_index(index, embed, folder, host, port):
    """Serves the page until Ctrl-C. Raises InputError where it cannot listen there."""
    try:
        # Who is to be answered is known when it listens: the application comes after.
        server = waitress.create_server(
            lambda *call: app(*call), host=host, port=port, threads=THREADS, ident=None
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"--host, --port: cannot listen at {host}, port {port} ({one_line(error)}): choose "
            "others"
        ) from None
    listening = getattr(server, "effective_listen", None) or [
        (server.effective_host, server.effective_port)
    ]
    local = all(is_loopback(address) for address, _ in listening)  # what the name has led to
    app = create_app(index, embed, folder, host if local else None)
    if not local:
        print(f"everybody who can reach {host} can search these videos and see them")
    name = f"[{host}]" if ":" in host else host
    print(
        f"http://{name}:{listening[0][1]}/ shows {len(index.starts)} windows; Ctrl-C ends it",
        flush=True,
    )
    server.run()
