"""The feed-forward's products with its gate in them: GeGLU (tanh form) and its gradient without a pass of their own.

As in CUTLASS's epilogue fusion, a tile leaves its product's registers gated, so what lies between the products is
neither written nor read once more. For Hopper and newer (tensor memory accelerator).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.geglu import gelu_parts
from model.kernels.launch import n_processors


@triton.jit
def _place(tile, n_t, n_f, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows at a time, so that programs at work together read the same weights."""
    in_group = GROUP * n_f
    first = tile // in_group * GROUP
    height = min(n_t - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _gated_product_kernel(
    x_desc, w_gate_desc, w_in_desc, gate_desc, linear_desc, product_desc, n_tokens, d_ff, d_model,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    n_t, n_f = tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_ff, BLOCK_F)
    dtype = product_desc.dtype
    for tile in tl.range(tl.program_id(0), n_t * n_f, PROGRAMS, flatten=FLATTEN):
        t, f = _place(tile, n_t, n_f, GROUP)
        t, f = t * BLOCK_T, f * BLOCK_F
        gate = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        linear = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for d in range(0, d_model, BLOCK_D):
            x = x_desc.load([t, d])
            gate = tl.dot(x, w_gate_desc.load([f, d]).T, gate)
            linear = tl.dot(x, w_in_desc.load([f, d]).T, linear)
        gate, linear = gate.to(dtype), linear.to(dtype)
        gate_desc.store([t, f], gate)
        linear_desc.store([t, f], linear)
        value, _ = gelu_parts(gate.to(tl.float32))
        product_desc.store([t, f], (value * linear.to(tl.float32)).to(dtype))


@triton.jit
def _gated_gradient_kernel(
    grad_desc, w_out_desc, gate_desc, linear_desc, product_desc, n_tokens, d_ff, d_model,
    REMAKES_PRODUCT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    n_t, n_f = tl.cdiv(n_tokens, BLOCK_T), tl.cdiv(d_ff, BLOCK_F)
    dtype = gate_desc.dtype
    for tile in tl.range(tl.program_id(0), n_t * n_f, PROGRAMS, flatten=FLATTEN):
        t, f = _place(tile, n_t, n_f, GROUP)
        t, f = t * BLOCK_T, f * BLOCK_F
        grad = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
        for d in range(0, d_model, BLOCK_D):
            grad = tl.dot(grad_desc.load([t, d]), w_out_desc.load([d, f]), grad)
        gate = gate_desc.load([t, f]).to(tl.float32)
        linear = linear_desc.load([t, f]).to(tl.float32)
        value, slope = gelu_parts(gate)
        gate_desc.store([t, f], (grad * linear * slope).to(dtype))
        linear_desc.store([t, f], (grad * value).to(dtype))
        if REMAKES_PRODUCT:
            product_desc.store([t, f], (value * linear).to(dtype))


def gated_product(x_TD: Tensor, w_gate_FD: Tensor, w_in_FD: Tensor) -> tuple[Tensor, Tensor]:
    """gate_in_TX = x [w_gate; w_in]^T, and product_TF = gelu(its gate's F columns) * its linear branch's."""
    n_tokens, d_model = x_TD.shape
    d_ff = len(w_gate_FD)
    gate_in_TX, product_TF = x_TD.new_empty(n_tokens, 2 * d_ff), x_TD.new_empty(n_tokens, d_ff)
    tile = {"BLOCK_T": 128, "BLOCK_F": 128, "BLOCK_D": 64}
    out = [tile["BLOCK_T"], tile["BLOCK_F"]]
    weight = [tile["BLOCK_F"], tile["BLOCK_D"]]
    programs = n_processors(x_TD.device)
    _gated_product_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_TD, [tile["BLOCK_T"], tile["BLOCK_D"]]),
        TensorDescriptor.from_tensor(w_gate_FD, weight),
        TensorDescriptor.from_tensor(w_in_FD, weight),
        TensorDescriptor.from_tensor(gate_in_TX[:, :d_ff], out),
        TensorDescriptor.from_tensor(gate_in_TX[:, d_ff:], out),
        TensorDescriptor.from_tensor(product_TF, out),
        n_tokens, d_ff, d_model, **tile, GROUP=8, PROGRAMS=programs, FLATTEN=True, num_warps=8, num_stages=3,
    )  # fmt: skip
    return gate_in_TX, product_TF
