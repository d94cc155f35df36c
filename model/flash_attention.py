"""flash-attn-4 as an operator that torch.compile can put into a graph: its own autograd function breaks one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _window(window: int) -> dict[str, int | None]:
    """flash-attn-4's names for a window that counts the token itself; 0 is none."""
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


@torch.library.custom_op("dramatis::flash_attention_4", mutates_args=(), device_types="cuda")
def flash_attention_4(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, boundaries: Tensor, max_length: int, window: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of packed documents (scale 1, window 0: none). Returns (out_THK, log-normaliser_HT)."""
    from flash_attn.cute.interface import _flash_attn_fwd

    out_THK, normalizer_HT, *_ = _flash_attn_fwd(
        q_THK.contiguous(),
        k_TGK.contiguous(),
        v_TGK.contiguous(),
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        softmax_scale=1.0,
        causal=True,
        return_lse=True,
        **_window(window),
    )
    return out_THK, normalizer_HT


@torch.library.custom_op("dramatis::flash_attention_4_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, normalizer_HT: Tensor,
    boundaries: Tensor, max_length: int, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd

    gradients = _flash_attn_bwd(
        q_THK.contiguous(),
        k_TGK.contiguous(),
        v_TGK.contiguous(),
        out_THK,
        grad_THK.contiguous(),
        normalizer_HT,
        softmax_scale=1.0,
        causal=True,
        cu_seqlens_q=boundaries,
        cu_seqlens_k=boundaries,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        **_window(window),
    )
    q_gradient_THK, k_gradient_TGK, v_gradient_TGK = gradients[:3]
    return q_gradient_THK, k_gradient_TGK, v_gradient_TGK


@flash_attention_4.register_fake
def _(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, boundaries: Tensor, max_length: int, window: int) -> Any:
    n_tokens, n_heads, _ = q_THK.shape
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty((n_heads, n_tokens), dtype=torch.float32)


@_backward.register_fake
def _(grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *rest: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_length, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grad_THK: Tensor, grad_of_normalizer: Tensor) -> tuple[Any, ...]:
    q_THK, k_TGK, v_TGK, boundaries, out_THK, normalizer_HT = ctx.saved_tensors
    gradients = _backward(grad_THK, q_THK, k_TGK, v_TGK, out_THK, normalizer_HT, boundaries, ctx.max_length, ctx.window)
    return (*gradients, None, None, None)


flash_attention_4.register_autograd(_differentiate, setup_context=_save)
