"""Run every evaluation whose videos you have: python evaluate_all.py --pretrain_cnn_path FILE

Give the folder of each data set's videos, such as --youcook_root DIR. Each data set is evaluated by
its script, eval_<name>.py, which writes to --out/<name>/. --out/results.json and --out/index.html
show all results beside the published figures. Run the same command again to resume after an
interruption: data sets that are done with the same weights, annotations and flags are skipped. Exit
status 1: an evaluation failed.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

from args import (
    ANNOTATIONS,
    changed_flags,
    check_video_folder,
    file_checksum,
    get_all_args,
    inference_model,
    make_folder,
)
from utils import InputError, atomic_write, die_with_parent, input_error, one_line, run_script

ROOT = Path(__file__).parent

# These change neither the metrics nor the page.
MACHINE_FLAGS = {"num_thread_reader", "batch_size_val", "sample_timeout", "device", "gpu"}
MACHINE_FLAGS |= {"verbose"}
CACHE = "features.npz"
LONGEST_REASON = 500  # characters: few enough for a pipe to hold until they are read


class Evaluation(NamedTuple):
    """An evaluation by the script eval_<name>.py."""

    name: str
    title: str
    metrics: dict[str, str]  # in the summary: key of the script's JSON -> caption
    cached: bool = True  # takes --feature_cache
    text: bool = True  # embeds texts

    @property
    def script(self) -> str:
        return f"eval_{self.name}"


RECALLS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "MR": "median rank"}
ALIGNED = {"R1": "R@1", "AUC": "AUC", "R1_64": "R@1, 64 s", "AUC_64": "AUC, 64 s"}
EVALUATIONS = [
    Evaluation("youcook", "YouCook2", RECALLS, cached=False),
    Evaluation("msrvtt", "MSR-VTT", RECALLS, cached=False),
    Evaluation("hmdb", "HMDB-51", {"mean": "top-1"}, text=False),
    Evaluation("ucf", "UCF-101", {"mean": "top-1"}, text=False),
    Evaluation("crosstask", "CrossTask", {"recall": "recall"}),
    Evaluation("htm_align", "HTM-Align", ALIGNED),
]

if __name__ == "__main__":  # --help should not wait for torch
    get_all_args(__doc__, {evaluation.name: evaluation.title for evaluation in EVALUATIONS})

import torch

from annotations.crosstask import crosstask_videos
from annotations.hmdb import hmdb_table
from annotations.htm_align import htm_align_sentences
from annotations.msrvtt import msrvtt_table
from annotations.ucf import ucf_table
from annotations.youcook import youcook_table
from evaluation.feature_file import checksum
from evaluation.published import PUBLISHED
from evaluation.report import page_path, summary_data, write_page
from evaluation.results import NOTES, Results, describe_metric, format_metric
from evaluation_script import describe_run, text_video_model

READERS = {
    "youcook": youcook_table,
    "msrvtt": msrvtt_table,
    "hmdb": hmdb_table,
    "ucf": ucf_table,
    "crosstask": crosstask_videos,
    "htm_align": htm_align_sentences,
}


class Plan(NamedTuple):
    """One evaluation of this run: its folder, its input and its script's flags."""

    evaluation: Evaluation
    folder: Path  # of its results
    stamp: dict  # what its results depend on
    flags: list[str]  # of the script

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    @property
    def settings(self) -> Path:
        return self.folder / "settings.json"


# --- the input ------------------------------------------------------------------------------------


def annotations_path(args, name: str) -> str:
    return getattr(args, f"{name}_csv") or ANNOTATIONS[name]


def check_annotations(args, name: str) -> None:
    """Read the annotations of an evaluation. Raises InputError if they are invalid."""
    options = {"subset": args.eval_subset} if name == "crosstask" else {}
    with input_error(f"--{name}_csv"):
        READERS[name](annotations_path(args, name), **options)


def check_model(args, chosen: list[Evaluation]) -> str:
    """Check that weights and vocabulary suit the evaluations. Return the weights' checksum."""
    cpu = torch.device("cpu")
    if any(evaluation.text for evaluation in chosen):
        return text_video_model(args, cpu)[2]
    weights = file_checksum(args.pretrain_cnn_path, "pretrain_cnn_path")
    inference_model(args, cpu, joint_space=False)
    return weights


def content_checksum(path: str) -> str:
    """Compute the SHA-256 of a file, or of a folder's files and their names. Raises OSError."""
    os.stat(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in [Path(path), *Path(path).rglob("*")] if file.is_file()):
        digest.update(os.fsencode(file.relative_to(path)) + checksum(file).encode())
    return f"sha256:{digest.hexdigest()}"


def input_checksums(args, evaluation: Evaluation, weights: str) -> dict[str, str]:
    """Return the checksums of the files that an evaluation's results depend on."""
    found = {"weights": weights}
    with input_error(f"--{evaluation.name}_csv"):
        found["annotations"] = content_checksum(annotations_path(args, evaluation.name))
    if evaluation.text:
        found["vocabulary"] = file_checksum(args.token_to_word_path, "token_to_word_path")
    return found


# --- the evaluations ------------------------------------------------------------------------------


def make_plan(args, evaluation: Evaluation, checksums: dict[str, str]) -> Plan:
    """Plan an evaluation. checksums: from input_checksums."""
    root = getattr(args, f"{evaluation.name}_root")
    csv = getattr(args, f"{evaluation.name}_csv")
    changed = changed_flags(args, evaluation.script)
    folder = Path(args.out, evaluation.name)
    given = {
        **changed,
        "eval_video_root": root,
        **({"eval_csv": csv} if csv else {}),
        "metrics_json": folder / "metrics.json",
        "html_report": folder,
        **({"feature_cache": folder / CACHE} if evaluation.cached else {}),
    }
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    depends = {
        name: value
        for name, value in changed.items()
        if name not in MACHINE_FLAGS | {"pretrain_cnn_path", "token_to_word_path"}
    }
    stamp = {**checksums, "root": root, "flags": depends}
    return Plan(evaluation, folder, stamp, flags)


def read_json(path: Path) -> dict | None:
    """Read a file that this script or its evaluations wrote; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def read_results(plan: Plan) -> dict | None:
    """Return the JSON of an evaluation that is done with the same input and flags, or None."""
    if read_json(plan.settings) != plan.stamp or not page_path(plan.folder).is_file():
        return None
    found = read_json(plan.metrics)
    complete = isinstance(found, dict) and {"num_videos", "num_missing"} <= found.keys()
    return found if complete else None


def run_evaluation(plan: Plan) -> str:
    """Run an evaluation's script. Return why it failed, or ''.

    It runs in a separate process, so that a crash, for example for lack of memory, does not end the
    other evaluations. It shows its progress on the terminal.
    """
    with input_error("--out"):
        plan.metrics.unlink(missing_ok=True)
        page_path(plan.folder).unlink(missing_ok=True)  # written last: its presence means "done"
        if read_json(plan.settings) != plan.stamp:
            Path(plan.folder, CACHE).unlink(missing_ok=True)  # has other weights or flags
            with atomic_write(plan.settings) as file:
                file.write(json.dumps(plan.stamp, indent=2).encode())
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_main, args=(plan.evaluation.script, plan.flags, sender))
    process.start()
    sender.close()
    try:
        process.join()
    finally:
        process.kill()
        process.join()
    if not process.exitcode:
        return ""
    with contextlib.suppress(EOFError):
        if receiver.poll(1):
            return receiver.recv()
    code = process.exitcode
    return f"ended by signal {-code}" if code < 0 else f"exit status {code}"


def run_main(script: str, flags: list[str], sender) -> None:
    """Run a script's main() in this process, started for it. If it fails, send the reason."""
    die_with_parent()
    sys.argv = [os.path.relpath(ROOT / f"{script}.py"), *flags]
    try:
        importlib.import_module(script).main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sender.send(str(error)[:LONGEST_REASON])
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        traceback.print_exc()
        sender.send(one_line(f"{type(error).__name__}: {error}")[:LONGEST_REASON])
        sys.exit(1)


# --- the summary ----------------------------------------------------------------------------------


def summarize(evaluation: Evaluation, found: dict | None, status: str) -> dict:
    """Return an evaluation's row of the page, see summary_data. found: the script's JSON."""
    done = found or {}
    results = Results(done, done.get("counts", {}), done.get("intervals", {}))
    rows = []
    for key, caption in evaluation.metrics.items():
        published = [
            (f"{source.figures[key]:g}", source.source)
            for source in PUBLISHED[evaluation.name]
            if key in source.figures
        ]
        ours, details = format_metric(key, done.get(key)), describe_metric(results, key)
        rows.append((caption, published, ours, details))
    missing = ""
    if found:
        missing = f"{found['num_missing']} of {found['num_videos'] + found['num_missing']}"
    return {
        "title": evaluation.title,
        "link": f"{evaluation.name}/index.html" if found else "",
        "status": status,
        "missing": missing,
        "metrics": rows,
    }


def write_summary(out: str, weights: str, found: dict[str, dict], statuses: dict[str, str]) -> list:
    """Write results.json and index.html, and return the page's rows.

    found: the scripts' JSON, by the evaluations' names. statuses: see summary_data.
    """
    rows = [
        summarize(evaluation, found.get(evaluation.name), statuses[evaluation.name])
        for evaluation in EVALUATIONS
    ]
    content = {
        evaluation.name: {
            "title": evaluation.title,
            "status": statuses[evaluation.name],
            "results": found.get(evaluation.name),
            "published": [source._asdict() for source in PUBLISHED[evaluation.name]],
        }
        for evaluation in EVALUATIONS
    }
    run = describe_run(weights)
    with input_error("--out"):
        with atomic_write(Path(out, "results.json")) as file:
            file.write((json.dumps({**run, "evaluations": content}, indent=2) + "\n").encode())
        settings = [("weights checksum", weights), ("command", run["command"])]
        write_page(out, "All evaluations", Results({}), settings, summary_data(rows))
    return rows


def print_summary(rows: list[dict]) -> None:
    """Print the table of the page, with the first published figure of each metric."""
    print(f"\n{'data set':<10} {'metric':<12} {'ours':>7} {'missing':>13}  published: source")
    for evaluation, row in zip(EVALUATIONS, rows, strict=True):
        missing = row["missing"]
        for key, (caption, published, ours, _) in zip(
            evaluation.metrics, row["metrics"], strict=True
        ):
            source = ": ".join(published[0]) if published else ""
            note = f" (ours: {NOTES[key]})" if key in NOTES else ""
            print(f"{row['title']:<10} {caption:<12} {ours:>7} {missing:>13}  {source}{note}")
            missing = ""
        if row["status"] not in ("done", "no videos given"):
            print(f"{row['title']:<10} {row['status']}")


def main() -> None:
    args = get_all_args(__doc__, {evaluation.name: evaluation.title for evaluation in EVALUATIONS})
    statuses, chosen = {}, []
    for evaluation in EVALUATIONS:
        name = evaluation.name
        root, csv = getattr(args, f"{name}_root"), getattr(args, f"{name}_csv")
        if csv and not root:
            raise InputError(f"--{name}_csv needs the videos; give --{name}_root, too")
        if root:
            check_video_folder(root, f"{name}_root")
            chosen.append(evaluation)
        statuses[name] = "not run yet" if root else "no videos given"
    if not chosen:
        flags = ", ".join(f"--{evaluation.name}_root" for evaluation in EVALUATIONS)
        raise InputError(f"no data set is given; give the video folder of one or more: {flags}")
    make_folder(args.out, "out")
    for evaluation in chosen:
        make_folder(Path(args.out, evaluation.name), "out")
        check_annotations(args, evaluation.name)
    weights = check_model(args, chosen)
    plans = [make_plan(args, e, input_checksums(args, e, weights)) for e in chosen]

    # Sequentially: each evaluation keeps the device and all data workers busy.
    found = {}
    for plan in plans:
        evaluation = plan.evaluation
        if results := read_results(plan):
            print(f"skipped: {evaluation.title} is done, see {plan.folder}", flush=True)
            error = ""
        else:
            print(shlex.join(["python", f"{evaluation.script}.py", *plan.flags]), flush=True)
            error = run_evaluation(plan)
            results = None if error else read_results(plan)
        if results:
            found[evaluation.name] = results
        statuses[evaluation.name] = "done" if results else f"failed: {error}"
        rows = write_summary(args.out, weights, found, statuses)
    print_summary(rows)
    print(f"\nresults: {Path(args.out, 'results.json')}\nreport:  {page_path(args.out)}")
    if len(found) < len(chosen):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as at Ctrl-C
    run_script(main, "stopped; run the same command again to resume")
