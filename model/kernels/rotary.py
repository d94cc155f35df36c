"""Norm, weight and rotation of queries and keys, and the weightless norm of values, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import n_summing_programs

_TOKENS = 16
_PROGRAMS_A_PROCESSOR, _STAGES = 4, 3  # backward: fastest on an H100 of 4 to 16 programs and 1 to 3 stages


@triton.jit
def _load_halves(pointer, offset_T1, columns_1C, inside_TC, half):
    first = tl.load(pointer + offset_T1 + columns_1C, mask=inside_TC, other=0.0).to(tl.float32)
    second = tl.load(pointer + offset_T1 + half + columns_1C, mask=inside_TC, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(pointer, offset_T1, columns_1C, inside_TC, half, first, second):
    tl.store(pointer + offset_T1 + columns_1C, first.to(pointer.dtype.element_ty), mask=inside_TC)
    tl.store(pointer + offset_T1 + half + columns_1C, second.to(pointer.dtype.element_ty), mask=inside_TC)


@triton.jit
def _load_weight(pointer, columns_1C, half):
    first = tl.load(pointer + columns_1C, mask=columns_1C < half, other=0.0).to(tl.float32)
    second = tl.load(pointer + half + columns_1C, mask=columns_1C < half, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _load_normed(pointer, offset_T1, columns_1C, inside_TC, half, eps):
    """Halves of a head divided by its RMS, and the factor 1 / RMS."""
    first, second = _load_halves(pointer, offset_T1, columns_1C, inside_TC, half)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps)[:, None]
    return first * scale, second * scale, scale


@triton.jit
def _rotary_heads(
    in_ptr, out_ptr, weight_ptr, cos, sin, tokens_T1, columns_1C, inside_TC, first_head, n_heads, n_all, half, eps,
    ROTATES: tl.constexpr,
):  # fmt: skip
    if ROTATES:
        w_first, w_second = _load_weight(weight_ptr, columns_1C, half)
    for head in range(n_heads):
        source = (tokens_T1 * n_all + first_head + head) * (2 * half)
        first, second, _ = _load_normed(in_ptr, source, columns_1C, inside_TC, half, eps)
        if ROTATES:
            first, second = first * w_first, second * w_second
            first, second = first * cos - second * sin, second * cos + first * sin
        target = (tokens_T1 * n_heads + head) * (2 * half)
        _store_halves(out_ptr, target, columns_1C, inside_TC, half, first, second)


@triton.jit
def _rotary_kernel(
    x_ptr, w_q_ptr, w_k_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, n_tokens, n_q, n_kv, half, eps,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens_T1 = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    columns_1C = tl.arange(0, BLOCK)[None, :]
    inside = (tokens_T1 < n_tokens) & (columns_1C < half)
    cos = tl.load(cos_ptr + tokens_T1 * half + columns_1C, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + tokens_T1 * half + columns_1C, mask=inside, other=0.0)
    n_all = n_q + 2 * n_kv
    _rotary_heads(x_ptr, q_ptr, w_q_ptr, cos, sin, tokens_T1, columns_1C, inside, 0, n_q, n_all, half, eps, True)
    _rotary_heads(x_ptr, k_ptr, w_k_ptr, cos, sin, tokens_T1, columns_1C, inside, n_q, n_kv, n_all, half, eps, True)
    _rotary_heads(
        x_ptr, v_ptr, w_k_ptr, cos, sin, tokens_T1, columns_1C, inside, n_q + n_kv, n_kv, n_all, half, eps, False
    )


@triton.jit
def _rotary_heads_backward(
    in_ptr, grad_ptr, out_ptr, weight_ptr, cos, sin, tokens_T1, columns_1C, inside_TC, sum_first, sum_second,
    first_head, n_heads, n_all, half, eps, ROTATES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if ROTATES:
        w_first, w_second = _load_weight(weight_ptr, columns_1C, half)
    for head in tl.range(0, n_heads, num_stages=STAGES):
        source = (tokens_T1 * n_all + first_head + head) * (2 * half)
        first, second, scale = _load_normed(in_ptr, source, columns_1C, inside_TC, half, eps)
        grad = (tokens_T1 * n_heads + head) * (2 * half)
        grad_first, grad_second = _load_halves(grad_ptr, grad, columns_1C, inside_TC, half)
        if ROTATES:
            grad_first, grad_second = grad_first * cos + grad_second * sin, grad_second * cos - grad_first * sin
            sum_first += grad_first * first
            sum_second += grad_second * second
            grad_first, grad_second = grad_first * w_first, grad_second * w_second
        mean = ((tl.sum(grad_first * first, 1) + tl.sum(grad_second * second, 1)) / (2 * half))[:, None]
        grad_first, grad_second = scale * (grad_first - first * mean), scale * (grad_second - second * mean)
        _store_halves(out_ptr, source, columns_1C, inside_TC, half, grad_first, grad_second)
    return sum_first, sum_second


@triton.jit
def _rotary_backward_kernel(
    x_ptr, w_q_ptr, w_k_ptr, cos_ptr, sin_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_x_ptr, grad_w_ptr,
    n_tokens, n_q, n_kv, half, eps, TOKENS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    columns_1C = tl.arange(0, BLOCK)[None, :]
    n_all = n_q + 2 * n_kv
    q_first = tl.zeros([TOKENS, BLOCK], tl.float32)
    q_second = tl.zeros([TOKENS, BLOCK], tl.float32)
    k_first = tl.zeros([TOKENS, BLOCK], tl.float32)
    k_second = tl.zeros([TOKENS, BLOCK], tl.float32)
    program = tl.program_id(0)
    for block in range(program, tl.cdiv(n_tokens, TOKENS), tl.num_programs(0)):
        tokens_T1 = (block * TOKENS + tl.arange(0, TOKENS).to(tl.int64))[:, None]
        inside = (tokens_T1 < n_tokens) & (columns_1C < half)
        cos = tl.load(cos_ptr + tokens_T1 * half + columns_1C, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + tokens_T1 * half + columns_1C, mask=inside, other=0.0)
        q_first, q_second = _rotary_heads_backward(
            x_ptr, grad_q_ptr, grad_x_ptr, w_q_ptr, cos, sin, tokens_T1, columns_1C, inside, q_first, q_second,
            0, n_q, n_all, half, eps, True, STAGES,
        )  # fmt: skip
        k_first, k_second = _rotary_heads_backward(
            x_ptr, grad_k_ptr, grad_x_ptr, w_k_ptr, cos, sin, tokens_T1, columns_1C, inside, k_first, k_second,
            n_q, n_kv, n_all, half, eps, True, STAGES,
        )  # fmt: skip
        _rotary_heads_backward(
            x_ptr, grad_v_ptr, grad_x_ptr, w_k_ptr, cos, sin, tokens_T1, columns_1C, inside, k_first, k_second,
            n_q + n_kv, n_kv, n_all, half, eps, False, STAGES,
        )  # fmt: skip
    sums_ptr = grad_w_ptr + program * (4 * half) + tl.arange(0, BLOCK)
    kept = tl.arange(0, BLOCK) < half
    tl.store(sums_ptr, tl.sum(q_first, 0), mask=kept)
    tl.store(sums_ptr + half, tl.sum(q_second, 0), mask=kept)
    tl.store(sums_ptr + 2 * half, tl.sum(k_first, 0), mask=kept)
    tl.store(sums_ptr + 3 * half, tl.sum(k_second, 0), mask=kept)


def normed_heads(
    x_TX: Tensor, w_q_K: Tensor, w_k_K: Tensor | None, cos_TC: Tensor, sin_TC: Tensor, n_heads: int, n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(q_THK, k_TGK, v_TGK) from x_TX, which has H heads of q, G of k and G of v side by side.

    q and k are RMS-normed, weighted and rotated (halves paired); v is RMS-normed. C is K / 2. `n_kv_heads` is 0 and w_k
    None for a layer that reads another layer's keys and values.
    """
    n_tokens, d_head = len(x_TX), 2 * cos_TC.shape[1]
    q_THK = x_TX.new_empty(n_tokens, n_heads, d_head)
    k_TGK, v_TGK = (x_TX.new_empty(n_tokens, n_kv_heads, d_head) for _ in range(2))
    if n_tokens:
        _rotary_kernel[(triton.cdiv(n_tokens, _TOKENS),)](
            x_TX, w_q_K, w_q_K if w_k_K is None else w_k_K, cos_TC, sin_TC, q_THK, k_TGK, v_TGK,
            n_tokens, n_heads, n_kv_heads, d_head // 2, eps,
            TOKENS=_TOKENS, BLOCK=triton.next_power_of_2(d_head // 2), num_warps=4,
        )  # fmt: skip
    return q_THK, k_TGK, v_TGK


def normed_heads_backward(
    x_TX: Tensor, w_q_K: Tensor, w_k_K: Tensor | None, cos_TC: Tensor, sin_TC: Tensor, grad_q_THK: Tensor,
    grad_k_TGK: Tensor | None, grad_v_TGK: Tensor | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x_TX, w_q_K and, if there are keys, w_k_K, from those of q, k and v.

    Weight gradients are float32 partial sums, one row for each of the kernel's P programs.
    """
    n_tokens, n_heads, d_head = grad_q_THK.shape
    n_kv_heads = 0 if grad_k_TGK is None else grad_k_TGK.shape[1]
    n_programs = n_summing_programs(triton.cdiv(n_tokens, _TOKENS), _PROGRAMS_A_PROCESSOR, x_TX.device)
    x_gradient_TX = torch.empty_like(x_TX)
    partial_P2K = x_TX.new_empty(n_programs, 2, d_head, dtype=torch.float32)
    if n_tokens:
        _rotary_backward_kernel[(n_programs,)](
            x_TX, w_q_K, w_q_K if w_k_K is None else w_k_K, cos_TC, sin_TC,
            grad_q_THK, grad_q_THK if grad_k_TGK is None else grad_k_TGK,
            grad_q_THK if grad_v_TGK is None else grad_v_TGK, x_gradient_TX, partial_P2K,
            n_tokens, n_heads, n_kv_heads, d_head // 2, eps,
            TOKENS=_TOKENS, BLOCK=triton.next_power_of_2(d_head // 2), STAGES=_STAGES, num_warps=4,
        )  # fmt: skip
    sums_PK = partial_P2K.unbind(1)
    return x_gradient_TX, *sums_PK[: 1 if w_k_K is None else 2]
