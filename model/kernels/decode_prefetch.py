"""Reads of weights into the L2 cache, ahead of the kernel's wait for its inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(row_ptr, is_row, n_bytes):
    """Start to load n_bytes (a multiple of 16) at each row's 16-byte aligned pointer into the L2 cache. Needs SM90."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r", [row_ptr.to(tl.int64, bitcast=True), is_row.to(tl.int32), n_bytes], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
