import faulthandler
import itertools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from contextlib import closing

import psutil
import pytest
import torch

from distributed import batch_memory, workers
from distributed.workers import WorkerFailure, sample_batches
from tests.helpers import ROOT
from utils import STOP_SIGNALS

FORK = multiprocessing.get_context("fork")  # its events are shared with the workers
PATIENCE = 60  # seconds, for events that take a moment


class Numbers:
    """Item k holds k, and 2k seven times. If acts has the key, acts[key]() is called first."""

    def __init__(self, acts=None):
        self.item_spec = {"number": ((), torch.int64), "row": ((7,), torch.float32)}
        self.acts = acts or {}
        self.read = FORK.Value("q", 0)  # items, by all workers

    def __getitem__(self, key):
        error = self.acts.get(key, str)()
        with self.read:
            self.read.value += 1
        if error:
            return {"error": error}
        return {"number": torch.tensor(key), "row": torch.full((7,), 2.0 * key)}


Read = namedtuple("Read", "numbers errors")


def read(dataset, batches, *, workers, timeout=PATIENCE, **settings):
    """Return the items of sample_batches: for each batch, its numbers and its errors."""
    found = []
    settings = {"workers": workers, "timeout": timeout, **settings}
    with closing(sample_batches(dataset, batches, **settings)) as loaded:
        for batch in loaded:
            good = [error is None for error in batch["errors"]]
            assert torch.equal(batch["row"][good], 2.0 * batch["number"][good, None].expand(-1, 7))
            numbers = [
                n if g else None for n, g in zip(batch["number"].tolist(), good, strict=True)
            ]
            found.append(Read(numbers, batch["errors"]))
    return found


def batches_of(size, length):
    return [list(range(start, min(start + size, length))) for start in range(0, length, size)]


def await_(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def segfault():
    faulthandler.disable()  # pytest's, which would fill the screen
    os.kill(os.getpid(), signal.SIGSEGV)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_with_any_number_of_workers(workers):
    keys = [[5, 3, 8], [1, 1, 40], [7, 0, 2], [9, 6, 4], [11, 12, 10], [13]]  # a short one last
    found = read(Numbers(), iter(keys), workers=workers)
    assert found == [(batch, [None] * len(batch)) for batch in keys]
    assert read(Numbers(), [[k] for k in range(9)], workers=workers, prefetch=1) == [
        ([k], [None]) for k in range(9)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_empty_list_of_batches_yields_none(workers):
    assert read(Numbers(), [], workers=workers) == []


def test_an_item_that_takes_longer_than_later_ones_keeps_its_place():
    later = FORK.Event()
    numbers = Numbers({0: lambda: later.wait(PATIENCE) and None, 5: later.set})
    found = read(numbers, batches_of(2, 12), workers=2, prefetch=6)
    assert later.is_set()
    assert [batch.numbers for batch in found] == batches_of(2, 12)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_change_while_later_ones_are_read(workers):
    keys = batches_of(4, 40)
    batches = list(sample_batches(Numbers(), keys, workers=workers, timeout=PATIENCE))
    assert [batch["number"].tolist() for batch in batches] == keys


# --- the memory of batches ------------------------------------------------------------------------


def address(batch):
    return batch["row"].data_ptr()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_memory_of_a_dropped_batch_is_reused(workers):
    seen = []
    settings = {"workers": workers, "timeout": PATIENCE, "prefetch": 8}
    with closing(sample_batches(Numbers(), batches_of(4, 80), **settings)) as batches:
        for batch in batches:
            seen.append(address(batch))
            del batch
    assert len(seen) == 20 and len(set(seen)) <= 4  # two are read, and two may be lent


def test_any_view_of_a_batch_keeps_its_memory():
    keys, views = batches_of(4, 80), []
    settings = {"workers": 2, "timeout": PATIENCE, "prefetch": 8, "lend": 3}
    with closing(sample_batches(Numbers(), keys, **settings)) as batches:
        for number, batch in enumerate(batches):
            if number in (0, 7):
                views.append((number, batch["number"][1:3].view(2, 1)[-1]))
            del batch
        assert [(number, view.tolist()) for number, view in views] == [(0, [2]), (7, [30])]
    assert [(number, view.tolist()) for number, view in views] == [(0, [2]), (7, [30])]  # closed


def test_a_caller_that_keeps_more_batches_than_it_announced_gets_copies():
    settings = {"workers": 2, "timeout": PATIENCE, "prefetch": 4, "lend": 2}
    with closing(sample_batches(Numbers(), batches_of(4, 80), **settings)) as batches:
        kept = [next(batches) for _ in range(6)]
        starts = [address(batch) for batch in kept]
        apart = [abs(a - b) % mmap.PAGESIZE for a, b in itertools.pairwise(starts)]
        assert apart[0] == 0 and len(set(starts)) == 6  # two places, then copies
        assert any(apart[1:])
        kept = kept[2:]  # the lent ones are returned
        assert {address(next(batches)) for _ in range(2)} & set(starts[:2])
    assert [batch["number"].tolist() for batch in kept] == batches_of(4, 80)[2:6]


class Runtime:
    """A mock of the CUDA runtime, which records the memory that is registered."""

    def __init__(self, code):
        self.code, self.registered = code, []

    def cudaHostRegister(self, start, size, flags):
        self.registered.append((start, start + size))
        return self.code


@pytest.fixture
def runtime(monkeypatch):
    """A function that installs a mock runtime whose registration returns a code."""

    def put(code):
        made = Runtime(code)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
        monkeypatch.setattr(batch_memory, "PAGE_LOCKED", [])
        return made

    return put


def test_lent_memory_is_registered_and_stays_mapped(runtime):
    """With a mock of the runtime, so copies by a GPU are not tested."""
    made = runtime(0)
    settings = {"workers": 2, "timeout": PATIENCE, "pin_memory": True}
    with closing(sample_batches(Numbers(), batches_of(4, 40), **settings)) as batches:
        for batch in batches:
            [(start, end)] = made.registered
            assert start <= address(batch) and address(batch) + batch["row"].nbytes <= end
            del batch
    [kept] = batch_memory.PAGE_LOCKED
    assert made.registered == [(kept.ctypes.data, kept.ctypes.data + kept.nbytes)]


def test_memory_that_cannot_be_registered_is_reported_and_batches_are_copied(
    runtime, monkeypatch, milnce_log
):
    made, empty_like, pinned = runtime(2), torch.empty_like, []

    def page_locked(tensor, *, pin_memory):
        pinned.append(pin_memory)
        return empty_like(tensor)

    def launch_kernel(size, *, device):  # which reports, and so clears, the runtime's last error
        made.code = device
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty_like", page_locked)
    monkeypatch.setattr(torch, "ones", launch_kernel)
    assert read(Numbers(), batches_of(4, 12), workers=2, pin_memory=True) == [
        (keys, [None] * 4) for keys in batches_of(4, 12)
    ]
    assert pinned == [True] * 6  # two tensors per batch
    assert milnce_log.text.count("could not page-lock") == 1 and "CUDA error 2" in milnce_log.text
    assert made.code == "cuda" and batch_memory.PAGE_LOCKED == []


# --- the order of reading -------------------------------------------------------------------------


def test_prefetch_items_are_read_while_one_is_used():
    numbers = Numbers()
    keys = batches_of(4, 40)
    with closing(sample_batches(numbers, keys, workers=2, timeout=PATIENCE, prefetch=8)) as batches:
        for done, _ in enumerate(batches, start=1):
            await_(lambda done=done: numbers.read.value >= min(4 * (done + 2), 40))
            assert numbers.read.value == min(4 * (done + 2), 40)


def test_a_replacement_does_not_wait_for_all_items_that_are_read_ahead():
    numbers = Numbers({0: lambda: "0 is bad"})
    settings = {"workers": 1, "timeout": PATIENCE, "prefetch": 400}
    replacing = sample_batches(
        numbers,
        batches_of(4, 400),
        retry=lambda key, error: 1000,
        on_sample=lambda: counted.append(0),
        **settings,
    )
    counted = []
    with closing(replacing) as batches:
        assert next(batches)["number"].tolist() == [1000, 1, 2, 3]
        assert len(counted) < 100  # of 400


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_items_own_error_comes_with_its_batch(workers):
    found = read(Numbers({2: lambda: "2 is odd"}), batches_of(2, 6), workers=workers)
    assert found == [([0, 1], [None] * 2), ([None, 3], ["2 is odd", None]), ([4, 5], [None] * 2)]
    assert not isinstance(found[1].errors[0], WorkerFailure)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_item_that_kills_its_worker_affects_no_other(workers):
    acts = {0: segfault, 7: lambda: os._exit(3), 8: segfault, 29: segfault}
    found = read(Numbers(acts), batches_of(4, 30), workers=workers)
    numbers = [n for batch in found for n in batch.numbers]
    errors = {k: e for k, e in enumerate(e for batch in found for e in batch.errors) if e}
    assert numbers == [None if k in acts else k for k in range(30)]
    assert errors.keys() == acts.keys() and all(
        isinstance(e, WorkerFailure) for e in errors.values()
    )
    assert "SIGSEGV" in errors[0] and "exit status 3" in errors[7]


def test_an_item_whose_worker_is_killed_from_outside_is_read_again():
    """As by the OOM killer. The keys are unhashable, like those of windows of videos."""

    class Lists(Numbers):
        def __getitem__(self, key):
            return super().__getitem__(key[0])

    def kill_once():
        with killed:
            killed.value += 1
            if killed.value > 1:
                return
        os.kill(os.getpid(), signal.SIGKILL)

    killed = FORK.Value("q", 0)
    keys = [[[k]] for k in range(6)]
    assert read(Lists({2: kill_once}), keys, workers=2) == [([k], [None]) for k in range(6)]


def test_a_crash_loses_none_of_the_hundreds_of_tasks_behind_it():
    acts = dict.fromkeys([0, 1, 350, 1799], segfault)
    found = read(Numbers(acts), batches_of(600, 1800), workers=1)
    numbers = [n for batch in found for n in batch.numbers]
    assert numbers == [None if k in acts else k for k in range(1800)]


def test_keys_and_errors_larger_than_a_pipe_pass_through_it():
    """If both ends waited for the other to read, they would wait forever."""

    class Texts(Numbers):
        def __getitem__(self, key):
            if len(key[1]) == 300_001:
                raise ValueError(key[1])
            return {"error": key[1]} if key[1] else super().__getitem__(key[0])

    text = "\udcff" + 299_999 * "x"  # a path that is not UTF-8
    keys = [[(k, text if k % 2 else "") for k in range(start, start + 10)] for start in (0, 10)]
    found = read(Texts(), keys, workers=1, timeout=PATIENCE)
    errors = [error for batch in found for error in batch.errors]
    assert errors == [text if k % 2 else None for k in range(20)]
    with pytest.raises(RuntimeError, match=r"ValueError: .x{300000}"):
        read(Texts(), [[(0, text + "x")]], workers=1)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_hangs_affects_no_other(workers):
    found = read(Numbers({3: signal.pause}), batches_of(2, 10), workers=workers, timeout=1)
    expected = batches_of(2, 10)
    assert [batch.numbers for batch in found] == [expected[0], [2, None], *expected[2:]]
    hung = found[1].errors[1]
    assert isinstance(hung, WorkerFailure) and "1 s" in hung


def test_an_item_is_not_late_because_the_job_was_suspended(monkeypatch):
    """The clock jumps during the wait for an item, which is done when the pool checks again."""
    resumed, wait, clock = FORK.Event(), workers.wait, time.monotonic
    select = workers.selectors.DefaultSelector.select

    def suspended_select(selector, timeout):
        if resumed.is_set():
            return select(selector, timeout)
        monkeypatch.setattr(workers.time, "monotonic", lambda: clock() + 1000)
        return []

    def wait_again(channels, timeout):
        resumed.set()
        return wait(channels, PATIENCE)

    monkeypatch.setattr(workers.selectors.DefaultSelector, "select", suspended_select)
    monkeypatch.setattr(workers, "wait", wait_again)
    numbers = Numbers({0: lambda: resumed.wait(PATIENCE) and None})
    assert read(numbers, [[0], [1]], workers=1) == [([0], [None]), ([1], [None])]
    assert resumed.is_set()


@pytest.mark.parametrize(
    ("workers", "act", "error"),
    [(0, lambda: "odd", "odd"), (2, lambda: "odd", "odd"), (2, segfault, "SIGSEGV")],
)
def test_retry_puts_other_keys_in_an_items_place(workers, act, error):
    calls = []

    def retry(key, error):
        calls.append((key, error))
        return key + 100 if key < 200 else None

    numbers = Numbers({3: act, 103: act, 4: act, 104: act, 204: act})
    found = read(numbers, batches_of(3, 9), workers=workers, retry=retry)
    assert [batch.numbers for batch in found] == [[0, 1, 2], [203, None, 5], [6, 7, 8]]
    assert sorted(key for key, _ in calls) == [3, 4, 103, 104, 204]
    assert all(error in str(reason) for _, reason in calls)
    assert error in found[1].errors[1]


def stumble():
    raise ZeroDivisionError("by a bug")


def test_a_bug_raises_an_error_with_the_workers_traceback():
    before = psutil.Process().children()
    with pytest.raises(RuntimeError, match=r"(?s)in stumble.*ZeroDivisionError: by a bug"):
        read(Numbers({5: stumble}), batches_of(2, 10), workers=2)
    assert psutil.Process().children() == before
    with pytest.raises(ZeroDivisionError):
        read(Numbers({5: stumble}), batches_of(2, 10), workers=0)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_a_worker_that_dies_while_idle_is_replaced_and_no_item_fails(prefetch):
    numbers, before = Numbers(), psutil.Process().children()
    keys = [[k] for k in range(8)]
    with closing(
        sample_batches(numbers, keys, workers=1, timeout=PATIENCE, prefetch=prefetch)
    ) as batches:
        assert next(batches)["number"].tolist() == [0]
        [worker] = set(psutil.Process().children()) - set(before)
        await_(lambda: numbers.read.value == 1 + prefetch)
        worker.kill()
        await_(lambda: is_gone(worker))
        rest = [(batch["number"].tolist(), batch["errors"]) for batch in batches]
    assert rest == [([k], [None]) for k in range(1, 8)]


def test_closing_leaves_neither_processes_nor_open_files():
    read(Numbers(), [[0]], workers=1)  # at first use, multiprocessing opens a file that stays open
    process = psutil.Process()
    files, children = process.num_fds(), process.children()
    numbers = Numbers({1: segfault, 4: signal.pause, 7: segfault})
    batches = sample_batches(numbers, [[k] for k in range(100)], workers=3, timeout=1)
    for _ in range(8):
        next(batches)
    assert len(process.children()) == len(children) + 3
    assert process.num_fds() > files
    batches.close()
    assert process.children() == children  # a zombie would be one
    assert process.num_fds() == files


def test_stop_signals_to_a_job_do_not_fail_its_items():
    def signalled():
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)

    found = read(Numbers({2: signalled}), [[k] for k in range(5)], workers=1)
    assert found == [([k], [None]) for k in range(5)]


def test_workers_compute_with_torch_after_their_parent_did():
    """OpenMP's threads do not survive a fork: with more than one, a worker would wait forever."""
    matrix = torch.rand(300, 300)

    class Products:
        def __init__(self):
            self.item_spec = {"product": ((300, 300), torch.float32)}

        def __getitem__(self, key):
            return {"product": matrix @ matrix}

    expected = matrix @ matrix
    for batch in sample_batches(Products(), [[0], [1]], workers=1, timeout=20):
        assert batch["errors"] == [None]
        torch.testing.assert_close(batch["product"][0], expected)


SCRIPT = """
import signal
import psutil
from tests.distributed.test_workers import Numbers
from distributed.workers import sample_batches

dataset = Numbers({1: signal.pause})
batches = sample_batches(dataset, [[k] for k in range(9)], workers=3, timeout=600)
next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
"""


def start_script(more):
    """Run SCRIPT and more lines; return its process and its workers, one of which is busy."""
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + more],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with script.stdout:
        return script, [psutil.Process(int(pid)) for pid in script.stdout.readline().split()]


def test_workers_are_killed_with_their_parent():
    script, started = start_script("signal.pause()")
    assert len(started) == 3
    script.kill()
    script.wait()
    await_(lambda: all(map(is_gone, started)))


def test_a_program_that_does_not_close_the_batches_still_ends():
    script, _ = start_script("")
    try:
        assert script.wait(PATIENCE) == 0
    finally:
        script.kill()


FORKING_SCRIPT = """
import os, signal, threading, time
from tests.distributed.test_workers import Numbers
from distributed.workers import sample_batches

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)  # a handler would run here

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # may receive the signal
os.register_at_fork(after_in_parent=interrupt)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for batch in sample_batches(Numbers(), [[1], [2]], workers=1, timeout=600):
        pass
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_during_the_start_of_a_worker_is_not_lost():
    command = [sys.executable, "-c", FORKING_SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
