"""The server of a search: what it gives out, to whom, and what it does with odd requests."""

import io
import os
import re
import socket
import threading

import pytest
import torch
import waitress
from PIL import Image
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.helpers import make_video, open_page, pack_folder, page_errors
from utils import InputError
from video_search import server as search_server
from video_search.index import EmbeddedText, IndexMetadata, Video, read_index, write_index
from video_search.server import (
    THREADS,
    create_app,
    create_server,
    is_loopback,
    suggest_searches,
)

SETTINGS = {"num_frames": 4, "fps": 5, "video_size": 32}
NOTE = "not in the vocabulary, ignored: zebra"


def embed(text):
    """Embed a text of a vocabulary of two words. All texts are best 6 seconds into a.webm."""
    if not text.strip():
        raise InputError("there is no word in the text: describe what is to be seen")
    if "stir" not in text and "cut" not in text:
        raise InputError(f"none of the words is in the vocabulary ({text[:50]}); use others")
    return EmbeddedText(torch.tensor([1.0, 0.0]), [NOTE] if "zebra" in text else [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    make_video(folder / "a.webm", 10, "-c:v", "libvpx", "-b:v", "200k")
    make_video(folder / "sub/b & <b>.mp4", 3)
    (folder / "secret.txt").write_text("secret")
    (folder / "c.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    """Videos 0: windows each 2 s; 1: could not be used; 2: no longer decodes; 3: two windows."""

    def video(path, starts, scores, reason=""):
        status = os.stat(folder / path)
        vectors = torch.tensor([[score, 0.0] for score in scores]).view(-1, 2)
        starts = torch.tensor(starts, dtype=torch.float64)
        return Video(path, status.st_size, status.st_mtime_ns, reason, starts, vectors)

    (folder / "broken.mp4").write_text("broken")
    path = tmp_path_factory.mktemp("index") / "index"
    videos = [
        video("a.webm", [0, 2, 4, 6, 8], [1, 2, 3, 9, 4]),
        video("broken.mp4", [], [], os.fsdecode(b"films/\xff.mp4: moov atom not found")),
        video("c.mp4", [0], [-5]),
        video("sub/b & <b>.mp4", [0, 1.5], [8, 7]),
    ]
    write_index(path, IndexMetadata(str(folder), SETTINGS, "/w.pth", "/dict.npy"), videos)
    return read_index(path)


@pytest.fixture
def client(index, folder):
    return create_app(index, embed, str(folder)).test_client()


@pytest.fixture
def at(client):
    """The address, in this run of the server, of a "video" or a "thumbnail" by its number."""
    first = client.get("/moments?text=stir").get_json()["moments"][0]
    return lambda kind, number: f"/{first[kind].rpartition('/')[0]}/{number}"


def test_moments_have_all_that_the_page_shows(client):
    answer = client.get("/moments", query_string={"text": "stir it"}).get_json()
    assert answer["notes"] == []
    first, second = answer["moments"][:2]
    run = first["video"].split("/")[1]
    assert first == {
        "thumbnail": f"thumbnail/{run}/3", "video": f"video/{run}/0", "path": "a.webm",
        "start": 6.0, "from": "0:06", "to": "0:07", "score": "9.00",
    }  # fmt: skip
    assert second == {
        "thumbnail": f"thumbnail/{run}/6", "video": f"video/{run}/3", "path": "sub/b & <b>.mp4",
        "start": 0.0, "from": "0:00", "to": "0:01", "score": "8.00",
    }  # fmt: skip
    scores = [moment["score"] for moment in answer["moments"]]
    assert scores == ["9.00", "8.00", "7.00", "4.00", "3.00", "2.00", "1.00", "-5.00"]
    assert client.get("/moments?text=stir+zebra").get_json()["notes"] == [NOTE]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("", "there is no word"),
        ("?text=", "there is no word"),
        ("?text=%20%0A", "there is no word"),
        ("?text=zebra", r"none of the words .*\(zebra\)"),
        ("?text=%00", "none of the words"),
        ("?text=%ED%A0%80", "none of the words"),
        ("?text=%FF%FE", "none of the words"),
        ("?text=" + "z" * 100_000, "none of the words"),
        ("?text=a&text=stir", "none of the words"),
    ],
)
def test_texts_that_cannot_be_searched_for_get_a_one_line_error(client, query, named):
    answer = client.get("/moments" + query)
    assert answer.status_code == 200
    assert re.search(named, answer.get_json()["error"])


def test_an_index_without_moments_is_explained(index, folder, tmp_path):
    about = index.metadata
    write_index(tmp_path / "index", about, [index.videos[1]])
    client = create_app(read_index(tmp_path / "index"), embed, str(folder)).test_client()
    reason = r"1 video could not be used \(films/\\xff.mp4: moov atom not found\); repair"
    assert re.search(reason, client.get("/moments?text=stir").get_json()["error"])
    page = client.get("/").text
    assert re.search(f"0 moments of 0 videos in .*: {reason}", page) and "for example" not in page


def test_searches_are_suggested_whose_words_are_all_in_the_vocabulary(index, folder, monkeypatch):
    texts = ("stir pan", "no such", "stir zebra", "cut tomato", "cut it", "stir", "cut", "stir it")
    monkeypatch.setattr(search_server, "SUGGESTIONS", texts)
    assert suggest_searches(embed) == ["stir pan", "cut tomato", "cut it", "stir"]
    page = create_app(index, embed, str(folder)).test_client().get("/").text
    assert re.findall("<button type=.button.>(.*?)</button>", page) == suggest_searches(embed)
    monkeypatch.setattr(search_server, "SUGGESTIONS", ("no such",))
    page = create_app(index, embed, str(folder)).test_client().get("/").text
    assert "Describe in a few words" in page and "for example" not in page


def test_a_thumbnail_is_a_moving_picture_of_the_window(client, at):
    answer = client.get(at("thumbnail", 3))
    assert answer.status_code == 200 and answer.mimetype == "image/webp"
    with Image.open(io.BytesIO(answer.data)) as picture:
        assert picture.format == "WEBP" and picture.n_frames == 4 and picture.size == (192, 192)
    assert client.get(at("thumbnail", 1)).data != answer.data


def test_a_video_is_served_whole_or_in_ranges(client, folder, at):
    address = at("video", 0)
    content = (folder / "a.webm").read_bytes()
    whole = client.get(address)
    assert whole.status_code == 200 and whole.data == content and whole.mimetype == "video/webm"
    assert whole.headers["Accept-Ranges"] == "bytes"
    part = client.get(address, headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.data == content[100:200]
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(content)}"
    end = client.get(address, headers={"Range": "bytes=-10"})
    assert end.status_code == 206 and end.data == content[-10:]
    beyond = client.get(address, headers={"Range": f"bytes={len(content)}-"})
    assert beyond.status_code == 416
    assert client.head(address).status_code == 200


def test_a_range_is_cut_to_the_maximum(client, folder, at, monkeypatch):
    address = at("video", 0)
    monkeypatch.setattr(search_server, "MAX_RANGE", 1000)
    content = (folder / "a.webm").read_bytes()
    for asked in ("bytes=500-", "bytes=500-999999"):
        part = client.get(address, headers={"Range": asked})
        assert part.status_code == 206 and part.data == content[500:1500]
        assert part.headers["Content-Range"] == f"bytes 500-1499/{len(content)}"
    small = client.get(address, headers={"Range": "bytes=500-509"})
    assert small.data == content[500:510]
    odd = client.get(address, headers={"Range": "bytes=9-1, x"})
    assert odd.status_code in (200, 416)


@pytest.mark.parametrize("number", ["4", "99", "-1", "1e0", "٠", "9" * 5000, "x", "0x1", "%00"])  # noqa: RUF001
def test_numbers_that_are_not_in_the_index_are_not_found(client, at, number):
    assert client.get(at("video", number)).status_code == 404
    if number != "4":
        assert client.get(at("thumbnail", number)).status_code == 404


def test_errors_of_videos_and_thumbnails_are_plain_text(client, at):
    unused, broken = client.get(at("video", 1)), client.get(at("thumbnail", 5))
    assert unused.status_code == 404
    assert unused.text == "It could not be indexed: films/\\xff.mp4: moov atom not found"
    assert broken.status_code == 404 and "Invalid data" in broken.text
    assert "\n" not in broken.text and broken.mimetype == "text/plain"


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt", "/a.webm", "/video/a.webm", "/video/../secret.txt",
        "/video/0/../../secret.txt",
        "/video/%2e%2e%2fsecret.txt", "/video//etc/passwd", "/video/%2Fetc%2Fpasswd",
        "/thumbnail/../search.py", "/search_page.html", "/static/search.py", "/video/",
        "/thumbnail/", "/.//secret.txt", "/video/0?path=/etc/passwd&file=secret.txt",
    ],
)  # fmt: skip
def test_no_request_reaches_a_path(client, at, path):
    if path.startswith(("/video/", "/thumbnail/")):
        _, kind, rest = path.split("/", 2)
        path = at(kind, rest)
    answer = client.get(path, follow_redirects=True)
    assert answer.status_code == (200 if "?" in path else 404)
    assert b"secret" not in answer.data and b"root:" not in answer.data


def test_addresses_of_an_earlier_run_of_the_server_are_not_found(client, at, index, folder):
    later = create_app(index, embed, str(folder)).test_client()
    for address in (at("thumbnail", 0), at("video", 0)):
        assert client.get(address).status_code == 200
        answer = later.get(address)
        assert answer.status_code == 404 and "search again" in answer.text


def test_files_of_any_name_in_a_relative_folder_are_served(tmp_path, monkeypatch):
    name = os.fsdecode(b"\xff.mp4")
    make_video(tmp_path / "films" / name, 1)
    status = os.stat(tmp_path / "films" / name)
    starts, vectors = torch.zeros(1, dtype=torch.float64), torch.ones(1, 2)
    video = Video(name, status.st_size, status.st_mtime_ns, "", starts, vectors)
    about = IndexMetadata(str(tmp_path / "elsewhere"), SETTINGS, "/w.pth", "/dict.npy")
    write_index(tmp_path / "index", about, [video])
    monkeypatch.chdir(tmp_path)
    client = create_app(read_index(tmp_path / "index"), embed, "films").test_client()
    (found,) = client.get("/moments?text=stir").get_json()["moments"]
    assert found["path"] == "\\xff.mp4"
    answer = client.get(found["video"])
    assert answer.status_code == 200 and answer.mimetype == "video/mp4"
    assert answer.data == (tmp_path / "films" / name).read_bytes()
    assert client.get(found["thumbnail"]).mimetype == "image/webp"


def test_a_video_in_a_tar_file_is_served_in_ranges(folder, tmp_path):
    content = (folder / "a.webm").read_bytes()
    shard = pack_folder(folder, tmp_path / "films/s.tar", ["secret.txt", "a.webm", "c.mp4"])
    video = Video("s.tar/a.webm", len(content), shard.stat().st_mtime_ns, "", *one_window())
    about = IndexMetadata(str(tmp_path / "films"), SETTINGS, "/w.pth", "/dict.npy")
    write_index(tmp_path / "index", about, [video])
    client = create_app(read_index(tmp_path / "index"), embed, tmp_path / "films").test_client()
    (found,) = client.get("/moments?text=stir").get_json()["moments"]
    assert client.get(found["thumbnail"]).mimetype == "image/webp"
    answer = client.get(found["video"])
    assert answer.status_code == 200 and answer.data == content
    assert answer.mimetype == "video/webm" and answer.content_length == len(content)
    assert answer.headers["Accept-Ranges"] == "bytes"
    for wanted, part in {"0-9": slice(10), "500-": slice(500, None), "-7": slice(-7, None)}.items():
        answer = client.get(found["video"], headers={"Range": f"bytes={wanted}"})
        assert answer.status_code == 206 and answer.data == content[part]
        assert answer.headers["Content-Range"].endswith(f"/{len(content)}")
    beyond = {"Range": f"bytes={len(content)}-"}
    assert client.get(found["video"], headers=beyond).status_code == 416
    pack_folder(folder, shard, ["secret.txt", "c.mp4"])
    assert client.get(found["video"]).text == "s.tar/a.webm is gone; index the videos again."


def one_window():
    return torch.zeros(1, dtype=torch.float64), torch.ones(1, 2)


def test_a_file_that_is_gone_or_has_changed_is_not_served(client, at, folder):
    path = folder / "a.webm"
    content, times = path.read_bytes(), path.stat()
    try:
        path.write_bytes(content + b"more")
        for address in (at("video", 0), at("thumbnail", 0)):
            answer = client.get(address)
            assert answer.status_code == 404
            assert answer.text == "a.webm has changed; index the videos again."
        path.unlink()
        assert client.get(at("video", 0)).text == "a.webm is gone; index the videos again."
        path.mkdir()
        assert client.get(at("video", 0)).status_code == 404
        path.rmdir()
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("path", ["/", "/moments?text=stir", "/thumbnail/0", "/video/0", "/none"])
def test_other_host_names_are_rejected_and_every_response_has_security_headers(client, at, path):
    if path.endswith("/0"):
        path = at(path.split("/")[1], 0)
    for host in (
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "[",
        "10.0.0.1",
        "@",
    ):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code in (400, 403), host
        assert b"WEBP" not in answer.data and b"moments" not in answer.data
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == (404 if path == "/none" else 200), host
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'nonce-")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_without_a_host_name_all_names_are_accepted(index, folder):
    client = create_app(index, embed, str(folder), host=None).test_client()
    assert client.get("/", headers={"Host": "films.example"}).status_code == 200


def test_the_given_host_name_is_accepted_besides_loopback_names(index, folder):
    client = create_app(index, embed, str(folder), host="Box").test_client()
    for host, status in (("box:8000", 200), ("localhost", 200), ("evil.example", 403)):
        assert client.get("/", headers={"Host": host}).status_code == status


def test_the_policy_allows_only_scripts_with_the_nonce_of_the_response(client):
    pages = [client.get("/") for _ in range(2)]
    nonces = [set(re.findall('nonce="([^"]+)"', page.text)) for page in pages]
    for page, own in zip(pages, nonces, strict=True):
        assert (
            len(own) == 1
            and f"'nonce-{own.copy().pop()}'" in page.headers["Content-Security-Policy"]
        )
    assert nonces[0] != nonces[1]
    assert "8 moments of 3 videos" in pages[0].text


def test_loopback_names_and_addresses_are_recognized():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "10.0.0.1", "example.org", "localhost.evil")))


@pytest.mark.parametrize(
    ("host", "only"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("*", None), ("0.0.0.0", None)],
)
def test_the_addresses_listened_at_decide_which_host_names_are_accepted(
    index, folder, monkeypatch, capsys, host, only
):
    names = []
    monkeypatch.setattr(search_server, "create_app", lambda *given: names.append(given[-1]))
    create_server(index, embed, str(folder), host, 0).close()
    assert names == [only]
    assert ("anyone who can reach" in capsys.readouterr().out) == (only is None)


@pytest.mark.parametrize("host", ["no such host", "203.0.113.1", "::g"])
def test_an_unusable_host_is_rejected_in_one_line(index, folder, host):
    with pytest.raises(ValueError, match="cannot listen at") as refused:
        create_server(index, embed, str(folder), host, 0)
    assert "\n" not in str(refused.value)


def test_a_port_in_use_is_rejected_in_one_line(index, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1, port {port}"):
            create_server(index, embed, str(folder), "127.0.0.1", port)


@pytest.fixture
def address(index, folder, monkeypatch):
    """A server that runs, and gives out a video in many pieces."""
    monkeypatch.setattr(search_server, "MAX_RANGE", 20_000)
    assert (folder / "a.webm").stat().st_size > 100_000
    app = create_app(index, embed, str(folder))
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=THREADS)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}/"
    server.close()


@pytest.mark.slow
def test_in_a_browser_typing_shows_moments_and_a_click_plays_from_there(browser, address):
    wait = WebDriverWait(browser, 30).until

    def found():
        return browser.find_elements("css selector", "#moments li")

    def message():
        return browser.find_element("id", "message").text

    open_page(browser, address)
    assert browser.title == "Search videos" and "8 moments of 3 videos" in message()
    box = browser.find_element("name", "text")
    box.send_keys("stir zebra")
    wait(lambda _: found())
    assert message() == f"8 moments; {NOTE}"
    assert len(found()) == 8
    assert found()[0].text.split("\n") == ["a.webm", "0:06 – 0:07", "9.00"]  # noqa: RUF001
    assert found()[1].text.startswith("sub/b & <b>.mp4")
    wait(
        lambda _: browser.execute_script(
            "const picture = document.images[0]; return picture.complete && picture.naturalWidth"
        )
    )
    wait(lambda _: "no picture" in found()[7].text)
    assert found()[7].text.split("\n")[1] == "c.mp4"
    (told,) = page_errors(browser)  # of the video that is none
    assert re.search("thumbnail/[0-9a-f]{8}/5", told) and "404" in told

    before = found()[0]
    box.send_keys(Keys.ENTER)  # the same text again, as after the server was started again
    wait(lambda _: len(found()) == 8 and found()[0] != before)
    wait(lambda _: "no picture" in found()[7].text)
    assert len(page_errors(browser)) == 1  # of that picture again

    found()[0].click()
    wait(lambda _: browser.execute_script("return document.querySelector('video').currentTime > 6"))
    played = "const played = document.querySelector('video').played;"
    assert browser.execute_script(f"{played} return played.length") == 1
    assert 5.9 <= browser.execute_script(f"{played} return played.start(0)") < 6.5
    assert browser.find_element("id", "caption").text == "a.webm, 0:06 – 0:07"  # noqa: RUF001
    browser.find_element("css selector", "dialog button").click()
    wait(lambda _: not browser.find_element("css selector", "dialog").is_displayed())

    box.clear()
    box.send_keys("zebra")
    wait(lambda _: "none of the words is in the vocabulary (zebra)" in message())
    assert found() == []
    assert page_errors(browser) == []
    assert browser.current_url == f"{address}?text=zebra"


def found_in(browser):
    return browser.find_elements("css selector", "#moments li")


@pytest.mark.slow
def test_in_a_browser_the_first_search_is_a_click_away(browser, address):
    wait = WebDriverWait(browser, 30).until
    open_page(browser, address)
    start = browser.find_element("id", "start")
    suggestions = start.find_elements("css selector", "button")
    assert [button.text for button in suggestions] == ["cut tomato", "stir pan"]
    suggestions[1].click()
    wait(lambda _: len(found_in(browser)) == 8)
    assert not start.is_displayed()
    assert browser.current_url == f"{address}?text=stir+pan"
    box = browser.find_element("name", "text")
    assert browser.switch_to.active_element == box and box.get_attribute("value") == "stir pan"
    box.clear()
    box.send_keys("none", Keys.ENTER)
    wait(lambda _: start.is_displayed())  # with the message that none of the words is known
    assert "(none)" in browser.find_element("id", "message").text and found_in(browser) == []


@pytest.mark.slow
def test_in_a_browser_keys_are_enough_to_search_choose_and_play(browser, address):
    wait = WebDriverWait(browser, 30).until

    def press(key):
        browser.switch_to.active_element.send_keys(key)
        return browser.switch_to.active_element

    open_page(browser, address)
    press("stir")
    press(Keys.ENTER)
    wait(lambda _: len(found_in(browser)) == 8)
    cards = browser.find_elements("css selector", "#moments button")
    columns = len({card.rect["x"] for card in cards})
    assert 1 < columns < 8
    assert press(Keys.TAB).text == "Search" and press(Keys.TAB) == cards[0]
    assert cards[0].value_of_css_property("outline-style") == "solid"
    assert press(Keys.ARROW_RIGHT) == cards[1] and press(Keys.ARROW_DOWN) == cards[-1]
    assert press(Keys.ARROW_LEFT) == cards[-2]
    assert press(Keys.ARROW_UP) == cards[6 - columns]
    while press(Keys.ARROW_UP).tag_name == "button":
        pass
    assert browser.switch_to.active_element.get_attribute("name") == "text"
    assert press(Keys.ARROW_DOWN) == cards[0]
    assert press(Keys.ENTER).text == "Close"
    dialog = browser.find_element("css selector", "dialog")
    assert dialog.is_displayed()
    assert press(Keys.ESCAPE) == cards[0] and not dialog.is_displayed()


@pytest.mark.slow
def test_in_a_browser_an_error_in_the_middle_of_a_video_is_explained(browser, tmp_path):
    make_video(tmp_path / "a.mp4", 12, "-g", "10", "-movflags", "+faststart")
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    for place in range(len(content) // 2, len(content)):
        content[place] = place * 7919 % 256
    (tmp_path / "a.mp4").write_bytes(content)
    status = os.stat(tmp_path / "a.mp4")
    video = Video("a.mp4", len(content), status.st_mtime_ns, "", *one_window())
    write_index(tmp_path / "index", IndexMetadata(str(tmp_path), SETTINGS, "", ""), [video])
    app = create_app(read_index(tmp_path / "index"), embed, str(tmp_path))
    server = waitress.create_server(app, host="127.0.0.1", port=0, threads=THREADS)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        open_page(browser, f"http://127.0.0.1:{server.effective_port}/?text=stir")
        wait = WebDriverWait(browser, 30).until
        wait(lambda _: found_in(browser))
        browser.find_element("css selector", "#moments button").click()
        caption = browser.find_element("id", "caption")
        wait(lambda _: caption.text.startswith("Stopped at 0:0"))
        assert "a.mp4 is damaged there, or this browser cannot decode it" in caption.text
        assert caption.text.endswith("open the file in a player, at 0:00.")
        assert browser.find_element("css selector", "dialog video").is_displayed()
    finally:
        server.close()
