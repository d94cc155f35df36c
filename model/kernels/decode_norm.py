"""Embedding lookup and sandwich norms of a decoding step: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.launch import overlapping


@triton.jit
def load_sum(parts_ptr, offset, mask, part_size, SPLITS: tl.constexpr):
    """Sum of a product's split-K parts in their order, float32."""
    total = tl.load(parts_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * part_size + offset, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def rms_scale(x, width, eps):
    """1 / rms(x) of a row padded with zeros."""
    return tl.rsqrt(tl.sum(x * x) / width + eps)


@triton.jit
def _embed_kernel(
    tokens_ptr, lengths_ptr, embed_ptr, w_ptr, x_ptr, y_ptr, scale, width, eps, HAS_Y: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    if OVERLAPS:
        # in this order: kernels behind read plans before they wait, so the plans must be written when they start
        gdc_wait()
        gdc_launch_dependents()
    is_used = tl.load(lengths_ptr + row) > 0
    token = tl.load(tokens_ptr + row, mask=is_used, other=0).to(tl.int64)
    is_read = column < tl.where(is_used, width, 0)
    x = tl.load(embed_ptr + token * width + column, mask=is_read, other=0.0).to(tl.float32) * scale
    x = x.to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row * width + column, x, mask=inside)
    if HAS_Y:
        x = x.to(tl.float32)
        y = x * rms_scale(x, width, eps) * tl.load(w_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_kernel(
    x_ptr, parts_ptr, w_u_ptr, w_y_ptr, y_ptr, part_size, width, eps,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    w_u = tl.load(w_u_ptr + column, mask=inside, other=0.0).to(tl.float32)
    w_y = tl.load(w_y_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    u = load_sum(parts_ptr, row * width + column, inside, part_size, SPLITS)
    x = (x + u * rms_scale(u, width, eps) * w_u).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + row * width + column, x, mask=inside)
    x = x.to(tl.float32)
    tl.store(y_ptr + row * width + column, (x * rms_scale(x, width, eps) * w_y).to(y_ptr.dtype.element_ty), mask=inside)


def embed(
    tokens_B: Tensor, lengths_B: Tensor, embed_VD: Tensor, scale: float, x_BD: Tensor, w_D: Tensor | None = None,
    y_BD: Tensor | None = None, eps: float = 0.0,
) -> None:  # fmt: skip
    """x = embedding * scale, zero where the length is 0 (that token is not read), and y = norm(x) * w if given."""
    rows, width = x_BD.shape
    _embed_kernel[(rows,)](
        tokens_B, lengths_B, embed_VD, w_D, x_BD, y_BD, scale, width, eps, HAS_Y=y_BD is not None,
        BLOCK=triton.next_power_of_2(width), num_warps=_n_warps(width), **overlapping(x_BD.device),
    )  # fmt: skip


def add_norm_of_parts(x_BD: Tensor, parts_SBD: Tensor, w_u_D: Tensor, w_y_D: Tensor, y_BD: Tensor, eps: float) -> None:
    """In place: x += norm(u) * w_u, where u is the sum of the S parts of a product, and y = norm(x) * w_y."""
    rows, width = x_BD.shape
    assert parts_SBD.shape[1:] == x_BD.shape and parts_SBD.is_contiguous()
    _add_norm_kernel[(rows,)](
        x_BD, parts_SBD, w_u_D, w_y_D, y_BD, rows * width, width, eps,
        SPLITS=len(parts_SBD), BLOCK=triton.next_power_of_2(width), num_warps=_n_warps(width),
        **overlapping(x_BD.device),
    )  # fmt: skip


def _n_warps(width: int) -> int:
    return min(max(triton.next_power_of_2(width) // 256, 1), 16)
