"""Norm and rotation of a decoding step's queries and keys, norm of its values, and their write to a paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.decode_norm import load_sum
from model.kernels.launch import overlapping

_HEADS = 4
"""Heads of a program, whatever the batch: the order of sums depends on it."""


@triton.jit
def _rotary_write_kernel(
    parts_ptr, w_q_ptr, w_k_ptr, cos_ptr, sin_ptr, lengths_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    part_size, table_width, n_q, eps,
    N_KV: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    n_all = n_q + 2 * N_KV
    inside = (head < n_all) & (column < HALF)
    is_q = inside & (head < n_q)
    is_k = inside & (head >= n_q) & (head < n_q + N_KV)
    is_v = inside & (head >= n_q + N_KV)
    # weights and tables never change; values are neither scaled nor rotated
    w_first = tl.load(w_q_ptr + column + 0 * head, mask=is_q, other=1.0).to(tl.float32)
    w_second = tl.load(w_q_ptr + HALF + column + 0 * head, mask=is_q, other=1.0).to(tl.float32)
    if N_KV > 0:
        w_first *= tl.load(w_k_ptr + column + 0 * head, mask=is_k, other=1.0).to(tl.float32)
        w_second *= tl.load(w_k_ptr + HALF + column + 0 * head, mask=is_k, other=1.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(lengths_ptr + row)
    position = tl.maximum(length - 1, 0)
    cos = tl.load(cos_ptr + position.to(tl.int64) * HALF + column + 0 * head, mask=is_q | is_k, other=1.0)
    sin = tl.load(sin_ptr + position.to(tl.int64) * HALF + column + 0 * head, mask=is_q | is_k, other=0.0)

    offset = (row * n_all + head) * (2 * HALF) + column
    first = load_sum(parts_ptr, offset, inside, part_size, SPLITS)
    second = load_sum(parts_ptr, offset + HALF, inside, part_size, SPLITS)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    first, second = first * scale * w_first, second * scale * w_second
    first, second = first * cos - second * sin, second * cos + first * sin

    dtype = q_ptr.dtype.element_ty
    target = (row * n_q + head) * (2 * HALF) + column
    tl.store(q_ptr + target, first.to(dtype), mask=is_q)
    tl.store(q_ptr + target + HALF, second.to(dtype), mask=is_q)
    if N_KV > 0:
        page = tl.load(table_ptr + row * table_width + position // PAGE, mask=length > 0, other=0).to(tl.int64)
        slot = page * PAGE + position % PAGE
        is_k = is_k & (column < length * HALF)  # none in a padded row
        is_v = is_v & (column < length * HALF)
        target = (slot * N_KV + head - n_q) * (2 * HALF) + column
        tl.store(k_ptr + target, first.to(dtype), mask=is_k)
        tl.store(k_ptr + target + HALF, second.to(dtype), mask=is_k)
        target -= N_KV * (2 * HALF)
        tl.store(v_ptr + target, first.to(dtype), mask=is_v)
        tl.store(v_ptr + target + HALF, second.to(dtype), mask=is_v)


def rotary_write(
    parts_SBX: Tensor, w_q_K: Tensor, w_k_K: Tensor | None, rope_LC: tuple[Tensor, Tensor], lengths_B: Tensor,
    page_table_BP: Tensor, page_size: int, q_BHK: Tensor, k_SGK: Tensor, v_SGK: Tensor, eps: float,
) -> None:  # fmt: skip
    """Finish queries, keys and values of the newest token of each sequence, at position lengths_B - 1.

    parts_SBX: split-K parts of the product with the stacked weights of queries, keys and values; of queries only where
    the layer reads another layer's cache (w_k_K is None). rope_LC: float32 (cos, sin) of every position. Keys and
    values go to the position's slot; a row of length 0 writes none.
    """
    rows, n_heads, d_head = q_BHK.shape
    n_kv_heads = 0 if w_k_K is None else k_SGK.shape[1]
    assert parts_SBX.shape[2] == (n_heads + 2 * n_kv_heads) * d_head and parts_SBX.is_contiguous()
    _rotary_write_kernel[(rows, triton.cdiv(n_heads + 2 * n_kv_heads, _HEADS))](
        parts_SBX, w_q_K, w_k_K, *rope_LC, lengths_B, page_table_BP, q_BHK, k_SGK, v_SGK,
        parts_SBX[0].numel(), page_table_BP.stride(0), n_heads, eps,
        N_KV=n_kv_heads, PAGE=page_size, SPLITS=len(parts_SBX), HALF=d_head // 2, HEADS=_HEADS,
        BLOCK=triton.next_power_of_2(d_head // 2), num_warps=4, **overlapping(q_BHK.device),
    )  # fmt: skip
