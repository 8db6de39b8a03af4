"""Take the README's pictures of the demo's pages: python scripts/screenshots.py

Run it after `bash scripts/demo.sh`. It indexes the toy CrossTask videos, which takes about a
minute, and writes docs/images/search.png and docs/images/report.png, the page of the toy YouCook2.
Needs Chromium and its driver, and selenium.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from args import Parser, check_file, get_all_args, make_folder
from evaluate_all import EVALUATIONS
from utils import InputError, atomic_write, run_script

SEARCH = Path(__file__).resolve().parents[1] / "search.py"
WIDTH = 1000  # pixels
REPORT_WIDTH = 1280  # pixels of the page that its picture shows, scaled to WIDTH
MAX_BYTES = 150_000  # per picture
ROWS = 2  # of moments
QUERIES = 2  # on the report
TIMEOUT = 60  # seconds for a page to load
STRIDE = 1.6  # seconds between windows: few enough to index in a minute


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "evaluations",
        type=Path,
        nargs="?",
        default=Path("log/toy.evaluations"),
        help="What the demo's evaluate_all.py wrote (default: %(default)s).",
    )
    parser.add_argument("--text", default="make the green ring fall", help="What to search for.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="The folder.")
    return parser.parse_args()


def start_browser(*arguments: str, **capabilities: Any):
    """Start a headless Chromium with more arguments and capabilities: a selenium driver.

    Raises InputError if something that it needs is missing.
    """
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    try:
        from selenium import webdriver
    except ImportError:
        webdriver = None
    if not webdriver or not all(programs):
        raise InputError(
            "pictures need chromium, chromedriver and the Python package selenium; install them"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")  # /dev/shm of a container is small
    for argument in arguments:
        options.add_argument(argument)
    for name, value in capabilities.items():
        options.set_capability(name, value)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))


@contextlib.contextmanager
def open_browser() -> Iterator:
    """Open a browser in light mode."""
    as_root = os.geteuid() == 0  # when Chromium does not start with its sandbox
    driver = start_browser(*["--no-sandbox"] * as_root)
    try:
        driver.set_script_timeout(TIMEOUT)
        media = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        yield driver
    finally:
        driver.quit()


def open_page(browser, url: str, width: int) -> None:
    """Open a page in a window of that many pixels."""
    size = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(url)


def take_picture(browser, path: Path, width: int, last: str) -> None:
    """Write a picture, WIDTH pixels wide, of the open page down to an element.

    width: of the page. last: a JavaScript expression of the element. It is null before the element
    is shown. The images of the page are awaited as well.
    """
    bottom = browser.execute_async_script(
        f"""
        const done = arguments[0];
        async function look() {{
          const last = {last};
          if (!last) return setTimeout(look, 100);
          const seen = [...document.images].filter((image) => image.y < innerHeight);
          await Promise.all(seen.map((image) => image.decode().catch(() => 0)));
          setTimeout(() => done(Math.ceil(last.getBoundingClientRect().bottom) + 16), 500);
        }}
        look();
        """
    )
    clip = {"x": 0, "y": 0, "width": width, "height": bottom, "scale": WIDTH / width}
    taken = browser.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
    )
    picture = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
    content = compress(picture)
    with atomic_write(path) as file:
        file.write(content)
    print(f"{path}: {picture.width}x{picture.height}, {len(content) / 1000:.0f} kB")


def compress(picture: Image.Image) -> bytes:
    """Encode a picture as PNG with a palette of as many colors as MAX_BYTES allow."""
    for colors in (256, 128, 64, 32, 16):
        file = io.BytesIO()
        palette = picture.quantize(colors, kmeans=1)  # which keeps rare colors
        palette.save(file, "PNG", optimize=True)
        if file.tell() <= MAX_BYTES:
            break
    return file.getvalue()


def index_videos(path: Path, flags: argparse.Namespace) -> None:
    """Index the videos of the toy CrossTask with the weights and clips of the evaluations."""
    command = [
        *(sys.executable, SEARCH, "index", flags.crosstask_root, f"--out={path}"),
        f"--weights={flags.pretrain_cnn_path}",
        f"--token_to_word_path={flags.token_to_word_path}",
        *(f"--num_frames={flags.num_frames}", f"--video_size={flags.video_size}"),
        *(f"--fps={flags.fps}", f"--stride={STRIDE}", f"--amp={flags.amp}"),
    ]
    if subprocess.run(command).returncode:
        raise InputError(
            f"the videos could not be indexed, see above: {shlex.join(map(str, command))}"
        )


@contextlib.contextmanager
def serve_index(path: Path) -> Iterator[str]:
    """Serve the search page: its URL."""
    command = [sys.executable, SEARCH, "serve", path, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().partition(" ")[0]
            if not url:
                raise InputError(f"the search page could not be served, see above; delete {path}")
            yield url
        finally:
            server.terminate()


def main() -> None:
    options = parse_arguments()
    results = options.evaluations / "results.json"
    check_file(results, "EVALUATIONS")
    make_folder(options.out, "out")
    command = json.loads(results.read_text())["command"]
    titles = {evaluation.name: evaluation.title for evaluation in EVALUATIONS}
    flags = get_all_args("", titles, shlex.split(command)[2:])  # after `python evaluate_all.py`
    report = (options.evaluations / "youcook/index.html").resolve()
    check_file(report, "EVALUATIONS")
    with open_browser() as browser:
        open_page(browser, report.as_uri(), REPORT_WIDTH)
        # Neither the best nor the worst queries.
        browser.find_element("css selector", "#order option[value=table]").click()
        browser.execute_script("document.activeElement.blur()")  # the frame of what has focus
        last = f"document.querySelectorAll('.query')[{QUERIES - 1}]"
        take_picture(browser, options.out / "report.png", REPORT_WIDTH, last)
        index = options.evaluations.resolve() / "search.index"
        index_videos(index, flags)
        with serve_index(index) as url:
            text = urllib.parse.urlencode({"text": options.text})
            open_page(browser, f"{url}?{text}", WIDTH)
            browser.execute_script("document.activeElement.blur()")
            columns = "getComputedStyle(moments).gridTemplateColumns.split(' ').length"
            last = f"moments.children[{ROWS} * {columns} - 1]"
            take_picture(browser, options.out / "search.png", WIDTH, last)


if __name__ == "__main__":
    run_script(main)
