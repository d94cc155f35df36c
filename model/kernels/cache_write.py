"""Write of a prompt's keys and values to their slots of a paged cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 16


@triton.jit
def _write_kernel(
    k_ptr, v_ptr, slots_ptr, k_pool_ptr, v_pool_ptr, n_tokens, width, TOKENS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots_ptr + token, mask=token < n_tokens, other=-1)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    is_written = (slot >= 0) & (column < width)
    source = token[:, None].to(tl.int64) * width + column
    tl.store(k_pool_ptr + slot * width + column, tl.load(k_ptr + source, mask=is_written), mask=is_written)
    tl.store(v_pool_ptr + slot * width + column, tl.load(v_ptr + source, mask=is_written), mask=is_written)


def write_to_cache(k_TGK: Tensor, v_TGK: Tensor, slots_T: Tensor, k_SGK: Tensor, v_SGK: Tensor) -> None:
    """Copy each token's keys and values to its slot (int64); those of slot -1, padding, nowhere."""
    width = k_TGK[0].numel()
    _write_kernel[(triton.cdiv(len(slots_T), _TOKENS),)](
        k_TGK, v_TGK, slots_T, k_SGK, v_SGK, len(slots_T), width,
        TOKENS=_TOKENS, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
