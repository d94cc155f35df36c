"""Training attention over packed documents: one function, several back ends, a plain reference to test them by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Backend = Literal["auto", "reference", "sdpa", "flash_attn_4", "flash_attn_2"]


class AttentionBackendError(ValueError):
    """A named attention back end cannot run here."""


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in a run of packed tokens; no token sees another document.

    `row_length`: when set, documents never cross a multiple of it, so attention may be computed row by row.
    """

    lengths: Tensor
    n_tokens: int
    max_length: int
    row_length: int | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, row_length: int | None = None, device: torch.device | str = "cpu"
    ) -> Documents:
        """Documents of these lengths, one after the other."""
        host = torch.as_tensor(lengths, dtype=torch.int32, device="cpu")
        assert host.ndim == 1 and bool((host >= 0).all())
        n_tokens = int(host.sum())
        assert row_length is None or n_tokens % row_length == 0, f"{n_tokens} tokens in rows of {row_length}"
        return cls(host.to(device), n_tokens, int(host.max()) if len(host) else 0, row_length)

    @cached_property
    def boundaries(self) -> Tensor:
        """Cumulative lengths with a leading zero (int32), as variable-length kernels take them."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)

    @cached_property
    def document_T(self) -> Tensor:
        """The number of the document each token belongs to."""
        numbers = torch.arange(len(self.lengths), device=self.lengths.device)
        return numbers.repeat_interleave(self.lengths.long(), output_size=self.n_tokens)

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token inside its document."""
        starts_T = self.boundaries[:-1].long()[self.document_T]
        return torch.arange(self.n_tokens, device=self.lengths.device) - starts_T

    def mask_B1LL(self, window: int | None) -> Tensor:
        """True where a query of a row sees a key of the same row: same document, not later, inside the window."""
        if window not in self._masks:
            assert self.row_length is not None
            row = self.row_length
            document_BL = self.document_T.view(-1, row)
            visible_LL = self.window_mask_LL(row, window or row)
            same_BLL = document_BL[:, :, None] == document_BL[:, None, :]
            self._masks[window] = (same_BLL & visible_LL)[:, None]
        return self._masks[window]


    def window_mask_LL(self, length: int, window: int) -> Tensor:
        """True where a query sees a key by distance alone: not later, fewer than `window` tokens back."""
        place_L = torch.arange(length, device=self.lengths.device)
        distance_LL = place_L[:, None] - place_L[None, :]
        return (distance_LL >= 0) & (distance_LL < window)


AttentionOp = Callable[[Tensor, Tensor, Tensor, Documents, "int | None"], Tensor]


def reference_attention(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None
) -> Tensor:
    """Softmax attention, document by document, as written in arXiv 1706.03762 (scale 1: q carries it)."""
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
    """PyTorch's own kernel; a batch entry is a row of packed documents, or a padded document without rows."""
    row = documents.row_length or documents.max_length
    window = window if window is not None and window < row else None
    if documents.row_length is None:
        place_T = documents.document_T * row + documents.positions_T
        q_RHK, k_RGK, v_RGK = (_padded(x, place_T, len(documents.lengths) * row) for x in (q_THK, k_TGK, v_TGK))
        # padding comes after every token of its document, so causality alone hides it
        mask = None if window is None else documents.window_mask_LL(row, window)
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
    from flash_attn.cute import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q_THK,
        k_TGK,
        v_TGK,
        cu_seqlens_q=documents.boundaries,
        cu_seqlens_k=documents.boundaries,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        softmax_scale=1.0,
        causal=True,
        window_size=(None, None) if window is None else (window - 1, 0),
    )
    return out[0] if isinstance(out, tuple) else out


def flash_attention_2(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, documents: Documents, window: int | None) -> Tensor:
    """flash-attn 2 (arXiv 2307.08691) on Ampere and later."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THK,
        k_TGK,
        v_TGK,
        cu_seqlens_q=documents.boundaries,
        cu_seqlens_k=documents.boundaries,
        max_seqlen_q=documents.max_length,
        max_seqlen_k=documents.max_length,
        softmax_scale=1.0,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )


BACKENDS: dict[str, AttentionOp] = {
    "reference": reference_attention,
    "sdpa": sdpa_attention,
    "flash_attn_4": flash_attention_4,
    "flash_attn_2": flash_attention_2,
}


def _why_not(backend: str, device: torch.device) -> str | None:
    """Why this back end cannot run on this device, or None when it can."""
    if backend in ("reference", "sdpa"):
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    module = "flash_attn.cute" if backend == "flash_attn_4" else "flash_attn.flash_attn_interface"
    try:
        __import__(module)
    except ImportError as error:
        return f"import {module} failed ({error}); install the gpu extra"
    return None


def choose_backend(backend: Backend, device: torch.device) -> str:
    """The back end to use on `device`: the fastest that runs for "auto", the named one or an error otherwise."""
    if backend == "auto":
        order = ("flash_attn_4", "flash_attn_2", "sdpa")
        return next(name for name in order if _why_not(name, device) is None)
    reason = _why_not(backend, device)
    if reason:
        raise AttentionBackendError(f"attention: {backend} cannot run here: {reason}. Use attention: auto")
    return backend
