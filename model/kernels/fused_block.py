"""The transformer block as one autograd.Function with a hand-written backward.

Autograd would save every intermediate and launch a kernel for each operation. Here the operations between two matrix
products are one kernel (model/kernels), weight gradients accumulate into the engine's float32 `main_grad` inside the
product, and cheap intermediates can be recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.attention_ops import AttentionBackward, AttentionOp, Documents, attend_with_backward
from model.kernels.add_rows import add_rows
from model.kernels.gated_product import gated_product
from model.kernels.geglu import geglu_backward
from model.kernels.matrix_product import stacked, weight_gradients
from model.kernels.norm import Scales, add_norm, add_norm_backward
from model.kernels.rotary import normed_heads, normed_heads_backward

if TYPE_CHECKING:
    from model.attention import KeyValue, Rope
    from model.transformer import Block


@dataclass
class _Weights:
    """A block's parameters. Layers without a KV cache have no w_k, w_v and k_norm."""

    attention_norm_in: Tensor
    w_q: Tensor
    w_k: Tensor | None
    w_v: Tensor | None
    q_norm: Tensor
    k_norm: Tensor | None
    w_o: Tensor
    attention_norm_out: Tensor
    ff_norm_in: Tensor
    w_gate: Tensor
    w_in: Tensor
    w_out: Tensor
    ff_norm_out: Tensor

    @property
    def heads(self) -> list[Tensor]:
        """Projections to queries and, if present, keys and values."""
        return [weight for weight in (self.w_q, self.w_k, self.w_v) if weight is not None]


_NAMES = [field.name for field in fields(_Weights)]
_Gradients = dict[str, "Tensor | None"]
"""Weight gradients by name; None if added to `main_grad`."""


@dataclass(frozen=True)
class _Form:
    """Settings of a block. n_kv_heads is 0 if it reads another layer's keys and values."""

    n_heads: int
    n_kv_heads: int
    window: int | None
    eps: float
    attend: AttentionOp
    documents: Documents
    recompute: str

    @property
    def owns_cache(self) -> bool:
        """Whether the block computes keys and values instead of reading another layer's."""
        return self.n_kv_heads > 0


@dataclass
class _Kept:
    """Tensors saved for the backward pass; None is recomputed."""

    attention_normed_TD: Tensor | None
    start_scales: Scales
    heads_TX: Tensor
    q_THK: Tensor | None
    attended_TX: Tensor
    attention_backward: AttentionBackward
    attention_out_TD: Tensor
    middle_scales: Scales
    ff_normed_TD: Tensor | None
    gate_in_TX: Tensor
    interleaved: bool
    product_TF: Tensor | None
    ff_out_TD: Tensor
    end_scales: Scales


def fused_block(
    block: Block, x_TD: Tensor, rope: Rope, shared: KeyValue | None, documents: Documents, attend: AttentionOp
) -> tuple[Tensor, KeyValue]:
    """The output of `Block`, with fewer kernels. Norms and rotations round once; the plain block rounds three times."""
    attention, feed_forward = block.attention, block.feed_forward
    has_own = attention.owns_cache
    n_kv_heads = attention.n_kv_heads if has_own else 0
    form = _Form(attention.n_heads, n_kv_heads, attention.window, attention.eps, attend, documents, block.recompute)
    weights = _Weights(
        attention_norm_in=block.attention_norm_in.weight,
        w_q=attention.w_q.weight,
        w_k=attention.w_k.weight if has_own else None,
        w_v=attention.w_v.weight if has_own else None,
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight if has_own else None,
        w_o=attention.w_o.weight,
        attention_norm_out=block.attention_norm_out.weight,
        ff_norm_in=block.ff_norm_in.weight,
        w_gate=feed_forward.w_gate.weight,
        w_in=feed_forward.w_in.weight,
        w_out=feed_forward.w_out.weight,
        ff_norm_out=block.ff_norm_out.weight,
    )
    k_TGK, v_TGK = shared or (None, None)
    tensors = (getattr(weights, name) for name in _NAMES)
    out_TD, k_TGK, v_TGK = _FusedBlock.apply(x_TD, k_TGK, v_TGK, *rope, form, *tensors)
    return out_TD, shared or (k_TGK, v_TGK)


class _FusedBlock(torch.autograd.Function):
    """(x_TD, shared k_TGK and v_TGK or None, cos_TC, sin_TC, form, weights) -> (out_TD, k_TGK and v_TGK or None)."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, k_TGK: Tensor | None, v_TGK: Tensor | None, cos_TC: Tensor, sin_TC: Tensor,
        form: _Form, *weights: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        shared = None if k_TGK is None or v_TGK is None else (k_TGK, v_TGK)
        named = _Weights(*weights)  # type: ignore[arg-type]
        out_TD, k_TGK, v_TGK, kept = _run(x_TD, shared, (cos_TC, sin_TC), form, named)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_TD, k_TGK, v_TGK, cos_TC, sin_TC, *weights)
        ctx.form, ctx.kept = form, None if form.recompute == "block" else kept
        return (out_TD, k_TGK, v_TGK) if form.owns_cache else (out_TD, None, None)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_TD: Tensor, k_grad_TGK: Tensor | None, v_grad_TGK: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x_TD, k_TGK, v_TGK, cos_TC, sin_TC, *tensors = ctx.saved_tensors
        form, weights, rope = ctx.form, _Weights(*tensors), (cos_TC, sin_TC)
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            shared = None if form.owns_cache else (k_TGK, v_TGK)
            *_, kept = _run(x_TD, shared, rope, form, weights)
        gradients: _Gradients = {}
        gated_TD, attention_TD = _feed_forward_backward(grad_TD, x_TD, form, weights, kept, gradients)
        out = _attention_backward(
            attention_TD, gated_TD, x_TD, (k_TGK, v_TGK), rope, form, weights, kept, gradients, k_grad_TGK, v_grad_TGK
        )
        return (*out, None, None, None, *(gradients.get(name) for name in _NAMES))


def _run(
    x_TD: Tensor, shared: KeyValue | None, rope: Rope, form: _Form, w: _Weights
) -> tuple[Tensor, Tensor, Tensor, _Kept]:
    """The block's output, the keys and values it read, and the saved tensors."""
    keeps_all = form.recompute == "none"
    _, attention_normed_TD, start_scales = add_norm(x_TD, None, None, w.attention_norm_in, form.eps)
    assert attention_normed_TD is not None
    heads_TX = F.linear(attention_normed_TD, stacked(w.heads))
    q_THK, k_TGK, v_TGK = _normed_heads(heads_TX, rope, form, w)
    if shared is not None:
        k_TGK, v_TGK = shared
    attended_THK, attention_backward = attend_with_backward(
        form.attend, q_THK, k_TGK, v_TGK, form.documents, form.window
    )
    attended_TX = attended_THK.flatten(1)
    attention_out_TD = F.linear(attended_TX, w.w_o)
    x_TD, ff_normed_TD, middle_scales = add_norm(x_TD, attention_out_TD, w.attention_norm_out, w.ff_norm_in, form.eps)
    assert ff_normed_TD is not None
    gate_in_TX, interleaved, product_TF = gated_product(ff_normed_TD, stacked([w.w_gate, w.w_in]))
    ff_out_TD = F.linear(product_TF, w.w_out)
    out_TD, _, end_scales = add_norm(x_TD, ff_out_TD, w.ff_norm_out, None, form.eps)
    kept = _Kept(
        attention_normed_TD=attention_normed_TD if keeps_all else None,
        start_scales=start_scales,
        heads_TX=heads_TX,
        q_THK=q_THK if keeps_all else None,
        attended_TX=attended_TX,
        attention_backward=attention_backward,
        attention_out_TD=attention_out_TD,
        middle_scales=middle_scales,
        ff_normed_TD=ff_normed_TD if keeps_all else None,
        gate_in_TX=gate_in_TX,
        interleaved=interleaved,
        product_TF=product_TF if keeps_all else None,
        ff_out_TD=ff_out_TD,
        end_scales=end_scales,
    )
    return out_TD, k_TGK, v_TGK, kept


def _feed_forward_backward(
    grad_TD: Tensor, x_TD: Tensor, form: _Form, w: _Weights, kept: _Kept, gradients: _Gradients
) -> tuple[Tensor, Tensor]:
    """Gradients of the residual stream after attention and of attention's output; sets weights' in `gradients`."""
    end = add_norm_backward(grad_TD, None, None, kept.ff_out_TD, w.ff_norm_out, None, kept.end_scales)
    assert end.u_TD is not None and end.w_u_PD is not None
    (gradients["ff_norm_out"],) = _vector_gradients([w.ff_norm_out], [end.w_u_PD])
    grad_TF = end.u_TD @ w.w_out
    kept.gate_in_TX = geglu_backward(kept.gate_in_TX, grad_TF, kept.interleaved, kept.product_TF is None)
    product_TF = grad_TF if kept.product_TF is None else kept.product_TF  # recomputed in place of the gradient
    (gradients["w_out"],) = weight_gradients([w.w_out], end.u_TD, product_TF)
    del grad_TF, product_TF, end
    grad_normed_TD = kept.gate_in_TX @ stacked([w.w_gate, w.w_in])
    normed_TD = kept.ff_normed_TD
    middle = add_norm_backward(
        grad_TD, grad_normed_TD, x_TD, kept.attention_out_TD, w.attention_norm_out, w.ff_norm_in, kept.middle_scales,
        remakes_y=normed_TD is None,
    )  # fmt: skip
    normed_TD = middle.y_TD if normed_TD is None else normed_TD
    assert middle.x_TD is not None and middle.u_TD is not None and normed_TD is not None
    assert middle.w_u_PD is not None and middle.w_y_PD is not None
    gradients["attention_norm_out"], gradients["ff_norm_in"] = _vector_gradients(
        [w.attention_norm_out, w.ff_norm_in], [middle.w_u_PD, middle.w_y_PD]
    )
    gradients["w_gate"], gradients["w_in"] = weight_gradients([w.w_gate, w.w_in], kept.gate_in_TX, normed_TD)
    return middle.x_TD, middle.u_TD


def _attention_backward(
    grad_out_TD: Tensor, grad_sum_TD: Tensor, x_TD: Tensor, key_value: KeyValue, rope: Rope, form: _Form, w: _Weights,
    kept: _Kept, gradients: _Gradients, k_grad_TGK: Tensor | None, v_grad_TGK: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and of shared keys and values, from those of attention's output and of the residual stream.

    k_grad_TGK, v_grad_TGK: gradients from other layers that read this layer's keys and values.
    """
    grad_attended_THK = (grad_out_TD @ w.w_o).unflatten(1, (form.n_heads, -1))
    (gradients["w_o"],) = weight_gradients([w.w_o], grad_out_TD, kept.attended_TX)
    q_THK = kept.q_THK if kept.q_THK is not None else _normed_heads(kept.heads_TX, rope, form, w)[0]
    q_grad_THK, *key_value_grads = kept.attention_backward(grad_attended_THK, q_THK, *key_value)
    del grad_attended_THK, q_THK
    if form.owns_cache:
        others = (k_grad_TGK, v_grad_TGK)
        key_value_grads = [ours if more is None else ours + more for ours, more in zip(key_value_grads, others)]
        k_grad_TGK, v_grad_TGK = (grad.contiguous() for grad in key_value_grads)
    heads_grad_TX, *norm_grads_PK = normed_heads_backward(
        kept.heads_TX, w.q_norm, w.k_norm, *rope, q_grad_THK.contiguous(), k_grad_TGK, v_grad_TGK, form.eps
    )
    norms = [weight for weight in (w.q_norm, w.k_norm) if weight is not None]
    gradients.update(zip(("q_norm", "k_norm"), _vector_gradients(norms, norm_grads_PK)))
    normed_TD = kept.attention_normed_TD
    start = add_norm_backward(
        grad_sum_TD, heads_grad_TX @ stacked(w.heads), x_TD, None, None, w.attention_norm_in, kept.start_scales,
        remakes_y=normed_TD is None,
    )  # fmt: skip
    normed_TD = start.y_TD if normed_TD is None else normed_TD
    assert start.x_TD is not None and start.w_y_PD is not None and normed_TD is not None
    (gradients["attention_norm_in"],) = _vector_gradients([w.attention_norm_in], [start.w_y_PD])
    names = ("w_q", "w_k", "w_v") if form.owns_cache else ("w_q",)
    gradients.update(zip(names, weight_gradients(w.heads, heads_grad_TX, normed_TD), strict=True))
    return start.x_TD, *((None, None) if form.owns_cache else key_value_grads)


def _normed_heads(heads_TX: Tensor, rope: Rope, form: _Form, w: _Weights) -> tuple[Tensor, Tensor, Tensor]:
    return normed_heads(heads_TX, w.q_norm, w.k_norm, *rope, form.n_heads, form.n_kv_heads, form.eps)


def _vector_gradients(weights: Sequence[Tensor], parts_PD: Sequence[Tensor]) -> list[Tensor | None]:
    """Sums of float32 parts in the weights' dtype; None if they were added to `main_grad`."""
    totals: list[Tensor] = [weight.main_grad for weight in weights if hasattr(weight, "main_grad")]
    if len(totals) < len(weights):
        return [parts.sum(0).to(weight.dtype) for weight, parts in zip(weights, parts_PD, strict=True)]
    add_rows(totals, parts_PD)
    return [None] * len(weights)
