"""Attention of one new token a sequence over a paged KV cache, divided over the context (flash-decoding).

All query heads of a key/value head are rows of one tile. Partial results of a divided sequence are float32 and are
summed in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.decode_plan import DecodePlan
from model.kernels.launch import overlapping
from model.kernels.paged_attention import (
    LOG2_E,
    as_elements,
    attend_tiles,
    check_cache,
    load_queries,
    operand_dtype,
    padded,
    prefetch_tile,
    store_rows,
)  # fmt: skip

_COMBINED = 4096
"""Elements of partial results that a program loads at once."""


@triton.jit
def _merge(
    partial_ptr, partial_lse_ptr, out_row_ptr, first, n_parts, head, is_row,
    N_HEADS: tl.constexpr, D_HEAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of a sequence in their order."""
    column = tl.arange(0, COLUMNS)
    is_column = column < D_HEAD
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, COLUMNS], tl.float32)
    AT_ONCE: tl.constexpr = 8192 // (ROWS * COLUMNS) if ROWS * COLUMNS < 8192 else 1
    for start in range(0, n_parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            is_here = is_row & (tl.full([ROWS], start + i, tl.int32) < n_parts)
            row = (first + start + i).to(tl.int64) * N_HEADS + head
            # other processors wrote it during this launch: not from the L1 cache
            lse = tl.load(partial_lse_ptr + row, mask=is_here, other=float("-inf"), cache_modifier=".cg")
            values = tl.load(
                partial_ptr + row[:, None] * D_HEAD + column[None, :],
                mask=is_here[:, None] & is_column[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            new_top = tl.maximum(top, lse)
            decay = tl.exp2(top - new_top)
            weight = tl.exp2(lse - new_top)
            total = total * decay + weight
            out = out * decay[:, None] + weight[:, None] * values
            top = new_top
    out = out / tl.where(is_row, total, 1.0)[:, None]
    element = head[:, None] * D_HEAD + column[None, :]
    store_rows(out_row_ptr, element, out, out, is_row[:, None] & is_column[None, :], 0)


@triton.jit(do_not_specialize=["table_width", "n_sequences"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, items_ptr, program_items_ptr, out_ptr,
    partial_ptr, partial_lse_ptr, sequence_items_ptr, arrivals_ptr, log2_scale, table_width, n_sequences,
    N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr, MERGES: tl.constexpr, ALIGNED: tl.constexpr,
    IN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    # IN: dtype of the products' operands. WIDTH: elements of a head as loaded: d_head, or 16-bit pairs of it
    # what the plan wrote is there before the kernel in front of this one ends
    group = tl.program_id(1)
    program_ptr = program_items_ptr + 8 * tl.program_id(0)
    first_item = tl.load(program_ptr)
    n_items = tl.load(program_ptr + 1)
    sequence = tl.load(program_ptr + 4)
    begin = tl.load(program_ptr + 5)
    end = tl.load(program_ptr + 6)
    n_parts = tl.load(program_ptr + 7)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    head = group * (N_HEADS // N_GROUPS) + row
    is_row = row < N_HEADS // N_GROUPS
    is_column = column < WIDTH
    is_element = is_row[:, None] & is_column[None, :]
    SPREAD: tl.constexpr = 1 if FORMAT == 0 else 2  # a loaded element holds so many of the head's
    D_HEAD: tl.constexpr = WIDTH * SPREAD

    if OVERLAPS:
        # so are all keys and values but the newest; what that kernel still writes goes to the L2 cache too
        if n_items > 0:
            table_ptr = page_table_ptr + sequence.to(tl.int64) * table_width
            for ahead in tl.static_range(AHEAD):
                prefetch_tile(
                    k_ptr, v_ptr, table_ptr, begin // TILE + ahead, begin, end, group, N_GROUPS, WIDTH, PAGE, TILE, LINE
                )
        if not MERGES:  # else the next layer's programs would fill the processors that are done first
            gdc_launch_dependents()
        gdc_wait()
    for number in range(n_items):
        item = first_item + number
        next_sequence = tl.load(items_ptr + 4 * (item + 1))
        next_begin = tl.load(items_ptr + 4 * (item + 1) + 1)
        next_end = tl.load(items_ptr + 4 * (item + 1) + 2)
        next_n_parts = tl.load(items_ptr + 4 * (item + 1) + 3)
        table_ptr = page_table_ptr + sequence.to(tl.int64) * table_width
        element = head[:, None] * D_HEAD + column[None, :] * SPREAD
        q_row_ptr = q_ptr + sequence.to(tl.int64) * (N_HEADS * D_HEAD)
        q, q_odd, row_scale = load_queries(q_row_ptr, element, is_element, FORMAT, IN)
        state = (
            tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS, TILE], tl.float32),
            tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32),
        )  # fmt: skip
        top, sums, out, out_odd = attend_tiles(
            state, q, q_odd, row_scale * log2_scale, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
            begin // TILE, (end + TILE - 1) // TILE, begin, end, row, 0, group, column, is_column,
            N_GROUPS, WIDTH, PAGE, FORMAT, TILE, STAGES, ALIGNED, False, IN, PTX,
        )  # fmt: skip
        total = tl.sum(sums, 1)
        out = out / total[:, None]
        out_odd = out_odd / total[:, None]
        if n_parts == 1:
            store_rows(out_ptr + sequence.to(tl.int64) * (N_HEADS * D_HEAD), element, out, out_odd, is_element, FORMAT)
        else:
            part_ptr = partial_ptr + item.to(tl.int64) * (N_HEADS * D_HEAD)
            store_rows(part_ptr, element, out, out_odd, is_element, FORMAT)
            tl.store(partial_lse_ptr + item * N_HEADS + head, top + tl.log2(total), mask=is_row)
            if MERGES:
                arrival_ptr = arrivals_ptr + sequence * N_GROUPS + group
                tl.debug_barrier()  # all threads' parts are stored before one thread counts this item
                if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == n_parts - 1:
                    tl.store(arrival_ptr, 0)  # for the next launch
                    first_part = tl.load(sequence_items_ptr + 2 * sequence)
                    _merge(
                        partial_ptr, partial_lse_ptr, out_ptr + sequence.to(tl.int64) * (N_HEADS * D_HEAD),
                        first_part, n_parts, head, is_row, N_HEADS, D_HEAD, ROWS, COLUMNS * SPREAD,
                    )  # fmt: skip
        sequence, begin, end, n_parts = next_sequence, next_begin, next_end, next_n_parts
    if MERGES:
        for padded_row in range(tl.program_id(0), n_sequences, tl.num_programs(0)):
            if tl.load(sequence_items_ptr + 2 * padded_row + 1) == 0:
                row_ptr = out_ptr + (padded_row + tl.full([], 0, tl.int64)) * (N_HEADS * D_HEAD)
                zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
                element = head[:, None] * D_HEAD + column[None, :] * SPREAD
                store_rows(row_ptr, element, zeros, zeros, is_element, FORMAT)


@triton.jit
def _combine_kernel(
    partial_ptr, partial_lse_ptr, sequence_items_ptr, out_ptr,
    N_HEADS: tl.constexpr, D_HEAD: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    first = tl.load(sequence_items_ptr + 2 * sequence)
    n_parts = tl.load(sequence_items_ptr + 2 * sequence + 1)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D_HEAD
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    if n_parts != 1:
        for head in range(tl.program_id(1) * HEADS, min((tl.program_id(1) + 1) * HEADS, N_HEADS)):
            top = tl.full([], -1e30, tl.float32)
            total = tl.full([], 0.0, tl.float32)
            out = tl.zeros([COLUMNS], tl.float32)
            for start in range(0, n_parts, PARTS):
                part = start + tl.arange(0, PARTS)
                row = (first + part).to(tl.int64) * N_HEADS + head
                is_part = part < n_parts
                lse = tl.load(partial_lse_ptr + row, mask=is_part, other=float("-inf"))
                values = tl.load(
                    partial_ptr + row[:, None] * D_HEAD + column[None, :],
                    mask=is_part[:, None] & is_column[None, :],
                    other=0.0,
                )
                new_top = tl.maximum(top, tl.max(lse, 0))
                decay = tl.exp2(top - new_top)
                weights = tl.exp2(lse - new_top)
                total = total * decay + tl.sum(weights, 0)
                out = out * decay + tl.sum(weights[:, None] * values, 0)
                top = new_top
            # a sequence without items is a padded row
            out = tl.where(n_parts == 0, 0.0, out / tl.where(n_parts == 0, 1.0, total))
            target_ptr = out_ptr + (sequence.to(tl.int64) * N_HEADS + head) * D_HEAD + column
            tl.store(target_ptr, out.to(out_ptr.dtype.element_ty), mask=is_column)


def decode_attention(
    q_BHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, page_table_BP: Tensor, page_size: int, plan: DecodePlan,
    k_scale_SG: Tensor | None = None, v_scale_SG: Tensor | None = None, scale: float = 1.0,
    out_BHK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of one query a sequence, in q's dtype, over the keys that `plan` was last updated for.

    k_SGK, v_SGK: pools of slots, page p at slots p * page_size and on, in q's dtype, or int8 or float8_e4m3fn with
    scales (float32 or bfloat16) a slot and head. page_table_BP: int32; entries beyond a sequence's keys or before its
    window are not read, nor are slots that hold no visible key. scale: of the scores; the model scales its queries.
    A sequence of length 0 gives zeros.
    """
    batch, n_heads, d_head = q_BHK.shape
    n_kv_heads = k_SGK.shape[1]
    assert (batch, n_heads, n_kv_heads, d_head) == (plan.batch, plan.n_heads, plan.n_kv_heads, plan.d_head)
    cache_format = check_cache(q_BHK, k_SGK, page_table_BP, k_scale_SG, v_scale_SG)
    out_BHK = torch.empty_like(q_BHK) if out_BHK is None else out_BHK
    k, v = as_elements(k_SGK), as_elements(v_SGK)
    launch = overlapping(q_BHK.device)
    n_stages, n_warps = configuration(q_BHK.dtype)
    _decode_kernel[(plan.n_programs, n_kv_heads)](
        q_BHK, k, v, k_scale_SG, v_scale_SG, page_table_BP, plan.items_I4, plan.program_items_P8, out_BHK,
        plan.partial_IHK, plan.partial_lse_IH, plan.sequence_items_B2, plan.arrivals_BG, scale * LOG2_E,
        page_table_BP.stride(0), batch,
        N_HEADS=n_heads, N_GROUPS=n_kv_heads, WIDTH=k.shape[2], PAGE=page_size, FORMAT=cache_format, TILE=plan.tile,
        ROWS=padded(n_heads // n_kv_heads), COLUMNS=padded(k.shape[2]),
        STAGES=n_stages, AHEAD=int(plan.n_programs >= 8 * batch), LINE=128 // k.element_size(), MERGES=plan.merges,
        ALIGNED=plan.window is None, IN=operand_dtype(q_BHK), PTX=q_BHK.device.type == "cuda", num_warps=n_warps,
        **launch,
    )  # fmt: skip
    if plan.merges:
        return out_BHK
    # few sequences have many parts: more programs a sequence, and more parts at a time
    parts = min(max(triton.next_power_of_2(plan.n_programs // batch + 2), 8), 128) if not plan.deterministic else 32
    columns = min(triton.next_power_of_2(d_head), _COMBINED // parts)
    heads = max(batch * n_heads // 1024, 1)
    _combine_kernel[(batch, triton.cdiv(n_heads, heads), triton.cdiv(d_head, columns))](
        plan.partial_IHK, plan.partial_lse_IH, plan.sequence_items_B2, out_BHK,
        N_HEADS=n_heads, D_HEAD=d_head, HEADS=heads, PARTS=parts, COLUMNS=columns,
        num_warps=max(parts * columns // 1024, 1), **launch,
    )  # fmt: skip
    return out_BHK


def configuration(dtype: torch.dtype) -> tuple[int, int]:
    """(stages of the loads' pipeline, warps). A key takes two stages: its page's number is loaded ahead of it."""
    return (5, 4) if dtype.itemsize == 2 else (3, 4)
