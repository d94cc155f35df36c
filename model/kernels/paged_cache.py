"""Reads of a paged KV cache shared by the attention kernels: slots of a tile of keys, and 8-bit elements as float16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}
"""Dtype of a cache with scales -> the constant that kernels know it by; other dtypes are 0."""

# lop3's table 0x6a is (a & b) ^ c, 0xea is (a & b) | c
_INT8_LOW: tl.constexpr = tl.constexpr("""{ .reg .b32 t, m; mov.b32 m, 0x64806480;
lop3.b32 t, $1, 0x00ff00ff, m, 0x6a; sub.f16x2 $0, t, m; }""")
_INT8_HIGH: tl.constexpr = tl.constexpr("""{ .reg .b32 t, m; mov.b32 m, 0x64806480; shr.b32 t, $1, 8;
lop3.b32 t, t, 0x00ff00ff, m, 0x6a; sub.f16x2 $0, t, m; }""")
_E4M3_LOW: tl.constexpr = tl.constexpr("""{ .reg .b32 s, t; shl.b32 s, $1, 8; and.b32 s, s, 0x80008000;
shl.b32 t, $1, 7; lop3.b32 $0, t, 0x3f803f80, s, 0xea; }""")
_E4M3_HIGH: tl.constexpr = tl.constexpr("""{ .reg .b32 s, t; and.b32 s, $1, 0x80008000; shr.b32 t, $1, 1;
lop3.b32 $0, t, 0x3f803f80, s, 0xea; }""")


@triton.jit
def tile_slots(table_ptr, tile, position, begin, end, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Cache slots of the positions of an aligned tile. Table entries outside [begin, end) are not read."""
    if PAGE % TILE == 0:
        page = tl.full([TILE], 0, tl.int64) + tl.load(table_ptr + tile * TILE // PAGE)
    elif TILE % PAGE == 0 and TILE // PAGE <= 8:
        # each page is one scalar load
        first = tile * (TILE // PAGE)
        page = tl.zeros([TILE], tl.int64)
        for i in tl.static_range(TILE // PAGE):
            is_used = ((first + i) * PAGE < end) & ((first + i + 1) * PAGE > begin)
            number = tl.load(table_ptr + first + i, mask=is_used, other=0).to(tl.int64)
            page = tl.where(position // PAGE == first + i, number, page)
    else:
        is_used = (position >= begin) & (position < end)
        page = tl.load(table_ptr + position // PAGE, mask=is_used, other=0).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def _packed(pair, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    if FORMAT == 1:
        ASSEMBLY: tl.constexpr = _INT8_HIGH if HIGH else _INT8_LOW
    else:
        ASSEMBLY: tl.constexpr = _E4M3_HIGH if HIGH else _E4M3_LOW
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def unpack(pair, HIGH: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """The low or high byte of 16-bit pairs as float16: exact for int8; e4m3 divided by 256.

    The bits are moved instead of converted: an integer is put in the mantissa of 1024, and the exponent of e4m3, biased
    by 7, is read as float16's, biased by 15. PTX: two pairs at a time in a 32-bit register.
    """
    if PTX:
        return _packed(pair, HIGH, FORMAT)
    if FORMAT == 1:
        byte = ((pair >> 8) if HIGH else pair) & 0xFF
        return (byte ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    bits = ((pair & 0x8000) | ((pair & 0x7F00) >> 1)) if HIGH else (((pair & 0x80) << 8) | ((pair & 0x7F) << 7))
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def load_scale(scale_ptr, slot, visible, group, N_GROUPS: tl.constexpr, FORMAT: tl.constexpr):
    """Scales of a tile's tokens, float32, with the factor that `unpack` leaves out."""
    scale = tl.load(scale_ptr + slot * N_GROUPS + group, mask=visible, other=0.0).to(tl.float32)
    return scale * 256 if FORMAT == 2 else scale


def as_elements(pool_SGK: Tensor) -> Tensor:
    """The pool as kernels read it: 8-bit elements as 16-bit pairs."""
    assert pool_SGK.is_contiguous()
    return pool_SGK.view(torch.int16).view(torch.uint16) if pool_SGK.dtype in FORMATS else pool_SGK
