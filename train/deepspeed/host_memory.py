"""Reusable pinned host buffers of exact size, for asynchronous copies from the GPU."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_SMALLEST = 1 << 20
"""Bytes. Smaller copies use torch's pinned allocator, which rounds up to powers of two (4.4 GB would take 8)."""


class HostMemory:
    """A pool of host buffers. Returned buffers are reused, since allocating and pinning them is slow."""

    def __init__(self) -> None:
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def copy(self, source: Tensor) -> Tensor:
        """A contiguous copy, asynchronous from a GPU (in stream order).

        Raises OSError or RuntimeError when memory runs out or the limit of pinned memory is reached.
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
        """Return copies to the pool, each once; they must not be read afterwards."""
        for copied in copies:
            memory_N = copied.flatten().view(torch.uint8)
            if len(memory_N) >= _SMALLEST:
                self._free[len(memory_N)].append(memory_N)


def _new(n_bytes: int, is_locked: bool) -> Tensor:
    """A buffer of host memory, pinned if `is_locked`."""
    if not is_locked:
        return torch.empty(n_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # far fewer pages to fault in and to pin
    bytes_N = torch.frombuffer(
        memory, dtype=torch.uint8
    ).zero_()  # faults pages in with many threads; pinning would use one
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(bytes_N.data_ptr(), n_bytes, 0))
    return bytes_N
