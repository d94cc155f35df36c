"""GeGLU (tanh form) and its gradient, one kernel each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from model.kernels.launch import overlapping

_BLOCK = 1024


@triton.jit
def gelu_parts(gate):
    """gelu(gate) in its tanh form (arXiv 1606.08415), and its derivative."""
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    t = 1 - 2 / (1 + tl.exp(2 * inner))  # tanh, to 1e-7
    value = 0.5 * gate * (1 + t)
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * gate * gate)
    return value, slope


@triton.jit
def _geglu_kernel(gate_in_ptr, out_ptr, d_ff, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_ff
    gate = tl.load(gate_in_ptr + row * 2 * d_ff + columns, mask=inside, other=0.0).to(tl.float32)
    linear = tl.load(gate_in_ptr + (row * 2 + 1) * d_ff + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = gelu_parts(gate)
    tl.store(out_ptr + row * d_ff + columns, (value * linear).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _geglu_backward_kernel(
    gate_in_ptr, grad_ptr, out_ptr, d_ff, INTERLEAVED: tl.constexpr, REMAKES_PRODUCT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d_ff
    gate_in_ptr += row * 2 * d_ff
    if INTERLEAVED:
        pairs_C2 = 2 * columns[:, None] + tl.arange(0, 2)[None, :]
        gate, linear = tl.split(tl.load(gate_in_ptr + pairs_C2, mask=inside[:, None], other=0.0).to(tl.float32))
    else:
        gate = tl.load(gate_in_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        linear = tl.load(gate_in_ptr + d_ff + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * d_ff + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = gelu_parts(gate)
    dtype = grad_ptr.dtype.element_ty
    out_ptr += row * 2 * d_ff
    tl.store(out_ptr + columns, (grad * linear * slope).to(dtype), mask=inside)
    tl.store(out_ptr + d_ff + columns, (grad * value).to(dtype), mask=inside)
    if REMAKES_PRODUCT:
        tl.store(grad_ptr + row * d_ff + columns, (value * linear).to(dtype), mask=inside)


def geglu(gate_in_TX: Tensor, product_TF: Tensor | None = None) -> Tensor:
    """product_TF = gelu(gate) * linear. gate_in_TX: F columns of the gate, then F of the linear branch."""
    n_tokens, d_ff = len(gate_in_TX), gate_in_TX.shape[1] // 2
    product_TF = gate_in_TX.new_empty(n_tokens, d_ff) if product_TF is None else product_TF
    if n_tokens:
        _geglu_kernel[(n_tokens, triton.cdiv(d_ff, _BLOCK))](
            gate_in_TX, product_TF, d_ff, BLOCK=_BLOCK, num_warps=4, **overlapping(gate_in_TX.device)
        )
    return product_TF


def geglu_backward(gate_in_TX: Tensor, grad_TF: Tensor, interleaved: bool, remakes_product: bool) -> Tensor:
    """Gradient of gate_in_TX (the gate's columns first) from grad_TF, the gradient of the product.

    interleaved: gate_in_TX has alternating columns; otherwise the gradient overwrites it. remakes_product: overwrite
    grad_TF with the recomputed product.
    """
    n_tokens, d_ff = grad_TF.shape
    gradient_TX = torch.empty_like(gate_in_TX) if interleaved else gate_in_TX
    block = _BLOCK // 2 if interleaved else _BLOCK  # 16-byte loads
    if n_tokens:
        _geglu_backward_kernel[(n_tokens, triton.cdiv(d_ff, block))](
            gate_in_TX, grad_TF, gradient_TX, d_ff,
            INTERLEAVED=interleaved, REMAKES_PRODUCT=remakes_product, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return gradient_TX
