"""Attention of chunks of new tokens over a paged KV cache that already holds their keys: causal, with windows.

The query heads of a key/value head share a tile with neighboring tokens, so that a key is loaded once for all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.paged_attention import (
    LOG2_E,
    as_elements,
    attend_tiles,
    check_cache,
    load_queries,
    operand_dtype,
    padded,
    store_rows,
)

_TILE = 64


@triton.jit(do_not_specialize=["table_width", "n_sequences", "window"])
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, starts_ptr, lengths_ptr, out_ptr, log2_scale,
    table_width, n_sequences, window,
    N_HEADS: tl.constexpr, N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr,
    TILE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    IN: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # a block is TOKENS neighboring tokens of a sequence; HEADS: query heads of a group, padded
    ROWS: tl.constexpr = TOKENS * HEADS
    SPREAD: tl.constexpr = 1 if FORMAT == 0 else 2
    D_HEAD: tl.constexpr = WIDTH * SPREAD
    # the last block first: it sees the most keys
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    b = tl.arange(0, BLOCK)
    start = tl.load(starts_ptr + b, mask=b < n_sequences, other=0)
    stop = tl.load(starts_ptr + b + 1, mask=b < n_sequences, other=0)
    n_blocks = (stop - start + TOKENS - 1) // TOKENS
    block_end = tl.cumsum(n_blocks)
    if block < tl.sum(n_blocks):
        sequence = tl.sum((block_end <= block).to(tl.int32))
        first_token = tl.load(starts_ptr + sequence)
        n_tokens = tl.load(starts_ptr + sequence + 1) - first_token
        length = tl.load(lengths_ptr + sequence)
        offset = (block - tl.sum(tl.where(b == sequence, block_end - n_blocks, 0))) * TOKENS
        token = offset + tl.arange(0, ROWS) // HEADS
        head_of_group = tl.arange(0, ROWS) % HEADS
        is_row = (token < n_tokens) & (head_of_group < N_HEADS // N_GROUPS)
        column = tl.arange(0, COLUMNS)
        is_column = column < WIDTH
        head = group * (N_HEADS // N_GROUPS) + head_of_group
        is_element = is_row[:, None] & is_column[None, :]
        element = (token * N_HEADS + head)[:, None].to(tl.int64) * D_HEAD + column[None, :] * SPREAD
        rows_at = first_token.to(tl.int64) * (N_HEADS * D_HEAD)
        q, q_odd, row_scale = load_queries(q_ptr + rows_at, element, is_element, FORMAT, IN)

        position = length - n_tokens + token
        first_position = length - n_tokens + offset
        end = tl.minimum(first_position + TOKENS, length)
        begin = tl.where(window > 0, tl.maximum(first_position - window + 1, 0), 0)
        # tiles that every row sees whole need no mask: those between the window's edge and the diagonal
        first_tile = begin // TILE
        last_tile = (end + TILE - 1) // TILE
        whole_from = tl.where(window > 0, (tl.maximum(end - window, 0) + TILE - 1) // TILE, first_tile)
        whole_from = tl.minimum(tl.maximum(whole_from, first_tile), last_tile)
        whole_until = tl.maximum((first_position + 1) // TILE, whole_from)
        table_ptr = page_table_ptr + sequence.to(tl.int64) * table_width
        state = (
            tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32),
        )  # fmt: skip
        row_scale *= log2_scale
        for part in tl.static_range(3):
            part_first = first_tile if part == 0 else (whole_from if part == 1 else whole_until)
            part_last = whole_from if part == 0 else (whole_until if part == 1 else last_tile)
            state = attend_tiles(
                state, q, q_odd, row_scale, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
                part_first, part_last, begin, end, position, window, group, column, is_column,
                N_GROUPS, WIDTH, PAGE, FORMAT, TILE, STAGES, False, part != 1, IN, PTX,
            )  # fmt: skip
        total, out, out_odd = state[1], state[2], state[3]
        total = tl.where(is_row, total, 1.0)
        out = out / total[:, None]
        out_odd = out_odd / total[:, None]
        store_rows(out_ptr + rows_at, element, out, out_odd, is_element, FORMAT)


def prefill_attention(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, page_table_BP: Tensor, page_size: int, starts_B1: Tensor,
    lengths_B: Tensor, window: int | None = None, k_scale_SG: Tensor | None = None, v_scale_SG: Tensor | None = None,
    scale: float = 1.0, out_THK: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention of the last new tokens of each sequence over all of it up to themselves, in q's dtype.

    starts_B1: where each sequence's queries begin in q_THK, and where the last one's end (int32, increasing; rows
    beyond are left as they are). lengths_B: tokens of each sequence with the new ones, whose keys the cache holds
    (int32). Everything else as in `decode_attention`.
    """
    n_tokens, n_heads, _ = q_THK.shape
    n_kv_heads, batch = k_SGK.shape[1], len(lengths_B)
    cache_format = check_cache(q_THK, k_SGK, page_table_BP, k_scale_SG, v_scale_SG)
    assert starts_B1.shape == (batch + 1,) and page_table_BP.shape[0] == batch
    assert starts_B1.dtype == torch.int32 and lengths_B.dtype == torch.int32
    out_THK = torch.empty_like(q_THK) if out_THK is None else out_THK
    k, v = as_elements(k_SGK), as_elements(v_SGK)
    heads = triton.next_power_of_2(n_heads // n_kv_heads)
    # fastest on an H100 of 64 and 128 rows, 4 and 8 warps, and 3 and 5 stages
    rows, n_stages = (64, 5) if q_THK.element_size() == 2 else (16, 3)
    tokens = max(rows // heads, 1)
    _prefill_kernel[(n_tokens // tokens + batch, n_kv_heads)](
        q_THK, k, v, k_scale_SG, v_scale_SG, page_table_BP, starts_B1, lengths_B, out_THK, scale * LOG2_E,
        page_table_BP.stride(0), batch, window or 0,
        N_HEADS=n_heads, N_GROUPS=n_kv_heads, WIDTH=k.shape[2], PAGE=page_size, FORMAT=cache_format, TILE=_TILE,
        TOKENS=tokens, HEADS=heads, COLUMNS=padded(k.shape[2]), STAGES=n_stages, IN=operand_dtype(q_THK),
        PTX=q_THK.device.type == "cuda", BLOCK=triton.next_power_of_2(batch), num_warps=4,
    )  # fmt: skip
    return out_THK
