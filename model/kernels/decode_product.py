"""Products of a decoding step's rows with a weight matrix: weights are the tall operand of the matrix unit.

Each program reads its weights once. Parts of a divided inner dimension (split-K) are float32 and summed, in a fixed
order, by the kernel that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.decode_prefetch import prefetch_rows
from model.kernels.geglu import geglu, gelu_parts
from model.kernels.launch import overlapping
from model.kernels.paged_attention import operand_dtype, padded

MOST_ROWS = 256
"""Rows of a program; more are those of another one."""


@dataclass(frozen=True)
class Tiles:
    """How a product is divided: weight rows and columns of a tile, parts of the inner dimension, and the launch.

    prefetch: most bytes of a weight row that a program loads into the L2 cache before it waits for its inputs.
    rows_a_block: weight rows of a program, if fewer than block_n, so that every processor has one.
    """

    block_n: int
    block_k: int
    splits: int = 1
    n_warps: int = 4
    n_stages: int = 4
    prefetch: int = 4096
    rows_a_block: int | None = None


@triton.jit
def soft_capped(x, cap):
    """cap * tanh(x / cap), or x where cap is 0."""
    if cap > 0:
        x = cap * (1 - 2 / (1 + tl.exp(2 * x / cap)))
    return x


@triton.jit
def _product_kernel(
    x_ptr, w_ptr, out_ptr, n_rows, n_out, n_in, in_a_split, cap, prefetched_bytes, rows_a_block,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GATED: tl.constexpr, ALL_ROWS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, IN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * rows_a_block
    n = first + tl.arange(0, BLOCK_N)
    n_end = tl.minimum(first + rows_a_block, n_out)
    split = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    k_begin = split * in_a_split
    k_end = tl.minimum(k_begin + in_a_split, n_in)
    w_row_ptr = w_ptr + n.to(tl.int64) * n_in
    linear_ptr = w_row_ptr + n_in.to(tl.int64) * n_out
    if OVERLAPS:
        if prefetched_bytes > 0:
            first_ptr = w_ptr + first.to(tl.int64) * n_in + k_begin
            n_prefetched = n_end - first
            row_bytes = n_in * w_ptr.dtype.element_ty.primitive_bitwidth // 8
            prefetch_rows(first_ptr, n_prefetched, row_bytes, prefetched_bytes)
            if GATED:
                prefetch_rows(first_ptr + n_in.to(tl.int64) * n_out, n_prefetched, row_bytes, prefetched_bytes)
        gdc_launch_dependents()
        gdc_wait()
    out = tl.zeros([BLOCK_N, ROWS], tl.float32)
    linear = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for k_first in tl.range(k_begin, k_end, BLOCK_K, num_stages=STAGES):
        k = k_first + tl.arange(0, BLOCK_K)
        x_pointers = x_ptr + m[None, :] * n_in + k[:, None]
        if ALL_ROWS and EVEN_K:
            x = tl.load(x_pointers)
        elif EVEN_K:
            x = tl.load(x_pointers, mask=m[None, :] < n_rows, other=0.0)
        else:
            x = tl.load(x_pointers, mask=(m[None, :] < n_rows) & (k[:, None] < k_end), other=0.0)
        if EVEN_N and EVEN_K:
            w = tl.load(w_row_ptr[:, None] + k[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(w_row_ptr[:, None] + k[None, :], mask=(n[:, None] < n_end) & (k[None, :] < k_end), other=0.0)
        out = tl.dot(w.to(IN), x.to(IN), out, input_precision="ieee")
        if GATED:
            if EVEN_N and EVEN_K:
                w = tl.load(linear_ptr[:, None] + k[None, :], eviction_policy="evict_first")
            else:
                mask = (n[:, None] < n_end) & (k[None, :] < k_end)
                w = tl.load(linear_ptr[:, None] + k[None, :], mask=mask, other=0.0)
            linear = tl.dot(w.to(IN), x.to(IN), linear, input_precision="ieee")
    if GATED:
        gelu, _ = gelu_parts(out)
        out = gelu * linear
    else:
        out = soft_capped(out, cap)
    row = (split * n_rows + m).to(tl.int64)
    mask = (n[:, None] < n_end) & (m[None, :] < n_rows)
    tl.store(out_ptr + row[None, :] * n_out + n[:, None], out.to(out_ptr.dtype.element_ty), mask=mask)


def product(
    x_BK: Tensor, w_NK: Tensor, out_SBN: Tensor, tiles: Tiles | None, gated: bool = False, cap: float = 0.0
) -> None:
    """Write the products of rows with a weight matrix, in parts over the inner dimension K (S parts, to be summed).

    gated: w_NK holds the rows of the gate, then as many of the linear branch, and the output is gelu(gate) * linear.
    cap: the softcap of the output, 0 for none. Both need a single part. tiles: None for cuBLAS.
    """
    if tiles is None:
        _cublas_product(x_BK, w_NK, out_SBN[0], gated, cap)
        return
    n_rows, n_in = x_BK.shape
    n_out = len(w_NK) // (2 if gated else 1)
    assert out_SBN.shape == (tiles.splits, n_rows, n_out) and w_NK.shape[1] == n_in
    assert x_BK.is_contiguous() and w_NK.is_contiguous() and out_SBN.is_contiguous()
    assert tiles.splits == 1 or not (gated or cap)
    in_a_split = triton.cdiv(triton.cdiv(n_in, tiles.block_k), tiles.splits) * tiles.block_k
    rows = min(padded(n_rows), MOST_ROWS)
    rows_a_block = tiles.rows_a_block or tiles.block_n
    n_bytes = min(tiles.prefetch, in_a_split * w_NK.element_size())
    is_aligned = n_in * w_NK.element_size() % 16 == 0 and n_in % in_a_split == 0 and w_NK.data_ptr() % 16 == 0
    _product_kernel[(triton.cdiv(n_out, rows_a_block), tiles.splits, triton.cdiv(n_rows, rows))](
        x_BK, w_NK, out_SBN, n_rows, n_out, n_in, in_a_split, cap, n_bytes if is_aligned else 0, rows_a_block,
        ROWS=rows, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GATED=gated, ALL_ROWS=n_rows % rows == 0,
        EVEN_N=n_out % rows_a_block == 0 and rows_a_block == tiles.block_n, EVEN_K=n_in % tiles.block_k == 0,
        STAGES=tiles.n_stages, IN=operand_dtype(x_BK), num_warps=tiles.n_warps, **overlapping(x_BK.device),
    )  # fmt: skip


def _cublas_product(x_BK: Tensor, w_NK: Tensor, out_BN: Tensor, gated: bool, cap: float) -> None:
    if gated:
        geglu(x_BK @ w_NK.T, out_BN)
    elif out_BN.dtype == x_BK.dtype:
        torch.mm(x_BK, w_NK.T, out=out_BN)
    else:
        out_BN.copy_(x_BK @ w_NK.T)
        if cap:
            out_BN.div_(cap).tanh_().mul_(cap)
