"""RMS norms around a residual addition in one kernel: out = x + norm(u) * w_u, y = norm(out) * w_y.

Without `u` it is only the second norm, without `w_y` only the addition. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import n_summing_programs

_PROGRAMS_A_PROCESSOR, _STAGES = 4, 3  # fastest on an H100 at width 2048 of 2 to 16 programs and 1 to 4 stages
_WIDEST_AHEAD = 4096  # wider rows do not fit in shared memory when prefetched


@triton.jit
def _load(pointer, row, columns, width):
    return tl.load(pointer + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def _add_norm_kernel(
    x_ptr, u_ptr, w_u_ptr, w_y_ptr, out_ptr, y_ptr, u_scale_ptr, out_scale_ptr, width, eps,
    HAS_U: tl.constexpr, HAS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = _load(x_ptr, row, columns, width)
    if HAS_U:
        u = _load(u_ptr, row, columns, width)
        u_scale = tl.rsqrt(tl.sum(u * u) / width + eps)
        tl.store(u_scale_ptr + row, u_scale)
        u = u * u_scale
        rounded = (x + u * _load(w_u_ptr, 0, columns, width)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * width + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if HAS_Y:
        out_scale = tl.rsqrt(tl.sum(x * x) / width + eps)
        tl.store(out_scale_ptr + row, out_scale)
        y = x * out_scale * _load(w_y_ptr, 0, columns, width)
        tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_norm_backward_kernel(
    x_ptr, u_ptr, w_u_ptr, w_y_ptr, u_scale_ptr, out_scale_ptr, grad_out_ptr, grad_y_ptr,
    grad_x_ptr, grad_u_ptr, y_ptr, grad_w_u_ptr, grad_w_y_ptr, n_rows, width,
    HAS_U: tl.constexpr, HAS_Y: tl.constexpr, REMAKES_Y: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    program = tl.program_id(0)
    grad_w_u = tl.zeros([BLOCK], tl.float32)
    grad_w_y = tl.zeros([BLOCK], tl.float32)
    if HAS_U:
        w_u = _load(w_u_ptr, 0, columns, width)
    if HAS_Y:
        w_y = _load(w_y_ptr, 0, columns, width)
    for row_number in tl.range(program, n_rows, tl.num_programs(0), num_stages=STAGES):
        row = row_number + tl.full([], 0, tl.int64)  # offsets may exceed 32 bits
        grad = _load(grad_out_ptr, row, columns, width)
        if HAS_U:
            u_scale = tl.load(u_scale_ptr + row)
            u = _load(u_ptr, row, columns, width) * u_scale
        if HAS_Y:
            x = _load(x_ptr, row, columns, width)
            if HAS_U:  # the sum as the forward pass rounded it
                x = (x + u * w_u).to(x_ptr.dtype.element_ty).to(tl.float32)
            out_scale = tl.load(out_scale_ptr + row)
            x = x * out_scale
            if REMAKES_Y:
                tl.store(y_ptr + row * width + columns, (x * w_y).to(y_ptr.dtype.element_ty), mask=inside)
            grad_y = _load(grad_y_ptr, row, columns, width)
            grad_w_y += grad_y * x
            grad_y = grad_y * w_y
            grad += out_scale * (grad_y - x * (tl.sum(grad_y * x) / width))
            tl.store(grad_x_ptr + row * width + columns, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_U:
            grad_w_u += grad * u
            grad_u = grad * w_u
            grad_u = u_scale * (grad_u - u * (tl.sum(grad_u * u) / width))
            tl.store(grad_u_ptr + row * width + columns, grad_u.to(grad_u_ptr.dtype.element_ty), mask=inside)
    if HAS_U:
        tl.store(grad_w_u_ptr + program * width + columns, grad_w_u, mask=inside)
    if HAS_Y:
        tl.store(grad_w_y_ptr + program * width + columns, grad_w_y, mask=inside)


@dataclass(frozen=True)
class Scales:
    """1 / rms of every row of `u` and of `out`, float32, for the backward pass; None if not computed."""

    u_T: Tensor | None
    out_T: Tensor | None


@dataclass(frozen=True)
class AddNormGradients:
    """Gradients of `add_norm` (weights': partial sums of the kernel's P programs), and y if recomputed.

    x_TD is None without y: the gradient of x is then that of out.
    """

    x_TD: Tensor | None
    u_TD: Tensor | None
    w_u_PD: Tensor | None
    w_y_PD: Tensor | None
    y_TD: Tensor | None


def add_norm(
    x_TD: Tensor, u_TD: Tensor | None, w_u_D: Tensor | None, w_y_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Scales]:
    """(out_TD, y_TD, scales): x + norm(u) * w_u (x itself without u), and norm(out) * w_y (None without w_y)."""
    n_rows, width = x_TD.shape
    block, n_warps = _launch(width)
    has_u, has_y = u_TD is not None, w_y_D is not None
    out_TD = torch.empty_like(x_TD) if has_u else x_TD
    y_TD = torch.empty_like(x_TD) if has_y else None
    scales = Scales(*(x_TD.new_empty(n_rows, dtype=torch.float32) if has else None for has in (has_u, has_y)))
    if n_rows:
        _add_norm_kernel[(n_rows,)](
            x_TD, u_TD, w_u_D, w_y_D, out_TD, y_TD, scales.u_T, scales.out_T, width, eps,
            HAS_U=has_u, HAS_Y=has_y, BLOCK=block, num_warps=n_warps,
        )  # fmt: skip
    return out_TD, y_TD, scales


def add_norm_backward(
    grad_out_TD: Tensor, grad_y_TD: Tensor | None, x_TD: Tensor | None, u_TD: Tensor | None, w_u_D: Tensor | None,
    w_y_D: Tensor | None, scales: Scales, remakes_y: bool = False,
) -> AddNormGradients:  # fmt: skip
    """From the gradients of out and y, and the inputs of `add_norm`; x is needed only with y.

    remakes_y: also return y, at the cost of one write.
    """
    n_rows, width = grad_out_TD.shape
    block, n_warps = _launch(width)
    stages = _STAGES if block <= _WIDEST_AHEAD else 1
    n_programs = n_summing_programs(n_rows, _PROGRAMS_A_PROCESSOR, grad_out_TD.device)
    has_u, has_y = u_TD is not None, w_y_D is not None
    assert has_y or not remakes_y
    x_gradient_TD, u_gradient_TD, y_TD = (
        torch.empty_like(grad_out_TD) if has else None for has in (has_y, has_u, remakes_y)
    )
    w_u_PD, w_y_PD = (
        grad_out_TD.new_empty(n_programs, width, dtype=torch.float32) if has else None for has in (has_u, has_y)
    )
    if n_rows:
        _add_norm_backward_kernel[(n_programs,)](
            x_TD, u_TD, w_u_D, w_y_D, scales.u_T, scales.out_T, grad_out_TD, grad_y_TD,
            x_gradient_TD, u_gradient_TD, y_TD, w_u_PD, w_y_PD, n_rows, width,
            HAS_U=has_u, HAS_Y=has_y, REMAKES_Y=remakes_y, BLOCK=block, STAGES=stages, num_warps=n_warps,
        )  # fmt: skip
    return AddNormGradients(x_gradient_TD, u_gradient_TD, w_u_PD, w_y_PD, y_TD)


def _launch(width: int) -> tuple[int, int]:
    """(columns of a program: a row, padded to a power of two; warps: sixteen columns per thread)."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)
