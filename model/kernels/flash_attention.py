"""flash-attn-4 on packed documents: the forward and backward kernels, and a differentiable function of both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def flash_forward(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, boundaries: Tensor, max_length: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention (scale 1). Returns out_THK and the logsumexp of every query, normalizer_HT."""
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
        # packing heads is 4% slower on an H100 (16 query heads per key/value head, 4096 tokens)
        pack_gqa=False,
        **_window(window),
    )
    return out_THK, normalizer_HT


def flash_backward(
    grad_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, out_THK: Tensor, normalizer_HT: Tensor,
    boundaries: Tensor, max_length: int, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from that of `flash_forward`'s output."""
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


class FlashAttention(torch.autograd.Function):
    """(q_THK, k_TGK, v_TGK, boundaries, max_length, window) -> out_THK."""

    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, boundaries: Tensor, max_length: int, window: int | None
    ) -> Tensor:
        out_THK, normalizer_HT = flash_forward(q_THK, k_TGK, v_TGK, boundaries, max_length, window)
        ctx.save_for_backward(q_THK, k_TGK, v_TGK, out_THK, normalizer_HT, boundaries)
        ctx.max_length, ctx.window = max_length, window
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Any, ...]:
        q_THK, k_TGK, v_TGK, out_THK, normalizer_HT, boundaries = ctx.saved_tensors
        gradients = flash_backward(
            grad_THK, q_THK, k_TGK, v_TGK, out_THK, normalizer_HT, boundaries, ctx.max_length, ctx.window
        )
        return (*gradients, None, None, None)


def _window(window: int | None) -> dict[str, int]:
    """flash-attn-4's arguments for a window that includes the token itself."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
