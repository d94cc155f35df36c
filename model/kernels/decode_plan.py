"""Division of a decoding step's attention over the GPU: made on the GPU once a step, used by all layers of a kind.

A sequence's visible keys are cut into aligned tiles, and the tiles of all sequences, one after another, into equal
shares, one a program (as stream-K does for matrix products, arXiv 2301.03598). A program's share is one item for each
sequence that it touches. With `deterministic`, items depend on the sequence's own length only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import n_processors

DETERMINISTIC_TOKENS, DETERMINISTIC_ITEMS, DOUBLINGS = 512, 64, 6
"""Deterministic items: as many tokens, doubled (at most so often) while a sequence would have more items than this."""

MOST_MERGED = 32
"""The most parts of a sequence where the attention kernel sums them: one program does."""


@triton.jit
def _at(values, indices, index):
    return tl.sum(tl.where(indices == index, values, 0))


@triton.jit
def _store_item(pointer, sequence, begin, end, n_parts):
    tl.store(pointer, sequence)
    tl.store(pointer + 1, begin)
    tl.store(pointer + 2, end)
    tl.store(pointer + 3, n_parts)


@triton.jit(do_not_specialize=["n_sequences", "window", "most_parts"])
def _plan_kernel(
    lengths_ptr, items_ptr, program_items_ptr, sequence_items_ptr, n_sequences, window, most_parts,
    TILE: tl.constexpr, DETERMINISTIC: tl.constexpr, UNIT: tl.constexpr, MOST: tl.constexpr, DOUBLINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    b = tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + b, mask=b < n_sequences, other=0).to(tl.int32)
    oldest = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first_tile = oldest // TILE
    n_tiles = tl.where(length > 0, (length + TILE - 1) // TILE - first_tile, 0)
    # shares are made of units: tiles, or the tiles of a deterministic item
    unit = tl.full([BLOCK], UNIT, tl.int32)
    if DETERMINISTIC:
        for _ in tl.static_range(DOUBLINGS):
            unit = tl.where(n_tiles > MOST * unit, 2 * unit, unit)
    n_units = (n_tiles + unit - 1) // unit
    unit_end = tl.cumsum(n_units)
    unit_begin = unit_end - n_units
    total = tl.sum(n_units)
    share = tl.maximum((total + n_programs - 1) // n_programs, 1)
    # a sequence's last program sums its parts: they stay few, however long the sequence
    share = tl.maximum(share, (tl.max(n_tiles) + most_parts - 1) // most_parts)
    n_items = n_units
    if not DETERMINISTIC:
        n_items = tl.where(n_units > 0, (unit_end - 1) // share - unit_begin // share + 1, 0)
    item_end = tl.cumsum(n_items)
    item_begin = item_end - n_items
    if program == 0:
        tl.store(sequence_items_ptr + 2 * b, item_begin, mask=b < n_sequences)
        tl.store(sequence_items_ptr + 2 * b + 1, n_items, mask=b < n_sequences)

    program_ptr = program_items_ptr + 8 * program
    place = program * share
    stop = tl.minimum(place + share, total)
    sequence = tl.sum((unit_end <= place).to(tl.int32))
    item = _at(item_begin, b, sequence)
    if DETERMINISTIC:
        item += place - _at(unit_begin, b, sequence)
    else:
        item += program - _at(unit_begin, b, sequence) // share
    first_item = item
    n_items_here = 0
    while place < stop:
        begin = _at(unit_begin, b, sequence)
        place_end = place + 1
        if not DETERMINISTIC:
            place_end = tl.minimum(stop, _at(unit_end, b, sequence))
        per_unit = _at(unit, b, sequence)
        tile = _at(first_tile, b, sequence)
        item_from = tl.maximum((tile + (place - begin) * per_unit) * TILE, _at(oldest, b, sequence))
        item_until = tl.minimum((tile + (place_end - begin) * per_unit) * TILE, _at(length, b, sequence))
        n_parts = _at(n_items, b, sequence)
        _store_item(items_ptr + 4 * (first_item + n_items_here), sequence, item_from, item_until, n_parts)
        if n_items_here == 0:
            _store_item(program_ptr + 4, sequence, item_from, item_until, n_parts)
        n_items_here += 1
        place = place_end
        sequence = tl.sum((unit_end <= place).to(tl.int32))
    tl.store(program_ptr, first_item)
    tl.store(program_ptr + 1, n_items_here)


class DecodePlan:
    """Work list of decoding steps, for layers of one window, and the partial results that they share.

    Its buffers have fixed addresses and sizes, so `update` and the kernels that read them can be captured in a CUDA
    graph. Layers that use it must run one after another.

    items_I4: (sequence, first position, end position, number of items of the sequence), a sequence's items adjacent.
    program_items_P8: first item and number of items of each program, two unused numbers, and the first item itself.
    sequence_items_B2: first item and number of items of each sequence.
    arrivals_BG: items done of each sequence and key/value head; zero between launches.
    partial_IHK, partial_lse_IH: output of each item of a divided sequence, and the base-2 logarithm of its normalizer.
    """

    def __init__(
        self,
        batch: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        max_length: int,
        window: int | None = None,
        deterministic: bool = False,
        cache_dtype: torch.dtype = torch.bfloat16,
        tile: int | None = None,
        n_programs: int | None = None,
        device: torch.device | str = "cuda",
    ):
        assert n_heads % n_kv_heads == 0 and (window is None or window > 0)
        device = torch.device(device)
        self.batch, self.n_heads, self.n_kv_heads, self.d_head = batch, n_heads, n_kv_heads, d_head
        self.window, self.deterministic = window, deterministic
        processors = n_processors(device, interpreted=3)  # so that the interpreter divides sequences
        # fastest on an H100: a program a processor where a sequence has many parts, except to unpack 8 bits
        many_parts = 4 * batch <= processors and cache_dtype.itemsize == 2 and not deterministic
        self.tile = tile or (128 if many_parts else 64)
        self.n_programs = n_programs or max(processors * (1 if many_parts else 2) // n_kv_heads, 1)
        n_items = self.n_programs + batch
        if deterministic:
            n_tiles = -(-min(max_length, (window or max_length) + self.tile) // self.tile)
            n_items = batch * _most_items(n_tiles, max(DETERMINISTIC_TOKENS // self.tile, 1))
        on_device = {"dtype": torch.int32, "device": device}
        self.items_I4 = torch.zeros(n_items + 1, 4, **on_device)  # type: ignore[call-overload]
        self.program_items_P8 = torch.zeros(self.n_programs, 8, **on_device)  # type: ignore[call-overload]
        self.sequence_items_B2 = torch.zeros(batch, 2, **on_device)  # type: ignore[call-overload]
        # a kernel of its own sums parts faster, if there are many, and in the same order whatever the batch
        self.merges = not deterministic and 2 * batch >= self.n_programs
        self.arrivals_BG = torch.zeros(batch, n_kv_heads, **on_device)  # type: ignore[call-overload]
        self.partial_IHK = torch.empty(n_items, n_heads, d_head, device=device)
        self.partial_lse_IH = torch.empty(n_items, n_heads, device=device)

    def update(self, lengths_B: Tensor) -> None:
        """Divide a step in which sequence b attends to positions below lengths_B[b] (int32; 0: a padded row)."""
        assert lengths_B.shape == (self.batch,) and lengths_B.is_contiguous()
        unit = max(DETERMINISTIC_TOKENS // self.tile, 1) if self.deterministic else 1
        _plan_kernel[(self.n_programs,)](
            lengths_B, self.items_I4, self.program_items_P8, self.sequence_items_B2, self.batch, self.window or 0,
            MOST_MERGED if self.merges else 1 << 30,
            TILE=self.tile, DETERMINISTIC=self.deterministic, UNIT=unit, MOST=DETERMINISTIC_ITEMS, DOUBLINGS=DOUBLINGS,
            BLOCK=triton.next_power_of_2(self.batch), num_warps=4,
        )  # fmt: skip


def _most_items(n_tiles: int, unit: int) -> int:
    """The most items of a sequence of at most n_tiles."""
    most = 1
    for _ in range(DOUBLINGS + 1):
        most = max(most, min(-(-n_tiles // unit), DETERMINISTIC_ITEMS))
        unit *= 2
    return max(most, -(-n_tiles // (unit // 2)))
