"""Products of one row with a weight matrix, with the sandwich norms in front of them recomputed by every program.

A program holds its first weights in registers and has more of them loaded into the L2 cache before it waits for the
kernel in front of it, so that memory stays busy between kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.decode_norm import rms_scale
from model.kernels.decode_prefetch import prefetch_rows
from model.kernels.decode_product import soft_capped
from model.kernels.geglu import gelu_parts
from model.kernels.launch import overlapping


@dataclass(frozen=True)
class VectorTiles:
    """How a product is divided: weight rows of a tile, weight columns (a power of two), programs, and the launch.

    prefetch: tiles that a program loads into the L2 cache ahead of those in registers, also before it waits for inputs.
    """

    block_n: int
    block_k: int
    n_programs: int
    n_warps: int = 8
    prefetch: int = 1


@dataclass(frozen=True)
class SandwichNorm:
    """norm(x + norm(u) * w_u) * w_x, or norm(x) * w_x without u. x_out_D gets the sum in x's dtype."""

    x_D: Tensor
    w_x_D: Tensor
    eps: float
    u_D: Tensor | None = None
    w_u_D: Tensor | None = None
    x_out_D: Tensor | None = None


@triton.jit
def _load_tile(row_ptr, is_row, k, n_in, EVEN: tl.constexpr):
    if EVEN:
        tile = tl.load(row_ptr[:, None] + k[None, :], eviction_policy="evict_first")
    else:
        tile = tl.load(
            row_ptr[:, None] + k[None, :],
            mask=is_row[:, None] & (k < n_in)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
    return tile


@triton.jit
def _prefetch_block(
    w_ptr, first, n_out, n_in, row_bytes, linear_offset, GATED: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    n_rows = tl.minimum(n_out - first, BLOCK_N)
    first_ptr = w_ptr + first.to(tl.int64) * n_in
    prefetch_rows(first_ptr, n_rows, row_bytes, row_bytes)
    if GATED:
        prefetch_rows(first_ptr + linear_offset, n_rows, row_bytes, row_bytes)


@triton.jit
def _vector_product_kernel(
    x_ptr, u_ptr, w_u_ptr, w_x_ptr, x_out_ptr, w_ptr, out_ptr, n_out, n_in, n_blocks, eps, cap, row_bytes,
    NORMED: tl.constexpr, HAS_U: tl.constexpr, GATED: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    HELD: tl.constexpr = 1 if CHUNKS == 1 else 0
    program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    is_in = k < n_in
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    linear_offset = n_in.to(tl.int64) * n_out
    row_ptr = w_ptr + n.to(tl.int64) * n_in
    tile = _load_tile(row_ptr, n < n_out, k, n_in, EVEN)
    linear_tile = tile
    if GATED:
        linear_tile = _load_tile(row_ptr + linear_offset, n < n_out, k, n_in, EVEN)
    if NORMED:
        w_x = tl.load(w_x_ptr + k, mask=is_in, other=0.0).to(tl.float32)
        if HAS_U:
            w_u = tl.load(w_u_ptr + k, mask=is_in, other=0.0).to(tl.float32)
    if OVERLAPS:
        for ahead in tl.static_range(AHEAD):
            # of the first rows, later chunks are not in registers yet
            first = (program + (ahead + HELD) * n_programs) * BLOCK_N
            _prefetch_block(w_ptr, first, n_out, n_in, row_bytes, linear_offset, GATED, BLOCK_N)
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + k, mask=is_in, other=0.0)
    if NORMED:
        x = x.to(tl.float32)
        if HAS_U:
            u = tl.load(u_ptr + k, mask=is_in, other=0.0).to(tl.float32)
            rounded = (x + u * rms_scale(u, n_in, eps) * w_u).to(x_out_ptr.dtype.element_ty)
            if program == 0:
                tl.store(x_out_ptr + k, rounded, mask=is_in)
            x = rounded.to(tl.float32)
        x = (x * rms_scale(x, n_in, eps) * w_x).to(x_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK_N], tl.float32)
    linear_total = tl.zeros([BLOCK_N], tl.float32)
    n_steps = (n_blocks - program + n_programs - 1) // n_programs * CHUNKS
    for step in range(n_steps):
        next_step = step + 1
        next_n = (program + next_step // CHUNKS * n_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
        next_k = next_step % CHUNKS * BLOCK_K + k
        next_ptr = w_ptr + next_n.to(tl.int64) * n_in
        is_next = next_n < n_out  # false after the program's last tile
        next_tile = _load_tile(next_ptr, is_next, next_k, n_in, False)
        next_linear_tile = next_tile
        if GATED:
            next_linear_tile = _load_tile(next_ptr + linear_offset, is_next, next_k, n_in, False)
        if AHEAD > 0:
            first = (program + (step // CHUNKS + AHEAD + HELD) * n_programs) * BLOCK_N
            if step % CHUNKS == 0:
                _prefetch_block(w_ptr, first, n_out, n_in, row_bytes, linear_offset, GATED, BLOCK_N)
        next_x = x
        if CHUNKS > 1:
            next_x = tl.load(x_ptr + next_k, mask=next_k < n_in, other=0.0)
        total += tl.sum(tile.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        if GATED:
            linear_total += tl.sum(linear_tile.to(tl.float32) * x.to(tl.float32)[None, :], 1)
        if next_step % CHUNKS == 0:
            n = (program + step // CHUNKS * n_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
            if GATED:
                gelu, _ = gelu_parts(total)
                out = gelu * linear_total
            else:
                out = soft_capped(total, cap)
            tl.store(out_ptr + n, out.to(out_ptr.dtype.element_ty), mask=n < n_out)
            total = tl.zeros([BLOCK_N], tl.float32)
            linear_total = tl.zeros([BLOCK_N], tl.float32)
        x = next_x
        tile = next_tile
        linear_tile = next_linear_tile


def vector_product(
    x_K: Tensor | SandwichNorm, w_NK: Tensor, out_N: Tensor, tiles: VectorTiles, gated: bool = False, cap: float = 0.0
) -> None:
    """Write the product of one row, or of the norm of one, with a weight matrix.

    gated: w_NK holds the rows of the gate, then as many of the linear branch, and the output is gelu(gate) * linear.
    cap: the softcap of the output, 0 for none. A row to be normed must fit in tiles.block_k.
    """
    norm = x_K if isinstance(x_K, SandwichNorm) else None
    x_K = x_K.x_D if isinstance(x_K, SandwichNorm) else x_K
    n_out, n_in = len(w_NK) // (2 if gated else 1), w_NK.shape[1]
    assert x_K.shape == (n_in,) and out_N.shape == (n_out,) and w_NK.is_contiguous()
    chunks = triton.cdiv(n_in, tiles.block_k)
    assert norm is None or chunks == 1
    n_blocks = triton.cdiv(n_out, tiles.block_n)
    launch = overlapping(w_NK.device)
    row_bytes = n_in * w_NK.element_size()
    prefetches = launch["OVERLAPS"] and row_bytes % 16 == 0 and w_NK.data_ptr() % 16 == 0
    _vector_product_kernel[(min(tiles.n_programs, n_blocks),)](
        x_K, norm and norm.u_D, norm and norm.w_u_D, norm and norm.w_x_D, norm and norm.x_out_D, w_NK, out_N,
        n_out, n_in, n_blocks, norm.eps if norm else 0.0, cap, row_bytes,
        NORMED=norm is not None, HAS_U=norm is not None and norm.u_D is not None, GATED=gated, CHUNKS=chunks,
        EVEN=n_in % tiles.block_k == 0 and n_out % tiles.block_n == 0, AHEAD=tiles.prefetch if prefetches else 0,
        BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, num_warps=tiles.n_warps, num_stages=1,
        **launch,
    )  # fmt: skip
