"""Draw the toy data set: narrated how-to videos, and held-out evaluation sets beside them.

    python data/toy/prepare.py                      # the default: 160 videos of about half a minute
    python data/toy/prepare.py --num_videos 24      # seconds, for tests

In each video, a few coloured shapes move in front of a dim backdrop, in steps of two to four
seconds. The narration is as unreliable as that of HowTo100M. A caption names the colour, the shape
and the action of a step, but may be a few seconds early or late, and about one sentence in three is
idle talk. Learning from it requires several candidate captions per clip, as MIL-NCE has. Layouts
and formats are those of the real data sets:

    videos/toy00000.mp4 ...   captions/toy00000.csv ...   howto100m_videos.csv
    word2vec.pth   dict.npy
    youcook/validation/<task>/<video>.{mp4,mkv,webm}      validation_youcook.csv
    msrvtt/<video>.mp4                                    msrvtt_test.csv
    hmdb/<label>/<video>.avi                              hmdb51.csv
    ucf/<class>/<video>.avi                               ucfTrainTestlist/
    crosstask/<task>/<video>.mp4                          crosstask_release/
    htm_align/<video>.mp4                                 htm_align.json

The evaluation sets have a fixed size, whatever --num_videos is, so that runs on more or fewer
training videos have comparable metrics. They share no random stream with the training videos.
"""

import concurrent.futures
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from args import Parser, positive
from utils import InputError, run_script

WIDTH, HEIGHT = 320, 240
MARGIN = 12  # pixels that the camera may drift; the backdrop is that much larger on each side
FPS = 25
# HMDB-51 windows have the file's own frame rate. At 25 fps, 4 frames show a sixth of a second, too
# little to recognize an action. At 4 fps they show about as much as in the demo's training.
HMDB_FPS, HMDB_SECONDS = 4, 2.0
# A shape has a fading trail of (seconds ago, opacity). With it, actions are learned within a few
# minutes of training; from the positions alone it takes far longer.
TRAIL = ((0.5, 0.3), (0.25, 0.5), (0.0, 1.0))

COLOURS = {
    "red": (215, 30, 35),
    "yellow": (245, 235, 40),
    "green": (25, 165, 50),
    "cyan": (20, 215, 225),
    "blue": (30, 60, 230),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
SHAPES = ("ball", "box", "triangle", "star", "ring")

# None of them depends on left and right, because training flips its clips.
ACTIONS = ("rise", "fall", "slide", "spin", "grow", "shrink", "shake", "meet")

# A verb is the same word in every sentence: to the model, "spins" and "spinning" are unrelated.
INSTRUCTION = "make the {a} {verb}"  # the style of YouCook2
DESCRIPTION = "a {a} starts to {verb}"  # the style of MSR-VTT
NARRATIONS = (
    "we're going to make the {a} {verb}",
    "now go ahead and let the {a} {verb}",
    "next you want the {a} to {verb}",
    "and you can see the {a} {verb}",
    "so here i make this {a} {verb}",
    "then the {a} starts to {verb}",
    "watch how that {a} will {verb}",
)
FILLERS = (
    "so now what we're going to do is",
    "hey guys welcome back to my channel",
    "okay that looks really good",
    "make sure you take your time with this",
    "it's going to take a little while",
    "thanks for watching don't forget to subscribe",
    "i like to do it this way",
    "alright let's keep going",
    "you know what i mean",
    "this is my favorite part",
    "just like that",
    "if you have any questions leave a comment below",
)

# The classes of HMDB-51 have typical objects: a ride has a horse. Here half of a label's clips show
# the action in its usual colour and the rest in any, so that colours help but actions decide.
HMDB_LABELS = {
    "rise": "red",
    "slide": "yellow",
    "spin": "green",
    "grow": "blue",
    "shake": "white",
    "meet": "black",
}
HMDB_TRAIN, HMDB_TEST, HMDB_UNUSED = 20, 8, 2  # clips per label in each split
# Folder -> (the class in files' names, action, usual colour). UCF-101 also has a class whose two
# names differ in a capital. A split tests the clips of one group of each class.
UCF_CLASSES = {
    "RiseUp": ("RiseUp", "rise", "red"),
    "SpinAround": ("SpinAround", "spin", "green"),
    "GrowLarge": ("GrowLarge", "grow", "blue"),
    "Slideacross": ("SlideAcross", "slide", "yellow"),
}
UCF_GROUPS, UCF_CLIPS = 3, 3  # clips per group
YOUCOOK_VIDEOS, YOUCOOK_STEPS = 25, 4
MSRVTT_CLIPS = 80
CROSSTASK_TASKS, CROSSTASK_VIDEOS, CROSSTASK_VAL = 4, 4, 1  # videos per task, and those for val
HTM_ALIGN_VIDEOS = 6
LONG_FPS = 10  # of the last two sets' videos, to save time

DRIFT = 1.0  # standard deviation of the seconds between a caption and its step, at most 4

SETTINGS = "settings.json"  # with which the files beside it were made
PARTIAL = ".partial"  # files are made here, and moved to their places when all of them exist
OUTPUTS = (
    "videos",
    "captions",
    "howto100m_videos.csv",
    "word2vec.pth",
    "dict.npy",
    "youcook",
    "validation_youcook.csv",
    "msrvtt",
    "msrvtt_test.csv",
    "hmdb",
    "hmdb51.csv",
    "ucf",
    "ucfTrainTestlist",
    "crosstask",
    "crosstask_release",
    "htm_align",
    "htm_align.json",
)


class Step(NamedTuple):
    action: str
    a: tuple[str, str]  # (colour, shape) that acts ...
    b: tuple[str, str]  # ... and that it meets
    start: float  # seconds
    end: float


# ---- what happens, and what is said --------------------------------------------------------------


def pick(rng: np.random.Generator, options: Sequence):
    return options[rng.integers(len(options))]


def describe(step: Step, template: str) -> str:
    """Fill in a sentence about a step."""
    verb = f"meet a {step.b[0]} {step.b[1]}" if step.action == "meet" else step.action
    return template.format(a=" ".join(step.a), verb=verb)


def draw_steps(rng: np.random.Generator, count: int) -> list[Step]:
    """Draw a training video's steps, which use the same few things, like those of a recipe."""
    things = list(itertools.product(COLOURS, SHAPES))
    cast = [things[i] for i in rng.choice(len(things), 4, replace=False)]
    steps, now = [], rng.uniform(0.5, 2.0)
    for _ in range(count):
        a, b = rng.choice(len(cast), 2, replace=False)
        end = now + rng.uniform(2.0, 4.0)
        steps.append(Step(pick(rng, ACTIONS), cast[a], cast[b], now, end))
        now = end + rng.uniform(0.2, 1.0)
    return steps


def narrate(
    rng: np.random.Generator, steps: list[Step], seconds: float, drift: float = DRIFT
) -> list[tuple[float, float, str]]:
    """Draw captions (start, end, text) in order of time: one per step, displaced, and idle talk.

    Another drift gives the same sentences at other times.
    """
    captions = []
    for step in steps:
        text = describe(step, pick(rng, NARRATIONS))
        duration = rng.uniform(1.5, 3.5)
        middle = (step.start + step.end) / 2 + np.clip(rng.normal(0, drift), -4, 4)
        captions.append((middle - duration / 2, text, duration))
        if rng.random() < 0.4:
            captions.append((step.end + rng.uniform(-1, 1), pick(rng, FILLERS), duration))
    rows = []
    for start, text, duration in sorted(captions):
        start = max(0.0, min(start, seconds - 1.0))
        rows.append((round(start, 2), round(min(start + duration, seconds), 2), text))
    return rows


def draw_distinct_steps(rng: np.random.Generator, count: int, seconds: float) -> list[Step]:
    """Draw steps from 0 to `seconds`, each with another action or another thing."""
    choices = list(itertools.product(ACTIONS, COLOURS, SHAPES))
    steps = []
    for i in rng.permutation(len(choices))[:count]:
        action, colour, shape = choices[i]
        b = (pick(rng, [c for c in COLOURS if c != colour]), pick(rng, SHAPES))
        steps.append(Step(action, (colour, shape), b, 0.0, seconds))
    return steps


# ---- drawing -------------------------------------------------------------------------------------
# In planes of Y'CbCr, which is the input of the encoders.


def to_ycbcr(rgb):
    r, g, b = rgb
    y = 16 + 0.257 * r + 0.504 * g + 0.098 * b
    return y, 128 - 0.148 * r - 0.291 * g + 0.439 * b, 128 + 0.439 * r - 0.368 * g - 0.071 * b


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return how far (u, v) is outside the shape of unit size; negative inside."""
    if shape == "ball":
        return np.hypot(u, v) - 0.9
    if shape == "box":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "triangle":
        return np.maximum(v * 0.5 + np.abs(u) * 0.866, -v) - 0.55
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.22
    # A star of four points: the astroid-like curve |u|^p + |v|^p = 1 with p well below 1.
    return (np.sqrt(np.abs(u)) + np.sqrt(np.abs(v))) ** 2 * 0.75 - 0.95


def paint(image, shape, colour, opacity, x, y, radius, angle):
    """Paint a shape onto an image [3, H, W]. One half is paler, so that even a ball can spin."""
    reach = int(radius * 1.45) + 2
    left, right = max(0, int(x) - reach), min(WIDTH, int(x) + reach)
    top, bottom = max(0, int(y) - reach), min(HEIGHT, int(y) + reach)
    radius, cos, sin = np.float32([radius, math.cos(angle), math.sin(angle)])
    dx = (np.arange(left, right, dtype=np.float32) - np.float32(x)) / radius
    dy = (np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)) / radius
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    cover = np.clip(0.5 - signed_distance(shape, u, v) * radius, 0, 1) * np.float32(opacity)
    pale = np.clip(0.5 + v * radius, 0, 1) * np.float32(0.45)
    for channel, value in zip(image, colour, strict=True):
        patch = channel[top:bottom, left:right]
        patch[:] = patch + cover * (value + pale * (128 - value) - patch)


def draw_backdrop(rng: np.random.Generator) -> np.ndarray:
    """Draw dim, soft blotches of little colour, larger than the picture by the camera's drift."""
    blotches = rng.uniform(-1, 1, (3, 5, 6)) * [[[25]], [[9]], [[9]]]
    blotches += np.reshape([rng.uniform(80, 150), 128, 128], (3, 1, 1))
    for axis, size in (1, HEIGHT + 2 * MARGIN), (2, WIDTH + 2 * MARGIN):
        at = np.linspace(0, blotches.shape[axis] - 1.001, size)
        low, part = at.astype(int), at % 1 if axis == 2 else (at % 1)[:, None]
        blotches = blotches.take(low, axis) * (1 - part) + blotches.take(low + 1, axis) * part
    return blotches.astype(np.uint8)


def stage(rng: np.random.Generator, step: Step) -> Callable[[float], list[tuple]]:
    """Draw how a step looks. Returns a function from time to [(thing, x, y, radius, angle)].

    x and y are pixels from the middle of the picture. Everything stays inside the central square,
    which is all that a centre crop shows.
    """
    seconds = step.end - step.start
    size, tilt, phase = rng.uniform(36, 50), rng.uniform(-0.5, 0.5), rng.uniform(0, 2 * math.pi)
    x0, y0 = rng.uniform(-32, 32, 2)
    side = rng.choice((-1, 1))
    reach = rng.uniform(58, 70)

    def at(time):
        part = time / seconds
        x, y, radius, angle = x0, y0, size, tilt
        if step.action in ("rise", "fall"):
            y = reach * (2 * part - 1) * (-1 if step.action == "rise" else 1)
        elif step.action == "slide":
            x = side * reach * (2 * part - 1)
        elif step.action == "spin":
            angle = tilt + side * 3.5 * time
        elif step.action == "grow":
            radius = size * (0.35 + 0.9 * part)
        elif step.action == "shrink":
            radius = size * (1.25 - 0.9 * part)
        elif step.action == "shake":
            x += 20 * math.sin(9 * time + phase)
            y += 8 * math.sin(11 * time)
        elif step.action == "meet":
            radius = 0.8 * size
            x = side * (radius + (74 - radius) * max(0.0, 1 - 1.2 * part))
            return [(step.a, x, y, radius, tilt), (step.b, -x, y, radius, -tilt)]
        return [(step.a, x, y, radius, angle)]

    return at


def draw_frames(
    rng: np.random.Generator, steps: list[Step], seconds: float, fps: int
) -> Iterator[np.ndarray]:
    """Yield the frames of a video, uint8 [3, HEIGHT, WIDTH]."""
    scene = draw_backdrop(rng)
    sway = rng.uniform(2, MARGIN / 2 - 1, 4) * rng.choice((-1, 1), 4)
    pace = rng.uniform(0.4, 3.0, 4)
    staged = [(step, stage(rng, step)) for step in steps]
    tints = rng.uniform(-14, 14, (len(steps), 3))  # no two reds are the same
    for n in range(round(seconds * fps)):
        now = n / fps
        shift = sway * np.sin(pace * now)
        left, top = MARGIN + shift[0] + shift[1], MARGIN + shift[2] + shift[3]
        image = scene[:, int(top) : int(top) + HEIGHT, int(left) : int(left) + WIDTH].copy()
        for (step, at), tint in zip(staged, tints, strict=True):
            if not step.start <= now < step.end:
                continue
            for age, opacity in TRAIL:
                for (colour, shape), x, y, radius, angle in at(max(0.0, now - step.start - age)):
                    rgb = np.clip(np.add(COLOURS[colour], tint), 0, 255).astype(np.float32)
                    x, y = x + WIDTH / 2 + MARGIN - left, y + HEIGHT / 2 + MARGIN - top
                    paint(image, shape, to_ycbcr(rgb), opacity, x, y, radius, angle)
        yield image


def encode(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Encode the frames with a usual codec for the suffix, reproducibly, in one thread."""
    codec, options = {
        ".mp4": ("libx264", {"preset": "ultrafast", "crf": "24", "g": "50"}),
        ".mkv": ("libx264", {"preset": "ultrafast", "crf": "24", "g": "50"}),
        ".webm": ("libvpx", {"deadline": "realtime", "cpu-used": "-8", "crf": "20", "b": "500k"}),
        ".avi": ("mpeg4", {"qmin": "4", "qmax": "4"}),
    }[path.suffix]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without "bitexact", a Matroska file contains a random number.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv444p")))
        container.mux(stream.encode())


# ---- the data sets -------------------------------------------------------------------------------
# Each function plans videos as (path, steps, seconds, fps) and writes the tables. A video is drawn
# from its own random stream, seeded with its path, so that it depends neither on the process that
# draws it nor on the number of training videos.

Plan = list[tuple[Path, list[Step], float, int]]


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def plan_training(root: Path, seed: int, num_videos: int, drift: float = DRIFT) -> Plan:
    plan, names = [], []
    for i in range(num_videos):
        rng = np.random.default_rng([seed, 0, i])
        name = f"toy{i:05d}"
        steps = draw_steps(rng, rng.integers(6, 9))
        seconds = math.ceil(steps[-1].end + 0.5)
        captions = narrate(rng, steps, seconds, drift)
        write_rows(root / "captions" / f"{name}.csv", ("start", "end", "text"), captions)
        names.append((f"{name}.mp4",))
        plan.append((root / "videos" / f"{name}.mp4", steps, seconds, FPS))
    write_rows(root / "howto100m_videos.csv", ("video_path",), names)
    return plan


def plan_youcook(root: Path, seed: int) -> Plan:
    plan, rows = [], []
    rng = np.random.default_rng([seed, 1])
    steps = iter(draw_distinct_steps(rng, YOUCOOK_VIDEOS * YOUCOOK_STEPS, 0.0))
    for i in range(YOUCOOK_VIDEOS):
        # The real videos also have these three suffixes; webm is rare because its encoder is slow.
        suffix = ".webm" if i % 8 == 7 else ".mkv" if i % 3 == 2 else ".mp4"
        name, task, now, placed = f"toycook{i:04d}", 101 + i % 5, 1, []
        for step in itertools.islice(steps, YOUCOOK_STEPS):
            start, end = now, now + int(rng.integers(3, 5))  # annotators give whole seconds
            placed.append(step._replace(start=start, end=end))
            rows.append((end, start, task, describe(step, INSTRUCTION), name))
            now = end + 1
        plan.append((root / "youcook/validation" / str(task) / f"{name}{suffix}", placed, now, FPS))
    columns = ("end", "start", "task", "text", "video_id")
    write_rows(root / "validation_youcook.csv", columns, rows)
    return plan


def plan_msrvtt(root: Path, seed: int) -> Plan:
    plan, rows = [], []
    rng = np.random.default_rng([seed, 2])
    for i, step in enumerate(draw_distinct_steps(rng, MSRVTT_CLIPS, 4.0)):
        rows.append((f"ret{i}", f"msr{i}", f"video{i}", describe(step, DESCRIPTION)))
        plan.append((root / "msrvtt" / f"video{i}.mp4", [step], step.end, FPS))
    write_rows(root / "msrvtt_test.csv", ("key", "vid_key", "video_id", "sentence"), rows)
    return plan


def draw_action(rng: np.random.Generator, action: str, colour: str | None) -> Step:
    """Draw the step of a clip that shows an action. colour: None for any."""
    colour = colour or pick(rng, list(COLOURS))
    a = (colour, pick(rng, SHAPES))
    b = (pick(rng, [c for c in COLOURS if c != colour]), pick(rng, SHAPES))
    return Step(action, a, b, 0.0, HMDB_SECONDS)


def plan_hmdb(root: Path, seed: int) -> Plan:
    plan, rows = [], []
    rng = np.random.default_rng([seed, 3])
    for label, usual in HMDB_LABELS.items():
        roles = [1] * HMDB_TRAIN + [2] * HMDB_TEST + [0] * HMDB_UNUSED
        splits = [rng.permutation(roles) for _ in range(3)]
        for i in range(len(roles)):
            step = draw_action(rng, label, usual if i % 2 else None)
            name = f"toy_{label}_{i:02d}.avi"
            rows.append((name, f"{label}_test", *(split[i] for split in splits)))
            plan.append((root / "hmdb" / label / name, [step], HMDB_SECONDS, HMDB_FPS))
    write_rows(root / "hmdb51.csv", ("video_id", "label", "split1", "split2", "split3"), rows)
    return plan


def plan_ucf(root: Path, seed: int) -> Plan:
    plan, clips = [], []  # a clip: (group, path in the lists, number of its class)
    rng = np.random.default_rng([seed, 5])
    for number, (label, (name, action, usual)) in enumerate(UCF_CLASSES.items(), 1):
        for i in range(UCF_GROUPS * UCF_CLIPS):
            step = draw_action(rng, action, usual if i % 2 else None)
            group, clip = i // UCF_CLIPS + 1, i % UCF_CLIPS + 1
            path = f"{label}/v_{name}_g{group:02d}_c{clip:02d}.avi"
            clips.append((group, path, number))
            plan.append((root / "ucf" / path, [step], HMDB_SECONDS, HMDB_FPS))
    lists = {"classInd": [f"{number} {label}" for number, label in enumerate(UCF_CLASSES, 1)]}
    for split in (1, 2, 3):
        train = [f"{path} {number}" for group, path, number in clips if group != split]
        lists[f"trainlist0{split}"] = train
        lists[f"testlist0{split}"] = [path for group, path, _ in clips if group == split]
    folder = root / "ucfTrainTestlist"
    folder.mkdir(parents=True)
    for name, lines in lists.items():  # with the line ends of the official lists
        (folder / f"{name}.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return plan


def place_apart(rng: np.random.Generator, steps: Iterable[Step]) -> tuple[list[Step], float]:
    """Place steps one after the other, with only the backdrop between them.

    Returns them and the length of their video in seconds.
    """
    placed, now = [], rng.uniform(1.0, 5.0)
    for step in steps:
        end = now + rng.uniform(3.0, 5.0)
        placed.append(step._replace(start=round(now, 2), end=round(end, 2)))
        now = end + rng.uniform(1.0, 5.0)
    return placed, math.ceil(now)


def plan_crosstask(root: Path, seed: int) -> Plan:
    """Plan videos of tasks. Each video shows most of its task's steps, in their order."""
    plan, tasks, lists = [], [], {"videos": [], "videos_val": []}
    annotations = root / "crosstask_release" / "annotations"
    annotations.mkdir(parents=True)
    rng = np.random.default_rng([seed, 6])
    for task in range(401, 401 + CROSSTASK_TASKS):
        steps = draw_distinct_steps(rng, int(rng.integers(4, 7)), 0.0)
        texts = [describe(step, INSTRUCTION) for step in steps]
        title = f"Play with the {' '.join(steps[0].a)}"
        tasks.append(f"{task}\n{title}\ntoy:{task}\n{len(steps)}\n{','.join(texts)}\n")
        for i in range(CROSSTASK_VIDEOS):
            name = f"toytask{task}_{i}"  # real ids have underscores, too
            shown = sorted(rng.choice(len(steps), len(steps) - i % 2, replace=False))
            placed, seconds = place_apart(rng, [steps[index] for index in shown])
            rows = [(k + 1, step.start, step.end) for k, step in zip(shown, placed, strict=True)]
            text = "".join(f"{step},{start},{end}\n" for step, start, end in rows)
            (annotations / f"{task}_{name}.csv").write_text(text)
            line = f"{task},{name},toy:{name}\n"
            lists["videos"].append(line)
            if i < CROSSTASK_VAL:
                lists["videos_val"].append(line)
            plan.append((root / "crosstask" / str(task) / f"{name}.mp4", placed, seconds, LONG_FPS))
    (root / "crosstask_release" / "tasks_primary.txt").write_text("\n".join(tasks))
    for name, lines in lists.items():
        (root / "crosstask_release" / f"{name}.csv").write_text("".join(lines))
    return plan


def plan_htm_align(root: Path, seed: int) -> Plan:
    """Plan narrated videos: a sentence per step, at its time, and idle talk in between."""
    plan, videos = [], {}
    rng = np.random.default_rng([seed, 7])
    for i in range(HTM_ALIGN_VIDEOS):
        name = f"toyalign{i:02d}"
        steps, seconds = place_apart(rng, draw_distinct_steps(rng, int(rng.integers(5, 12)), 0.0))
        sentences, before = [], 0.0
        for step in steps:
            if rng.random() < 0.7:
                sentences.append([0, before, step.start, pick(rng, FILLERS)])
            text = describe(step, pick(rng, NARRATIONS))
            sentences.append([1, step.start, step.end, text])
            before = step.end
        videos[name] = sentences
        plan.append((root / "htm_align" / f"{name}.mp4", steps, seconds, LONG_FPS))
    (root / "htm_align.json").write_text(json.dumps(videos))
    return plan


def make_video(seed: int, root: Path, item: tuple) -> None:
    path, steps, seconds, fps = item
    stream = zlib.crc32(path.relative_to(root).as_posix().encode())
    encode(path, draw_frames(np.random.default_rng([seed, 4, stream]), steps, seconds, fps), fps)


# ---- word vectors --------------------------------------------------------------------------------


def write_word_vectors(root: Path, seed: int) -> None:
    """Train Word2Vec on the narrations, and write the two files that the model reads.

    A video's captions are one document with a wide window, so that a word's context is the few
    things in its video. Within a sentence, "red" and "blue" have the same context, because anything
    may have any colour, and their vectors would hardly differ.
    """
    import gensim
    import torch

    documents = []
    for path in sorted((root / "captions").glob("*.csv")):
        with open(path, newline="") as file:
            documents.append([w for row in csv.DictReader(file) for w in row["text"].split()])
    model = gensim.models.Word2Vec(
        documents,
        vector_size=300,
        window=10,
        min_count=1,
        sg=1,
        sample=0,
        negative=10,
        epochs=30,
        seed=seed,
        workers=1,  # with several, the result depends on their timing
    )
    words = model.wv.index_to_key
    table = torch.zeros(len(words) + 1, 300)  # row 0 is the padding
    table[1:] = torch.from_numpy(model.wv.vectors)
    torch.save(table, root / "word2vec.pth")
    np.save(root / "dict.npy", np.array(words, dtype=np.str_))


# ---- command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    out = Path("data/toy")
    add("--out", type=Path, default=out, metavar="DIR", help="folder (default %(default)s)")
    add("--num_videos", "--num-videos", type=positive(int), default=160, help="training videos")
    add("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed is {args.seed}; give one from 0 to 2^32-1")
    return args


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_stamp(out: Path) -> dict | None:
    """Return the settings of the files in `out`.

    Returns {} if this script left them incomplete, and None if it did not make them.
    """
    try:
        return json.loads((out / SETTINGS).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def prepare(out: Path, num_videos: int, seed: int) -> None:
    """Make the data set, unless `out` has it already. Raises InputError or OSError."""
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    settings = {"num_videos": num_videos, "seed": seed, "script": script}
    stamp = read_stamp(out)
    if stamp == settings and all((out / name).exists() for name in OUTPUTS):
        print(f"{out}: already prepared, nothing to do")
        return
    for name in OUTPUTS:
        if stamp is None and (out / name).exists():
            raise InputError(f"--out: {out / name} is not from this script; give another folder")

    root = out / PARTIAL
    out.mkdir(parents=True, exist_ok=True)
    remove(root)
    root.mkdir()
    plan = plan_training(root, seed, num_videos)
    plan += plan_youcook(root, seed) + plan_msrvtt(root, seed)
    plan += plan_hmdb(root, seed) + plan_ucf(root, seed)
    plan += plan_crosstask(root, seed) + plan_htm_align(root, seed)
    print(f"{out}: drawing {len(plan)} videos, {num_videos} of them to train on", flush=True)
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = pool.map(functools.partial(make_video, seed, root), plan, chunksize=4)
        write_word_vectors(root, seed)
        for _ in tqdm(made, "videos", len(plan), unit="video", disable=None):
            pass  # an error in a process is raised here

    (out / SETTINGS).write_text("{}")  # incomplete until the last file is in place
    for name in OUTPUTS:
        remove(out / name)
        os.replace(root / name, out / name)
    root.rmdir()
    (out / SETTINGS).write_text(json.dumps(settings))


def main():
    args = parse_args()
    try:
        prepare(args.out, args.num_videos, args.seed)
    except OSError as error:
        raise InputError(f"--out: {args.out}: {error}") from None


if __name__ == "__main__":
    run_script(main)
