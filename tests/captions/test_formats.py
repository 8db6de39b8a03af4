"""Caption files of one video: subtitles, Whisper's JSON and CSV, recognized by their content."""

import json
import re

import pytest

from captions.formats import Cue, parse_transcript, unroll
from captions.readers import CaptionError
from tests.helpers import rolling_vtt

SPOKEN = [
    (0.16, 2.4, "hi guys today"),
    (2.4, 4.8, "we're going to make a"),
    (4.8, 6.5, "cake"),
    (6.5, 8.0, "cake"),
    (20.0, 22.0, ">> [Music] & flour"),
    (22.0, 3725.5, "done"),
]


def parse(text, source="talk.vtt"):
    (starts, ends, texts), *rest = parse_transcript(source, text.encode())
    return list(zip(starts.tolist(), ends.tolist(), texts, strict=True)), *rest


def refusal(data, source="talk.vtt"):
    with pytest.raises(CaptionError) as refused:
        parse_transcript(source, data)
    message = str(refused.value)
    assert message.startswith(f"{source}: ") and "\n" not in message
    return message


def without_hold(lines):
    return [(start, round(end - 0.01, 3), text) for start, end, text in lines]


# ---- subtitles -----------------------------------------------------------------------------------


def test_each_line_of_youtubes_rolling_subtitles_is_returned_once_with_its_own_times():
    text = rolling_vtt(SPOKEN).replace(">>", "&gt;&gt;").replace(" & ", " &amp; ")
    assert text.count("we're going to make a") == 2  # and once with tags
    assert parse(text) == (without_hold(SPOKEN), "WebVTT", "en")


def test_after_a_pause_the_window_may_be_empty_or_still_show_the_line_before():
    shown = rolling_vtt(SPOKEN)
    assert "cake\n>>" in shown
    assert parse(shown.replace("cake\n>>", " \n>>"))[0] == without_hold(SPOKEN)


def test_rolling_subtitles_may_have_windows_line_ends_and_a_byte_order_mark():
    text = "\ufeff" + rolling_vtt(SPOKEN[:3]).replace("\n", "\r\n")
    assert parse(text)[0] == without_hold(SPOKEN[:3])


def to_srt(vtt):
    """Convert as programs do: without tags, without lines of spaces, with numbers."""
    blocks = re.sub(r"<[^>]*>", "", vtt).split("\n\n")[1:-1]
    lines = [[line for line in block.split("\n") if line.strip()] for block in blocks]
    for number, block in enumerate(lines, 1):
        times = block[0].removesuffix(" align:start position:0%").replace(".", ",")
        block[:1] = [str(number), times]
    return "".join("\n".join(block) + "\n\n" for block in lines)


def test_rolling_subtitles_converted_to_subrip_do_not_repeat_lines_either():
    text = to_srt(rolling_vtt(SPOKEN))
    assert text.startswith("1\n00:00:00,160 --> 00:00:02,390\nhi guys today\n\n2\n")
    assert parse(text, "talk.srt") == (without_hold(SPOKEN), "SubRip", "")


SUBRIP = """1
00:00:01,000 --> 00:00:02,500
<i>Stir</i>
the batter.

2
00:00:02,500 --> 00:00:03,000
Stir.

3
00:00:03,000 --> 01:00:04,000
Stir.

4
01:00:05,000 --> 01:00:06,000

"""


@pytest.mark.parametrize("kind", ["SubRip", "WebVTT"])
def test_subtitles_that_do_not_roll_keep_what_they_repeat(kind):
    webvtt = "WEBVTT\n\nNOTE made by hand\n\n" + re.sub(r"(\d),(\d)", r"\1.\2", SUBRIP)
    expected = [(1, 2.5, "Stir the batter."), (2.5, 3, "Stir."), (3, 3604, "Stir.")]
    assert parse({"SubRip": SUBRIP, "WebVTT": webvtt}[kind]) == (expected, kind, "")


def cues(*rows):
    return [Cue(start, end, text.split("/"), [False] * 4) for start, end, text in rows]


def texts(shown):
    return [(cue.start, "/".join(cue.lines)) for cue in shown]


def test_a_line_that_is_shown_again_after_a_pause_is_spoken_again():
    rolled = unroll(cues((0, 1, "cake"), (5, 6, "cake"), (6, 6.01, "cake")), rolls=True)
    assert texts(rolled) == [(0, "cake"), (5, "cake")]


def test_two_lines_may_roll_at_once():
    shown = cues((0, 1, "a/b"), (1, 2, "a/b/c"), (2, 2.01, "b/c"), (2.01, 4, "c/d/e"))
    assert texts(unroll(shown)) == [(0, "a/b"), (1, "c"), (2.01, "d/e")]


@pytest.mark.parametrize(
    "shown", [[(0, 1, "no"), (1, 2, "no"), (2, 3, "no/- yes")], [(0, 1, "again"), (1, 2, "again")]]
)
def test_subtitles_without_a_hold_do_not_roll(shown):
    assert texts(unroll(cues(*shown))) == [(start, text) for start, _, text in shown]


def test_a_line_whose_words_have_times_is_spoken_even_if_it_was_just_shown():
    twice = [(0, 2, "stir it"), (2, 4, "stir it")]
    one_line = rolling_vtt(twice).replace(" \nstir<", "stir<").replace("stir it\nstir<", "stir<")
    assert parse(one_line)[0] == without_hold(twice)


@pytest.mark.parametrize("bad", ["00:03.000 --> 00:0x.000", "00:03.000 -->", "1:0 --> 00:61.000"])
def test_a_cue_with_invalid_times_is_skipped(bad):
    vtt = f"{VTT}{bad}\nthere\n\n00:05.000 --> 00:06.000\nyou\n"
    assert parse(vtt)[0] == [(1, 2, "hello"), (5, 6, "you")]
    srt = SUBRIP.replace("00:00:02,500 --> 00:00:03,000", bad)
    assert [text for _, _, text in parse(srt)[0]] == ["Stir the batter.", "Stir."]


def test_subrips_fractions_and_styles_are_read_and_captions_sorted():
    srt = SUBRIP.replace("01,000", "03,5").replace("02,500", "02,1234567", 1)
    found = parse(srt.replace("Stir.", "{\\an8}Stir{!}"))[0]
    assert found == [(2.5, 3, "Stir{!}"), (3, 3604, "Stir{!}"), (3.5, 2.123, "Stir the batter.")]


# ---- JSON ----------------------------------------------------------------------------------------


def test_whispers_segments_are_the_captions():
    segments = [
        {"id": 0, "start": 0.5, "end": 2, "text": " Hello.", "words": [{"word": "Hello."}]},
        {"start": 2, "end": None, "text": "no end"},
        {"start": 2, "text": "no end"},
        {"start": 5, "end": 6, "text": "later"},
        {"start": 3.25, "end": 4, "text": "日本 "},
    ]
    text = json.dumps({"segments": segments, "word_segments": [], "language": "de"})
    expected = [(0.5, 2, "Hello."), (3.25, 4, "日本"), (5, 6, "later")]
    assert parse(text, "talk.json") == (expected, "Whisper JSON", "de")
    assert parse(json.dumps({"segments": segments}))[2] == ""


def test_csv_may_have_arrows_and_brackets_in_its_texts():
    assert parse("start,end,text\n0,1,a --> b\n1,2,<c>\n") == (
        [(0, 1, "a --> b"), (1, 2, "<c>")],
        "CSV",
        "",
    )


# ---- invalid files -------------------------------------------------------------------------------

VTT = "WEBVTT\n\n00:01.000 --> 00:02.000\nhello\n\n"
SEGMENT = {"start": 0, "end": 1, "text": "a"}
WRONG = {
    "": "is empty",
    " \n": "is empty",
    "<!DOCTYPE html><html>Sign in to continue</html>": "is HTML",
    "\n <html>": "is HTML",
    "hello\n": "no column",
    "WEBVTT\n": "no caption with usable times",
    "WEBVTT\n\n00:01.000 --> 00:02.000\n\n": "no caption with usable times",
    VTT.replace("2.000", "61.000"): "line 3: '00:01.000 --> 00:061.000' are not valid cue times",
    f"Kind: captions\n{VTT}": "has subtitle times, but does not start like WebVTT or SubRip",
    "1\n\n": "no column",
    "1\n00:00:01,000 --> 2\nhello\n": "line 2: '00:00:01,000 --> 2' are not valid",
    "00:00:01,000 --> 00:00:02,000\nhello\n\n": "Invalid format",
    "{": "is not JSON",
    "[1, 2]": "without Whisper's list 'segments'",
    '{"a": {"start": [1], "end": [2], "text": ["x"]}}': "without Whisper's list 'segments'",
    '{"segments": {}}': "without Whisper's list 'segments'",
    '{"segments": []}': "no caption with usable times",
    '{"segments": [{"start": 0, "end": 1}]}': "'segments' lacks the lists",
    '{"segments": ["a"]}': "'segments' lacks the lists",
    json.dumps({"segments": [{**SEGMENT, "start": "0s"}]}): "a time of 'segments' is not a number",
    json.dumps({"segments": [{**SEGMENT, "text": 1}]}): "a text of 'segments' is not a string",
    json.dumps({"segments": [SEGMENT], "language": 3}): "'language' is '3', not a string",
    json.dumps({"segments": [{**SEGMENT, "end": 1e9}]}): "no caption with usable times",
    '{"segments": ' + "[" * 100_000: "recursion",
}


@pytest.mark.parametrize(("text", "reason"), WRONG.items(), ids=range(len(WRONG)))
def test_an_invalid_caption_file_is_one_line_with_the_reason(text, reason):
    assert reason in refusal(text.encode())


@pytest.mark.parametrize("codec", ["latin-1", "utf-16"])
def test_captions_that_are_not_utf_8_are_refused(codec):
    assert "is not UTF-8" in refusal(f"{VTT}00:03.000 --> 00:04.000\ncafé\n".encode(codec))
