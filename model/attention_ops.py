"""Training attention over packed documents: several back ends, and a plain reference to test them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from model.obstacle import INSTALL_GPU, Obstacle, import_obstacle

Backend = Literal["auto", "flash_attn_4", "flash_attn_2", "varlen", "flex", "sdpa", "reference"]
"""Fastest first; "auto" tries them in this order."""

BOUNDARY_PADDING = 32
"""cu_seqlens are padded with empty documents to a multiple of this, so that kernels see few shapes.

Larger padding is slower: flash-attn-4 schedules a tile per document and head (2% of a step at 512).
"""


class AttentionBackendError(ValueError):
    """The requested attention back end cannot run here."""


@dataclass(frozen=True)
class Documents:
    """Document boundaries in packed tokens; tokens attend within their document only.

    boundaries: cu_seqlens, cumulative lengths with a leading zero (int32). padded_boundaries: the same with empty
    documents appended. max_length: upper bound of the lengths. row_length: if set, no document crosses a multiple.
    """

    lengths: Tensor
    boundaries: Tensor
    padded_boundaries: Tensor
    n_tokens: int
    max_length: int
    row_length: int | None = None
    _masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, row_length: int | None = None, device: torch.device | str = "cpu"
    ) -> Documents:
        """Consecutive documents of these lengths."""
        host = torch.as_tensor(lengths, dtype=torch.int32, device="cpu")
        assert host.ndim == 1 and bool((host >= 0).all())
        n_tokens = int(host.sum())
        assert row_length is None or n_tokens % row_length == 0, f"{n_tokens} tokens in rows of {row_length}"
        return cls.on_device(host.to(device), n_tokens, int(host.max()) if len(host) else 0, row_length)

    @classmethod
    def on_device(cls, lengths: Tensor, n_tokens: int, max_length: int, row_length: int | None = None) -> Documents:
        """Documents from lengths that are already on a device (and sum to n_tokens), without synchronizing."""
        boundaries = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        padded = F.pad(boundaries, (0, -len(boundaries) % BOUNDARY_PADDING), value=n_tokens)
        return cls(lengths, boundaries, padded, n_tokens, max_length, row_length)

    @cached_property
    def document_T(self) -> Tensor:
        """Document index of each token."""
        numbers = torch.arange(len(self.lengths), device=self.lengths.device)
        return numbers.repeat_interleave(self.lengths.long(), output_size=self.n_tokens)

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token in its document."""
        starts_T = self.boundaries[:-1].long()[self.document_T]
        return torch.arange(self.n_tokens, device=self.lengths.device) - starts_T

    def mask_B1LL(self, window: int | None) -> Tensor:
        """Attention mask of each row: True for keys of the same document, not later, within the window."""
        if window not in self._masks:
            assert self.row_length is not None
            row = self.row_length
            document_BL = self.document_T.view(-1, row)
            visible_LL = self.window_mask_LL(row, window or row)
            same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
            self._masks[window] = (same_BLL & visible_LL)[:, None]
        return self._masks[window]

    def block_mask(self, window: int | None) -> Any:
        """The same mask over all tokens as a BlockMask, for flex attention."""
        key = ("flex", window)
        if key not in self._masks:
            from torch.nn.attention.flex_attention import create_block_mask

            document_T, reach = self.document_T, window or self.n_tokens

            def visible(batch: Tensor, head: Tensor, query: Tensor, kv: Tensor) -> Tensor:
                return (document_T[query] == document_T[kv]) & (query >= kv) & (query - kv < reach)

            length = self.n_tokens
            self._masks[key] = create_block_mask(visible, None, None, length, length, device=document_T.device)
        return self._masks[key]

    def window_mask_LL(self, length: int, window: int) -> Tensor:
        """True where the key is not later and fewer than `window` tokens back."""
        place_L = torch.arange(length, device=self.lengths.device)
        distance_LL = place_L[:, None] - place_L[None, :]
        return (distance_LL >= 0) & (distance_LL < window)


AttentionOp = Callable[[Tensor, Tensor, Tensor, Documents, "int | None"], Tensor]


def reference_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None
) -> Tensor:
    """Softmax attention, document by document (arXiv 1706.03762; scale 1, since q is scaled)."""
    heads_per_group = q_THK.shape[1] // k_TGK.shape[1]
    parts = []
    for q_LHK, k_LGK, v_LGK in zip(*(x.split(documents.lengths.tolist()) for x in (q_THK, k_TGK, v_TGK)), strict=True):
        k_LHK, v_LHK = (x.repeat_interleave(heads_per_group, dim=1) for x in (k_LGK, v_LGK))
        scores_HLL = torch.einsum("qhk,mhk->hqm", q_LHK.float(), k_LHK.float())
        distance_LL = torch.arange(len(q_LHK))[:, None] - torch.arange(len(q_LHK))[None, :]
        hidden_LL = (distance_LL < 0) | (distance_LL >= (window or len(q_LHK) + 1))
        weights_HLL = scores_HLL.masked_fill(hidden_LL.to(scores_HLL.device), float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqm,mhk->qhk", weights_HLL, v_LHK.float()).to(q_THK.dtype))
    return torch.cat(parts)


def sdpa_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """PyTorch's SDPA. A batch entry is a row of packed documents, or one padded document if there are no rows."""
    row = documents.row_length or documents.max_length
    if documents.row_length is None:
        place_T = documents.document_T * row + documents.positions_T
        q_RHK, k_RGK, v_RGK = (_padded(x, place_T, len(documents.lengths) * row) for x in (q_THK, k_TGK, v_TGK))
        # padding follows the document, so causality masks it
        mask = None if window is None or window >= row else documents.window_mask_LL(row, window)
    else:
        q_RHK, k_RGK, v_RGK, mask = q_THK, k_TGK, v_TGK, documents.mask_B1LL(window)
    q_BHLK, k_BGLK, v_BGLK = (x.unflatten(0, (-1, row)).transpose(1, 2) for x in (q_RHK, k_RGK, v_RGK))
    is_mqa = k_BGLK.shape[1] == 1
    out_BHLK = F.scaled_dot_product_attention(
        q_BHLK,
        k_BGLK.expand(-1, q_BHLK.shape[1], -1, -1) if is_mqa else k_BGLK,
        v_BGLK.expand(-1, q_BHLK.shape[1], -1, -1) if is_mqa else v_BGLK,
        attn_mask=mask,
        is_causal=mask is None,
        scale=1.0,
        enable_gqa=not is_mqa,
    )
    out_RHK = out_BHLK.transpose(1, 2).flatten(0, 1)
    return out_RHK if documents.row_length is not None else out_RHK[place_T]


def _padded(x_THK: Tensor, place_T: Tensor, n_places: int) -> Tensor:
    return x_THK.new_zeros(n_places, *x_THK.shape[1:]).index_copy(0, place_T, x_THK)


def flash_attention_4(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """flash-attn-4 (CuTe DSL) on Hopper and Blackwell."""
    from model.kernels.flash_attention import FlashAttention

    out_THK = FlashAttention.apply(q_THK, k_TGK, v_TGK, documents.padded_boundaries, documents.max_length, window)
    assert isinstance(out_THK, Tensor)
    return out_THK


def flash_attention_2(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """flash-attn 2 (arXiv 2307.08691) on Ampere and later."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THK,
        k_TGK,
        v_TGK,
        cu_seqlens_q=documents.padded_boundaries,
        cu_seqlens_k=documents.padded_boundaries,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        softmax_scale=1.0,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


def varlen_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """PyTorch's variable-length kernel (torch.nn.attention.varlen)."""
    from torch.nn.attention.varlen import varlen_attn

    heads_per_group = q_THK.shape[1] // k_TGK.shape[1]
    out_THK = varlen_attn(
        q_THK,
        # torch 2.11 requires as many key heads as query heads
        k_TGK.repeat_interleave(heads_per_group, dim=1),
        v_TGK.repeat_interleave(heads_per_group, dim=1),
        documents.padded_boundaries,
        documents.padded_boundaries,
        documents.max_length,
        documents.max_length,
        scale=1.0,
        window_size=((window or 0) - 1, 0),  # -1: no limit to the left
    )
    assert isinstance(out_THK, Tensor)
    return out_THK


def flex_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """PyTorch's flex attention (arXiv 2412.05496), compiled on a GPU; skips fully masked blocks."""
    q_1HTK, k_1GTK, v_1GTK = (x.transpose(0, 1)[None] for x in (q_THK, k_TGK, v_TGK))
    out_1HTK = _flex_kernel(q_THK.device.type)(
        q_1HTK, k_1GTK, v_1GTK, block_mask=documents.block_mask(window), scale=1.0, enable_gqa=True
    )
    return out_1HTK[0].transpose(0, 1)


@cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as kernel

    run: Any = kernel
    return torch.compile(run) if device_type == "cuda" else run


AttentionBackward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(gradient of the output, q, k, v) -> gradients of q, k and v."""


def attend_with_backward(
    attend: AttentionOp, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None
) -> tuple[Tensor, AttentionBackward]:
    """Attention outside of autograd: its output, and a function for its gradients, called with the same q, k, v.

    With flash-attn-4, q, k and v may be freed in between and recomputed for that call.
    """
    if attend is flash_attention_4:
        from model.kernels.flash_attention import flash_backward, flash_forward

        extent = (documents.padded_boundaries, documents.max_length, window)
        out_THK, normalizer_HT = flash_forward(q_THK, k_TGK, v_TGK, *extent)
        return out_THK, lambda grad, q, k, v: flash_backward(grad, q, k, v, out_THK, normalizer_HT, *extent)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (q_THK, k_TGK, v_TGK)]
        traced_THK = attend(leaves[0], leaves[1], leaves[2], documents, window)
    return traced_THK.detach(), lambda grad, q, k, v: torch.autograd.grad(traced_THK, leaves, grad)


BACKENDS: dict[str, AttentionOp] = {
    "flash_attn_4": flash_attention_4,
    "flash_attn_2": flash_attention_2,
    "varlen": varlen_attention,
    "flex": flex_attention,
    "sdpa": sdpa_attention,
    "reference": reference_attention,
}
_FLASH_MODULES = {
    "flash_attn_4": ("flash_attn.cute.interface", INSTALL_GPU),
    "flash_attn_2": ("flash_attn.flash_attn_interface", "pip install flash-attn --no-build-isolation"),
    "varlen": ("torch.nn.attention.varlen", "pip install -U torch"),
}
"""Back end -> (module, command that installs it)."""
_FLASH_CAPABILITY = {"flash_attn_4": 9, "flash_attn_2": 8, "varlen": 8}


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> Obstacle | None:
    """Why this back end cannot run on this device, or None."""
    if backend in ("sdpa", "reference"):
        return None
    if device.type != "cuda":
        return Obstacle("unfit", f"it needs a CUDA device, not {device.type}")
    if backend == "flex":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return Obstacle("unfit", f"it computes in 16 bits, not in {dtype}", remedy="set engine.precision: bfloat16")
    needed, (major, minor) = _FLASH_CAPABILITY[backend], torch.cuda.get_device_capability(device)
    if major < needed:
        return Obstacle("unfit", f"it needs compute capability {needed}.0, this device has {major}.{minor}")
    return _import_once(backend)


@cache
def _import_once(backend: str) -> Obstacle | None:
    return import_obstacle(*_FLASH_MODULES[backend])


_AUTO_ORDER = [name for name in get_args(Backend) if name not in ("auto", "flex")]
"""Without flex, which takes a minute to compile and is slower than those before it."""


def choose_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """The back end to use on `device`: the fastest available for "auto", else the named one.

    Raises AttentionBackendError when the named one cannot run.
    """
    if backend == "auto":
        return next(name for name in _AUTO_ORDER if why_not(name, device, dtype) is None)
    reason = why_not(backend, device, dtype)
    if reason:
        raise AttentionBackendError(f"attention: {backend} cannot run here: {reason}. Use attention: auto")
    return backend


def faster_backend(chosen: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Obstacle] | None:
    """The fastest back end that this machine could run instead of the chosen one, and what it lacks; None if none."""
    for name in _AUTO_ORDER[: _AUTO_ORDER.index(chosen)]:
        obstacle = why_not(name, device, dtype)
        if obstacle and obstacle.kind != "unfit":
            return name, obstacle
    return None
