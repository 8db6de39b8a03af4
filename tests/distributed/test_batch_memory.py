"""The memory that a training fills by reading ahead. test_workers.py covers lending."""

import os

import torch

from distributed import batch_memory
from distributed.batch_memory import memory_limit, training_prefetch


def test_a_training_reads_ahead_a_thousand_items_or_an_eighth_of_the_memory(monkeypatch):
    items = {"video": ((3, 10, 100, 100), torch.uint8), "text": ((5,), torch.int64)}  # 300,040 B

    def choose(batch, readers, *, wanted=None, step=0, lend=0, processes=1, memory=10**6):
        monkeypatch.setattr(batch_memory, "memory_limit", lambda: memory * 10**6)
        settings = {"wanted": wanted, "step": step or batch, "lend": lend, "processes": processes}
        return training_prefetch(items, batch, readers, **settings)

    assert choose(256, 20) == 1000
    assert choose(256, 20, step=4096) == 4096
    assert choose(256, 20, step=4096, memory=3000) == 1249  # of 375 MB
    assert choose(256, 20, step=4096, memory=3000, lend=2) == 1249 - 2 * 256
    assert choose(64, 20, step=4096, memory=3000, processes=8) == 156
    assert choose(64, 100, memory=3000, processes=8) == 200  # two per worker
    assert choose(256, 20, memory=3000, processes=8) == 256  # a batch
    assert choose(256, 20, wanted=5000, memory=3000) == 5000
    assert choose(256, 20, wanted=1) == 256 and choose(4, 20, wanted=1) == 40


def test_the_memory_limit_is_that_of_the_innermost_cgroup(tmp_path):
    whole = memory_limit(tmp_path / "absent", tmp_path / "absent")
    assert whole == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    root, own = tmp_path / "root", tmp_path / "cgroup"
    (root / "job/step").mkdir(parents=True)
    own.write_text("0::/job/step\n")
    (root / "job/step/memory.max").write_text("max\n")
    (root / "job/memory.max").write_text("4096\n")
    assert memory_limit(own, root) == 4096
    (root / "memory").mkdir()
    (root / "memory/memory.limit_in_bytes").write_text("2048\n")  # version 1
    assert memory_limit(own, root) == 2048
