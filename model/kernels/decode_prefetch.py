"""Reads of weights into the L2 cache, ahead of the kernel's wait for its inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_rows(row_ptr, n_rows, row_bytes, n_bytes):
    """Start to load the first n_bytes of rows that are row_bytes apart into the L2 cache, a thread a row. Needs SM90.

    The pointer is aligned to 16 bytes, and both sizes are multiples of 16.
    """
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .s32 t; .reg .u64 a; mov.u32 t, %tid.x; setp.lt.s32 p, t, $2;
        mad.wide.s32 a, t, $3, $1; @p cp.async.bulk.prefetch.L2.global [a], $4; mov.b32 $0, 0; }""",
        "=r,l,r,r,r", [row_ptr.to(tl.int64, bitcast=True), n_rows, row_bytes, n_bytes], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
