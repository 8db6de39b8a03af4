"""The page of --html_report: what is in it, and what a browser shows of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from annotations.crosstask import AnnotatedVideo, Segment, Task
from annotations.htm_align import Sentence
from evaluation.feature_file import FeatureSet
from evaluation.localization import PlacedSentences, crosstask_metrics, place_steps
from evaluation.recognition import Predictions
from evaluation.report import (
    animate_middle_window,
    crosstask_data,
    htm_align_data,
    rank_histogram,
    recognition_data,
    retrieval_data,
    summary_data,
    write_page,
)
from evaluation.results import Results
from evaluation.retrieval import ground_truth_ranks, top_k_videos
from retrieval_loader import Pair
from tests.helpers import open_page, page_errors, requests_of
from utils import DataError

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'> & &amp; <!--",
    "\"quotes\" 'and' `more` ${window.hit = 1} \\u0041 {{ data }}",
    "line\nends\ttabs",
    "Zwiebeln schälen, 切洋葱 🧅 \u2028",
    "\u202eחתכו את הבצל",  # noqa: RUF001
    "half a \ud83e character",
    "",
    "  \n",
    float("nan"),  # pandas' empty cell
]


def textured(seed, windows=3):
    """Windows of a moving pattern with the detail of a film, but not its noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(windows, 3, 4, 12, 12, generator=generator)
    fine = torch.rand(windows, 3, 1, 40, 40, generator=generator)
    size = {"size": (16, 224, 224), "mode": "trilinear"}
    return (200 * interpolate(coarse, **size) + 55 * interpolate(fine, **size)).byte()


PICTURES = [animate_middle_window(textured(seed)) for seed in range(4)]


def pairs_of(count, texts=()):
    """As Retrieval has them: of one long video, so that the segments tell them apart."""
    numbered = [f"stir number {i}, please" for i in range(len(texts), count)]
    return [
        Pair(Path("/films/a b/<b>&.mp4"), float(i), i + 5.5, text)
        for i, text in enumerate([*texts, *numbered])
    ]


def write_retrieval(folder, pairs, scores):
    pictures = [PICTURES[i % len(PICTURES)] for i in range(len(pairs))]
    data = retrieval_data(pairs, "/films", pictures, scores)
    metrics = {"R1": 0.125, "num_videos": len(pairs)}
    results = Results(metrics, {"R1": (1, 8)}, {"R1": (0, 0.5)})
    write_page(folder, "YouCook2", results, [("table", "t")], data)
    return folder / "index.html"


def data_in(page):
    return json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])


def some_scores(count, seed=0):
    """Whole numbers, so that many are ties, and some that are none."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 9, (count, count)) + rng.integers(0, 9, count) * np.eye(count)
    scores[2, 5 % count] = np.nan
    scores[3 % count, 3 % count] = np.nan
    scores[4 % count, 1 % count] = np.inf
    return scores


def test_a_page_of_1000_queries_takes_a_few_megabytes(tmp_path):
    page = write_retrieval(tmp_path, pairs_of(1000), some_scores(1000))
    assert 2e6 < page.stat().st_size < 6e6


def test_a_picture_is_stored_once_however_many_queries_show_it(tmp_path):
    scores = np.tile(np.arange(30.0), (30, 1))  # all texts prefer the same videos
    page = write_retrieval(tmp_path, pairs_of(30), scores)
    assert {v for query in data_in(page)["queries"] for v, _ in query["best"]} == {*range(25, 30)}
    assert page.read_text().count('"picture"') == 30


def test_no_data_can_end_the_element_that_contains_it(tmp_path):
    count = len(HOSTILE)
    page = write_retrieval(tmp_path, pairs_of(count, HOSTILE), some_scores(count))
    inside = page.read_text().partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in inside
    texts = [query["text"] for query in json.loads(inside)["queries"]]
    assert texts == [*HOSTILE[:-1], ""]


def test_the_histogram_has_each_rank_in_one_bin():
    ranks = np.array([1, 1, 2, 5, 6, 10, 11, 50, 51, 60, *[60] * 50])
    assert rank_histogram(ranks) == [
        ("1", 2), ("2-5", 2), ("6-10", 2), ("11-50", 2), ("51-60", 52),
    ]  # fmt: skip
    assert rank_histogram(np.array([1])) == [("1", 1)]
    assert rank_histogram(np.array([1, 6, 2, 3, 4, 5])) == [("1", 1), ("2-5", 4), ("6", 1)]


def outcomes():
    """Three splits of classes a, b, c: two b are taken for a in the first, c is tested there only,
    and d is what one b was taken for, without a test video of its own."""
    first = (np.array(["a", "b", "b", "b", "c"]), np.array(["a", "a", "a", "b", "c"]))
    second = (np.array(["a", "b"]), np.array(["a", "d"]))
    third = (np.array(["a", "b"]), np.array(["c", "b"]))
    return [Predictions(np.arange(len(pair[0])), *pair) for pair in (first, second, third)]


def test_hmdb_classes_confusions_and_pairs_are_counted():
    data = recognition_data(outcomes())
    assert data["classes"] == [
        ("b", 1 / 3, 0, 1, pytest.approx(4 / 9)),
        ("a", 1, 1, 0, pytest.approx(2 / 3)),
        ("c", 1, None, None, 1),
    ]
    assert data["names"] == ["a", "b", "c", "d"]
    assert data["confusion"] == [[2, 0, 1, 0], [2, 2, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert data["confused"] == [("b", "a", 2, 5), ("a", "c", 1, 3), ("b", "d", 1, 5)]


def localized(steps=("pour <b>milk</b>", "whisk", "flip")):
    """A task with two videos of 20 and 2 seconds, and a missing one."""
    tasks = {"1": Task("Make Pancakes", list(steps)), "2": Task("Change a Tire", ["jack up"])}
    videos = {
        "1/a": AnnotatedVideo("1", "a", [Segment(1, 2, 4.5), Segment(2, 9, 30)]),
        "1/b": AnnotatedVideo("1", "b", [Segment(3, 0, 2)]),
    }
    found = FeatureSet({"1/a": np.zeros((20, 4)), "1/b": np.zeros((2, 4))}, {"2/c": "absent"})
    scores = np.zeros((20, 3))
    scores[[4, 8, 15], range(3)] = 1
    placed = {
        "1/a": place_steps(scores, videos["1/a"].segments),
        "1/b": place_steps(scores[:2], videos["1/b"].segments),
    }
    titles = {name: task.title for name, task in tasks.items()}
    metrics = crosstask_metrics({"1": list(placed.values()), "2": []}, titles, num_missing=1)
    return metrics, crosstask_data(tasks, videos, found, placed, metrics["tasks"])


def test_a_timeline_has_the_true_segments_and_the_placed_seconds_of_each_step():
    metrics, data = localized()
    assert data["tasks"] == [("1", "Make Pancakes", pytest.approx(1 / 3), 2, 1, 3)]
    assert data["missing"] == [("2/c", "absent")]
    first, second = data["timelines"]
    assert (first["name"], first["title"], first["seconds"]) == ("a", "Make Pancakes", 20)
    assert (first["hits"], first["total"]) == (1, 2)
    assert first["rows"] == [
        {"text": "pour <b>milk</b>", "segments": [(2, 4.5)], "marks": [(4, True)]},
        {"text": "whisk", "segments": [(9, 30)], "marks": [(8, False)]},
        {"text": "flip", "segments": [], "marks": [(15, None)]},
    ]
    assert [row["marks"] for row in second["rows"]] == [
        [(None, None)],
        [(None, None)],
        [(None, False)],
    ]
    assert (second["hits"], second["total"]) == (0, 1)
    assert metrics["recall"] == pytest.approx(1 / 3)


def aligned():
    sentences = {
        "v": [Sentence(True, 1, 2, "cut"), Sentence(False, 3, 4, "hi"), Sentence(True, 5, 6, "")]
    }
    found = FeatureSet({"v": np.zeros((40, 4))}, {})
    everywhere = PlacedSentences(np.array([1, 7, 30]), np.array([True, False, False]), np.zeros(3))
    windows = PlacedSentences(np.array([-1, 7, 6]), np.array([False, False, True]), np.zeros(3))
    return htm_align_data(sentences, found, [everywhere], [windows])


def test_a_timeline_of_sentences_has_the_alignable_ones_with_both_placements():
    data = aligned()
    [video] = data["timelines"]
    assert (video["hits"], video["total"], data["unit"], data["missing"]) == (1, 2, "sentences", [])
    assert video["rows"] == [
        {"text": "cut", "segments": [(1, 2)], "marks": [(1, True), (None, False)]},
        {"text": "", "segments": [(5, 6)], "marks": [(30, False), (6, True)]},
    ]


def test_a_page_replaces_an_older_one_and_a_failure_is_one_line(tmp_path):
    page = write_retrieval(tmp_path, pairs_of(3), np.eye(3))
    write_retrieval(tmp_path, pairs_of(2), np.eye(2))
    assert len(data_in(page)["queries"]) == 2
    with pytest.raises(DataError, match="could not be written"):
        write_retrieval(tmp_path / "gone", pairs_of(2), np.eye(2))


# In a browser.


def shown_queries(browser):
    """What is on the page of the queries, top to bottom."""
    return browser.execute_script(
        """
        const text = (element, what) => element.querySelector(what).textContent.toWellFormed();
        return [...document.querySelectorAll(".query")].map((query) => ({
          text: text(query, ".text"), rank: text(query, ".rank"),
          videos: [...query.querySelectorAll(".video")].map((video) => ({
            part: text(video, ".name:last-child"), place: text(video, "div"),
            framed: getComputedStyle(video).borderTopColor !== "rgba(0, 0, 0, 0)",
          })),
        }));
        """
    )


def show_all(browser):
    more = browser.find_element("id", "more")
    for _ in range(COUNT // 25):
        more.click()
    assert not more.is_displayed()


def choose(browser, order):
    browser.find_element("css selector", f"#order option[value={order}]").click()


def search(browser, words):
    box = browser.find_element("id", "search")
    box.clear()
    box.send_keys(words or " ")
    return browser.find_element("id", "found").text


COUNT = 60
SCORES = some_scores(COUNT)


@pytest.fixture
def retrieval(browser, tmp_path):
    page = write_retrieval(tmp_path, pairs_of(COUNT, HOSTILE), SCORES)
    open_page(browser, page.as_uri())
    return page.as_uri()


@pytest.mark.slow
def test_the_page_loads_without_an_error_or_a_network(browser, retrieval):
    show_all(browser)
    # A picture that is none would not decode.
    pictures = browser.execute_async_script(
        """
        const done = arguments[0], pictures = [...document.images];
        Promise.all(pictures.map((picture) => picture.decode()))
          .then(() => done(pictures.length), (error) => done(String(error)));
        """
    )
    assert pictures > 5 * COUNT
    assert page_errors(browser) == []
    assert {url for url in requests_of(browser) if not url.startswith("data:image/webp")} == {
        retrieval
    }
    assert browser.title == "YouCook2"
    assert (
        "R1: right video first\n12.5%\n1 of 8, 95% interval 0.0% to 50.0%"
        in browser.find_element("id", "metrics").text
    )
    bars = browser.find_elements("css selector", "#ranks tr")
    assert sum(int(bar.text.split()[-1]) for bar in bars) == COUNT


@pytest.mark.slow
def test_the_right_videos_are_marked_and_no_others(browser, retrieval):
    choose(browser, "table")
    show_all(browser)
    queries = shown_queries(browser)
    assert len(queries) == COUNT
    best, ranks = top_k_videos(SCORES, 5), ground_truth_ranks(SCORES)
    assert set(ranks > 5) == {True, False}
    for text, query in enumerate(queries):
        expected = [*best[text]] + [text] * int(ranks[text] > 5)
        assert query["rank"] == f"rank {ranks[text]}"
        assert [v["part"] for v in query["videos"]] == [f"{v}-{v + 5.5:g} s" for v in expected]
        for place, (video, shown) in enumerate(zip(expected, query["videos"], strict=True), 1):
            right = video == text
            assert shown["framed"] == right
            assert shown["place"] == (f"{ranks[text]}. right" if right else f"{place}. ")


@pytest.mark.slow
def test_queries_are_sorted_as_chosen_and_shown_in_parts(browser, retrieval):
    ranks = ground_truth_ranks(SCORES)
    for order, expected in (
        ("worst", np.argsort(-ranks, kind="stable")),
        ("best", np.argsort(ranks, kind="stable")),
        ("table", range(COUNT)),
    ):
        if order != "worst":  # with which it starts
            choose(browser, order)
        shown = [query["rank"] for query in shown_queries(browser)]
        assert shown == [f"rank {ranks[text]}" for text in expected][:25]
    more = browser.find_element("id", "more")
    assert more.text == "Show 25 more of 35"
    more.click()
    assert len(shown_queries(browser)) == 50 and more.text == "Show 10 more of 10"
    more.click()
    assert len(shown_queries(browser)) == 60 and not more.is_displayed()


@pytest.mark.slow
def test_the_search_finds_queries_by_words_in_any_place_and_case(browser, retrieval):
    assert search(browser, "PLEASE number 42") == "1 of 60 queries"
    assert [query["text"] for query in shown_queries(browser)] == ["stir number 42, please"]
    assert search(browser, "schäl") == "1 of 60 queries"
    assert search(browser, "בצל") == "1 of 60 queries"
    assert search(browser, "<img") == "1 of 60 queries"
    assert search(browser, "stir 42 43") == "0 of 60 queries"
    assert shown_queries(browser) == []
    assert not browser.find_element("id", "more").is_displayed()
    assert search(browser, "stir") == f"{COUNT - len(HOSTILE)} of 60 queries"
    choose(browser, "best")  # keeps what was searched for
    assert browser.find_element("id", "found").text == f"{COUNT - len(HOSTILE)} of 60 queries"
    assert search(browser, "") == "60 of 60 queries"
    assert page_errors(browser) == []


@pytest.mark.slow
def test_hostile_sentences_are_shown_as_they_are_and_do_nothing(browser, retrieval):
    choose(browser, "table")
    texts = [query["text"] for query in shown_queries(browser)][: len(HOSTILE)]
    assert texts[:6] == HOSTILE[:6]
    assert texts[6] == "half a \N{REPLACEMENT CHARACTER} character"  # so the driver passes it on
    assert texts[7:] == ["(empty)"] * 3
    assert browser.execute_script("return window.hit") is None
    names = browser.find_elements("css selector", ".video .name:nth-last-child(2)")
    assert names[0].text == "<b>&.mp4"
    assert names[0].get_attribute("title") == "a b/<b>&.mp4"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 5])
def test_all_videos_are_shown_if_there_are_five_or_fewer(browser, tmp_path, count):
    scores = np.zeros((count, count))
    open_page(browser, write_retrieval(tmp_path, pairs_of(count), scores).as_uri())
    queries = shown_queries(browser)
    assert [len(query["videos"]) for query in queries] == [count] * count
    assert all(query["videos"][-1]["place"] == f"{count}. right" for query in queries)
    assert page_errors(browser) == []


PAGES = ("..", "steps", "sentences")


@pytest.mark.slow
def test_a_narrow_screen_is_not_scrolled_sideways(browser, retrieval, tmp_path):
    names = np.array([f"class_of_a_long_name_{i}" for i in range(51)])
    data = recognition_data([Predictions(np.arange(51), names, names[::-1])] * 3)
    write_page(tmp_path / "..", "HMDB-51", Results({"mean": 0.5}), [], data)
    for name, data in (("steps", localized([*"ab", "x" * 200])[1]), ("sentences", aligned())):
        (tmp_path / name).mkdir()
        write_page(tmp_path / name, name, Results({"R1": None}), [], data)
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for page in (retrieval, *((tmp_path / f"{p}/index.html").as_uri() for p in PAGES)):
            open_page(browser, page)
            assert browser.execute_script("return document.documentElement.scrollWidth") == 400
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_the_page_of_hmdb_has_classes_matrix_and_pairs(browser, tmp_path):
    renamed = [
        Predictions(videos, *(np.char.add("<b>", labels) for labels in pair))
        for videos, *pair in outcomes()
    ]
    results = Results({"split1": 0.6, "mean": 0.5})
    write_page(tmp_path, "HMDB-51", results, [("x", "y")], recognition_data(renamed))
    open_page(browser, (tmp_path / "index.html").as_uri())

    def rows(table):
        return [row.text for row in browser.find_elements("css selector", f"#{table} tbody tr")]

    assert rows("classes") == [
        "<b>b 33.3% 0.0% 100.0% 44.4%",
        "<b>a 100.0% 100.0% 0.0% 66.7%",
        "<b>c 100.0% – – 100.0%",  # noqa: RUF001
    ]
    assert rows("confused") == ["<b>b <b>a 2 5", "<b>a <b>c 1 3", "<b>b <b>d 1 5"]
    cells = browser.find_elements("css selector", "#matrix tbody td")
    shown = [cell.text for cell in cells]
    assert shown == ["2", "", "1", "", "2", "2", "", "1", "", "", "1", "", "", "", "", ""]
    shades = [cell.value_of_css_property("background-color") for cell in cells]
    assert len({shades[0], shades[4], shades[1]}) == 3  # right, wrong, none
    browser.execute_script(
        "arguments[0].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))", cells[4]
    )
    assert browser.find_element("id", "cell").text == "<b>b → <b>a: 2 of 5"
    assert not browser.find_element("id", "retrieval").is_displayed()
    assert page_errors(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize(("count", "tables"), [(51, 2), (6, 1)])
def test_a_recognition_fills_the_width_of_the_page(browser, tmp_path, count, tables):
    names = np.array([f"class_{i:02d}" for i in range(count)])
    data = recognition_data([Predictions(np.arange(count), names, names[::-1])] * 3)
    write_page(tmp_path, "HMDB-51", Results({"mean": 0.5}), [], data)
    open_page(browser, (tmp_path / "index.html").as_uri())
    shown = browser.find_elements("css selector", "#classes table")
    assert len(shown) == tables
    rows = browser.find_elements("css selector", "#classes tbody tr td:first-child")
    assert [row.text for row in rows] == [name for name, *_ in data["classes"]]
    blocks = [*shown, browser.find_element("id", "matrix")] if tables == 1 else shown
    assert len({block.rect["y"] // 100 for block in blocks}) == 1  # side by side
    section = browser.find_element("id", "recognition").rect
    assert blocks[1].rect["x"] > section["x"] + section["width"] / 2
    if tables == 2:
        assert browser.find_element("id", "matrix").rect["width"] > 0.9 * section["width"]
    assert page_errors(browser) == []


@pytest.mark.slow
def test_the_page_of_all_evaluations_has_sources_figures_and_links(browser, tmp_path):
    done = {"title": "<b>UCF", "link": "ucf/index.html", "status": "done", "missing": "1 of 9"}
    done["metrics"] = [("top-1", [("82.7", "paper"), ("82.1", "others")], "50.0%", "4 of 8")]
    failed = {"title": "MSR-VTT", "link": "", "status": "failed: no table", "missing": ""}
    failed["metrics"] = [("R@1", [("9.9", "paper")], "-", ""), ("R@5", [("24", "paper")], "-", "")]
    write_page(tmp_path, "All", Results({}), [("x", "y")], summary_data([done, failed]))
    open_page(browser, (tmp_path / "index.html").as_uri())
    cells = [
        [cell.text for cell in row.find_elements("tag name", "td")]
        for row in browser.find_elements("css selector", "#summary tbody tr")
    ]
    assert cells == [
        ["<b>UCF", "top-1", "50.0%", "82.7: paper\n82.1: others", "4 of 8", "1 of 9"],
        ["MSR-VTT", "R@1", "-", "9.9: paper", "failed: no table", ""],
        ["", "R@5", "-", "24: paper", "", ""],
    ]
    [link] = browser.find_elements("css selector", "#summary a")
    assert link.get_attribute("href") == (tmp_path / "ucf/index.html").as_uri()
    assert not browser.find_element("id", "recognition").is_displayed()
    assert page_errors(browser) == []


@pytest.mark.slow
def test_the_page_of_crosstask_places_marks_on_timelines(browser, tmp_path):
    metrics, data = localized()
    write_page(tmp_path, "CrossTask", Results(metrics), [], data)
    open_page(browser, (tmp_path / "index.html").as_uri())
    [row] = browser.find_elements("css selector", "#tasks tbody tr")
    assert row.text == "Make Pancakes 1 33.3% 2 1 3"
    cards = browser.find_elements("css selector", ".query")
    assert [card.find_element("css selector", ".rank").text for card in cards] == [
        *("0 of 1 steps", "1 of 2 steps"),  # worst first
    ]
    assert cards[1].find_element("css selector", ".rows .text").text == "pour <b>milk</b>"
    tracks = cards[1].find_elements("css selector", ".track")
    for track, (kind, second) in zip(
        tracks, [("mark hit", 4), ("mark miss", 8), ("mark", 15)], strict=True
    ):
        mark = track.find_elements("css selector", "*")[-1]
        assert mark.get_attribute("class") == kind
        left = (mark.rect["x"] - track.rect["x"]) / track.rect["width"]
        assert left == pytest.approx(second / 20, abs=0.01)
        for part in track.find_elements("css selector", "*"):  # the segment to 30 s ends at 20
            assert part.rect["x"] + part.rect["width"] <= track.rect["x"] + track.rect["width"] + 1
    assert "1 missing video" in browser.find_element("id", "missing").text
    assert search(browser, "WHISK pancakes") == "2 of 2 videos"
    assert search(browser, "tire") == "0 of 2 videos"
    assert page_errors(browser) == []


@pytest.mark.slow
def test_the_page_of_htm_align_has_both_placements(browser, tmp_path):
    write_page(tmp_path, "HTM-Align", Results({"R1": 0.5, "AUC": None}), [], aligned())
    open_page(browser, (tmp_path / "index.html").as_uri())
    assert "R@1, all seconds" in browser.find_element("id", "metrics").text
    marks = browser.find_elements("css selector", ".track .mark")
    classes = [mark.get_attribute("class") for mark in marks]
    assert classes == ["mark hit", "mark miss", "mark hit windows"]
    assert browser.find_element("id", "windows-key").is_displayed()
    assert not browser.find_element("id", "steps-key").is_displayed()
    assert page_errors(browser) == []
