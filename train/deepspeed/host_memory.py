"""Host memory that a GPU copies into without anybody waiting: page-locked, of the size asked for, used again."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_SMALLEST = 1 << 20
"""Bytes. Below, torch's own page-locked memory does; it comes in powers of two, so 4.4 GB of moments would take 8."""


class HostMemory:
    """Lends memory for copies of tensors. What is given back is lent again: to find and to lock it took its time."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def copy(self, source: Tensor) -> Tensor:
        """A contiguous copy, which a GPU fills in the order of its stream.

        Raises OSError or RuntimeError when there is not enough memory, or not enough may be locked.
        """
        n_bytes = source.numel() * source.element_size()
        if n_bytes < _SMALLEST:
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        else:
            free = self._free[n_bytes]
            memory_N = free.pop() if free else _new(n_bytes, is_locked=source.is_cuda)
            target = memory_N.view(source.dtype).view(source.shape)
        return target.copy_(source, non_blocking=True)

    def give_back(self, copies: Iterable[Tensor]) -> None:
        """Nobody reads these any more; each once."""
        for copied in copies:
            memory_N = copied.flatten().view(torch.uint8)
            if len(memory_N) >= _SMALLEST:
                self._free[len(memory_N)].append(memory_N)


def _new(n_bytes: int, is_locked: bool) -> Tensor:
    """Bytes of host memory, which stay where they are when they are locked."""
    if not is_locked:
        return torch.empty(n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # a thousand times fewer pages to find and to lock
    bytes_N = torch.frombuffer(memory, dtype=torch.uint8).zero_()  # by many threads; the lock would take one
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(bytes_N.data_ptr(), n_bytes, 0))
    return bytes_N
