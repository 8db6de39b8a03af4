"""Memory that data workers fill with batches: its size, how it is shared, and how it is lent."""

import contextlib
import math
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import torch

from utils import log

DEFAULT_PREFETCH = 1000  # items
MEMORY_SHARE = 8  # processes may fill one eighth of a node's memory by reading ahead
PAGE_LOCKED: list[np.ndarray] = []  # memory that must not be unmapped


class BatchMemory:
    """Memory for batches of `size` items, which forked processes share. It does not use /dev/shm.

    batches: {name: tensor [size, ...]} of each place, for the workers to fill.
    """

    def __init__(self, item_spec: dict, size: int, places: int):
        self.item_spec, self.offsets, end = item_spec, {}, 0
        for name, (shape, dtype) in item_spec.items():
            self.offsets[name] = end
            end += math.ceil(size * math.prod(shape) * dtype.itemsize / 64) * 64  # aligned
        self.place_bytes = max(1, math.ceil(end / mmap.PAGESIZE)) * mmap.PAGESIZE
        self.memory = np.frombuffer(mmap.mmap(-1, places * self.place_bytes), np.uint8)
        self.batches = [self.tensors(self.part(place), size) for place in range(places)]
        self._free = list(range(places))[::-1]
        self._lent: list[tuple[int, weakref.ref]] = []

    @property
    def free(self) -> list[int]:
        """The places that are neither being filled nor lent, to pop from."""
        # Not a callback per array: Python drops a KeyboardInterrupt that is raised in one.
        self._free += [place for place, part in self._lent if part() is None]
        self._lent = [(place, part) for place, part in self._lent if place not in self._free]
        return self._free

    def part(self, place: int) -> np.ndarray:
        return self.memory[place * self.place_bytes : (place + 1) * self.place_bytes]

    def tensors(self, part: np.ndarray, size: int) -> dict[str, torch.Tensor]:
        """Make the tensors of `size` items in the array `part`. Their storage keeps it alive."""
        return {
            name: torch.frombuffer(
                part, dtype=dtype, count=size * math.prod(shape), offset=self.offsets[name]
            ).view(size, *shape)
            for name, (shape, dtype) in self.item_spec.items()
        }

    def lend(self, place: int, size: int) -> dict[str, torch.Tensor]:
        """Return the tensors of a place. It is free again when they and their views are gone."""
        part = self.part(place)
        self._lent.append((place, weakref.ref(part)))
        return self.tensors(part, size)

    def page_lock(self) -> bool:
        """Page-lock the memory until the process ends, so that the GPU can copy from it by itself.

        Unlocking would wait for the GPU, which after a failure may wait for other ranks forever.
        On failure, logs a warning and returns False.
        """
        start, size = self.memory.ctypes.data, self.memory.nbytes
        if code := int(torch.cuda.cudart().cudaHostRegister(start, size, 0)):
            log.warning(
                "could not page-lock the %.1f GiB of memory for batches, so each batch is copied "
                "once more: CUDA error %d",
                *(size / 2**30, code),
            )
            # The runtime would report the error again, as that of the next kernel.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device="cuda")
            return False
        PAGE_LOCKED.append(self.memory)
        return True


def prefetch_items(size: int, workers: int) -> int:
    """Return how many items must be read ahead: two per worker, and at least a batch."""
    return max(size, 2 * workers)


def training_prefetch(
    item_spec: dict,
    size: int,
    workers: int,
    *,
    wanted: int | None,
    step: int,
    lend: int,
    processes: int,
) -> int:
    """Choose how many items each process of a training reads ahead.

    With many of them, a process whose videos decode slowly for a while does not hold up the others.
    wanted: the user's choice. The default is DEFAULT_PREFETCH, or the items of a step if they are
    more. It is reduced until these and the batches that are lent, of all processes of the node, fit
    in 1/MEMORY_SHARE of memory_limit. The result is never below prefetch_items.
    """
    if wanted is None:
        item = sum(math.prod(shape) * dtype.itemsize for shape, dtype in item_spec.values())
        fitting = memory_limit() // MEMORY_SHARE // processes // item - lend * size
        wanted = min(max(DEFAULT_PREFETCH, step), fitting)
    return max(wanted, prefetch_items(size, workers))


def memory_limit(cgroup: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """Return the memory of this machine in bytes, or the limit of this process's cgroup if lower.

    Containers and SLURM limit the memory of cgroups. With version 1 of these, only the limit of a
    container is found.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    files = [Path(root, "memory", "memory.limit_in_bytes"), Path(root, "memory.max")]
    with contextlib.suppress(OSError):
        for line in Path(cgroup).read_text().splitlines():
            if line.startswith("0::"):  # version 2
                own = Path(root, line[3:].lstrip("/"))
                files += [f / "memory.max" for f in (own, *own.parents) if f.is_relative_to(root)]
    for file in files:
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            limits.append(int(file.read_text()))
    return min(limits)
