"""Attention of a tile of query rows over a paged KV cache: what the decode and the prefill kernel share.

A cache is in the query's dtype, or int8 or float8_e4m3fn with a scale a token and head. 8-bit elements are loaded as
16-bit pairs, so that matrix units can read them transposed; the halves of a head's dimensions, even and odd, are
separate products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
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
def tile_slots(table_ptr, tile, begin, end, PAGE: tl.constexpr, TILE: tl.constexpr):
    """Cache slots (64 bits) of the positions of an aligned tile. Table entries outside [begin, end) are not read."""
    lane = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        # always true here; Triton 3.6 drops a value carried by a loop, `begin`, if it only bounds an inner loop
        is_used = (tile * TILE < end) & ((tile + 1) * TILE > begin)
        page = tl.load(table_ptr + tile * TILE // PAGE, mask=is_used, other=0).to(tl.int64)
        slot = page * PAGE + tile * TILE % PAGE + lane
    elif TILE % PAGE == 0 and TILE // PAGE <= 8:
        # a scalar load a page; which page a lane is in is known when this is compiled
        first = tile * (TILE // PAGE)
        slot = tl.zeros([TILE], tl.int64)
        for i in tl.static_range(TILE // PAGE):
            is_used = ((first + i) * PAGE < end) & ((first + i + 1) * PAGE > begin)
            page = tl.load(table_ptr + first + i, mask=is_used, other=0).to(tl.int64)
            slot = tl.where(lane // PAGE == i, page * PAGE, slot)
        slot += lane % PAGE
    else:
        position = tile * TILE + lane
        is_used = (position >= begin) & (position < end)
        page = tl.load(table_ptr + position // PAGE, mask=is_used, other=0).to(tl.int64)
        slot = page * PAGE + position % PAGE
    return slot


@triton.jit
def _packed(pair, HIGH: tl.constexpr, FORMAT: tl.constexpr):
    INT8: tl.constexpr = _INT8_HIGH if HIGH else _INT8_LOW
    E4M3: tl.constexpr = _E4M3_HIGH if HIGH else _E4M3_LOW
    ASSEMBLY: tl.constexpr = INT8 if FORMAT == 1 else E4M3
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def unpack(pair, HIGH: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """The low or high byte of 16-bit pairs as float16: exact for int8; e4m3 divided by 256.

    The bits are moved instead of converted: an integer is put in the mantissa of 1024, and the exponent of e4m3, biased
    by 7, is read as float16's, biased by 15. PTX: two pairs at a time in a 32-bit register.
    """
    if PTX:
        half = _packed(pair, HIGH, FORMAT)
    elif FORMAT == 1:
        byte = ((pair >> 8) if HIGH else pair) & 0xFF
        half = (byte ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    else:
        bits = ((pair & 0x8000) | ((pair & 0x7F00) >> 1)) if HIGH else (((pair & 0x80) << 8) | ((pair & 0x7F) << 7))
        half = bits.to(tl.float16, bitcast=True)
    return half


@triton.jit
def load_scale(scale_ptr, slot, visible, group, N_GROUPS: tl.constexpr, FORMAT: tl.constexpr):
    """Scales of a tile's tokens, float32, with the factor that `unpack` leaves out."""
    scale = tl.load(scale_ptr + slot * N_GROUPS + group, mask=visible, other=0.0).to(tl.float32)
    return scale * 256 if FORMAT == 2 else scale


@triton.jit
def _log2(x, PTX: tl.constexpr):
    if PTX:
        y = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.log2(x)
    return y


@triton.jit
def prefetch_tile(
    k_ptr, v_ptr, table_ptr, tile, begin, end, group,
    N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Start to load a tile's keys and values into the L2 cache. LINE: elements of a cache line."""
    lane = tl.arange(0, TILE)
    exists = (lane >= begin - tile * TILE) & (lane < end - tile * TILE)
    place = (tile_slots(table_ptr, tile, begin, end, PAGE, TILE) * N_GROUPS + group) * WIDTH
    for line in tl.static_range((WIDTH + LINE - 1) // LINE):
        _prefetch(k_ptr + place + line * LINE, exists)
        _prefetch(v_ptr + place + line * LINE, exists)


@triton.jit
def _prefetch(pointer, exists):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [pointer.to(tl.int64, bitcast=True), exists.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_queries(row_ptr, element, is_element, FORMAT: tl.constexpr, IN: tl.constexpr):
    """(even or all elements of the rows, odd elements, factor of each row) as operands of dtype IN, or float16.

    The factor is 1, or the largest element of the row, so that float16 holds queries of any size.
    """
    q = tl.load(row_ptr + element, mask=is_element, other=0.0)
    if FORMAT == 0:
        q = q.to(IN)
        q_odd = q
        largest = tl.full([q.shape[0]], 1.0, tl.float32)
    else:
        q = q.to(tl.float32)
        q_odd = tl.load(row_ptr + element + 1, mask=is_element, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(q), 1), tl.max(tl.abs(q_odd), 1))
        largest = tl.where(largest > 0, largest, 1.0)
        q = (q / largest[:, None]).to(tl.float16)
        q_odd = (q_odd / largest[:, None]).to(tl.float16)
    return q, q_odd, largest


@triton.jit
def attend_tiles(
    state, q, q_odd, row_scale, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, first_tile, last_tile, begin, end,
    row_position, window, group, column, is_column,
    N_GROUPS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, FORMAT: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, IN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add tiles [first_tile, last_tile) of keys to the state of an online softmax (arXiv 1805.02867), and return it.

    state: (largest score, sums of weights, output, output of odd dimensions) of each row; sums are a number a row, or
    one for each key of a tile, which saves a reduction. Keys are those at positions [begin, end), where begin is a
    multiple of TILE if ALIGNED; with MASKED, row r sees those at most row_position[r], and with a window > 0 later than
    row_position[r] - window. WIDTH: elements of a head as loaded. Scores are base-2 logarithms.
    """
    top, sums, out, out_odd = state
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        lane = tl.arange(0, TILE)
        exists = lane < end - tile * TILE
        if not ALIGNED:
            exists = exists & (lane >= begin - tile * TILE)
        slot = tile_slots(table_ptr, tile, begin, end, PAGE, TILE)
        place = (slot * N_GROUPS + group) * WIDTH
        k = tl.load(k_ptr + place[None, :] + column[:, None], mask=exists[None, :] & is_column[:, None], other=0)
        v = tl.load(v_ptr + place[:, None] + column[None, :], mask=exists[:, None] & is_column[None, :], other=0)
        visible = exists[None, :]
        if MASKED:
            distance = row_position[:, None] - (tile * TILE + lane)[None, :]
            visible = visible & (distance >= 0) & ((window == 0) | (distance < window))
        if FORMAT == 0:
            scores = tl.dot(q, k.to(IN), input_precision="ieee") * row_scale[:, None]
            scores = tl.where(visible, scores, float("-inf"))
            shifted = scores
        else:
            k_scale = load_scale(k_scale_ptr, slot, exists, group, N_GROUPS, FORMAT)
            v_scale = load_scale(v_scale_ptr, slot, exists, group, N_GROUPS, FORMAT)
            scores = tl.dot(q, unpack(k, False, FORMAT, PTX))
            scores = tl.dot(q_odd, unpack(k, True, FORMAT, PTX), scores)
            scores = tl.where(visible, scores * row_scale[:, None] * k_scale[None, :], float("-inf"))
            # the value's scale is part of the exponent, so that float16 weights are at most 1
            log2_v_scale = _log2(tl.maximum(v_scale, 1e-30), PTX)
            shifted = scores + log2_v_scale[None, :]
        new_top = tl.maximum(top, tl.max(shifted, 1))
        decay = tl.exp2(top - new_top)
        top = new_top
        weights = tl.exp2(shifted - top[:, None])
        plain = weights if FORMAT == 0 else weights * tl.exp2(-log2_v_scale)[None, :]
        sums = sums * decay[:, None] + plain if len(sums.shape) == 2 else sums * decay + tl.sum(plain, 1)
        out = out * decay[:, None]
        if FORMAT == 0:
            out = tl.dot(weights.to(IN), v.to(IN), out, input_precision="ieee")
        else:
            out = tl.dot(weights.to(tl.float16), unpack(v, False, FORMAT, PTX), out)
            out_odd = tl.dot(weights.to(tl.float16), unpack(v, True, FORMAT, PTX), out_odd * decay[:, None])
    return top, sums, out, out_odd


@triton.jit
def store_rows(row_ptr, element, out, out_odd, is_element, FORMAT: tl.constexpr):
    """Write output rows at `element` of each, odd dimensions beside the even ones."""
    tl.store(row_ptr + element, out.to(row_ptr.dtype.element_ty), mask=is_element)
    if FORMAT != 0:
        tl.store(row_ptr + element + 1, out_odd.to(row_ptr.dtype.element_ty), mask=is_element)


def padded(size: int) -> int:
    """Extent of a tile that holds `size`: a power of two, and at least 16, the least of a matrix unit."""
    return max(16, triton.next_power_of_2(size))


def check_cache(
    q_XHK: Tensor, k_SGK: Tensor, page_table_BP: Tensor, k_scale_SG: Tensor | None, v_scale_SG: Tensor | None
) -> int:
    """Assert what the kernels assume of their arguments; return the cache's format."""
    cache_format = FORMATS.get(k_SGK.dtype, 0)
    assert q_XHK.is_contiguous() and page_table_BP.stride(1) == 1 and page_table_BP.dtype == torch.int32
    assert q_XHK.shape[1] % k_SGK.shape[1] == 0 and q_XHK.shape[2] == k_SGK.shape[2]
    assert cache_format or k_SGK.dtype == q_XHK.dtype, f"a cache of {k_SGK.dtype} for queries of {q_XHK.dtype}"
    for scale_SG in (k_scale_SG, v_scale_SG):
        assert (scale_SG is not None) == (cache_format > 0)
        assert scale_SG is None or (scale_SG.shape == k_SGK.shape[:2] and scale_SG.is_contiguous())
    return cache_format


def as_elements(pool_SGK: Tensor) -> Tensor:
    """The pool as kernels read it: 8-bit elements as 16-bit pairs."""
    assert pool_SGK.is_contiguous()
    return pool_SGK.view(torch.int16).view(torch.uint16) if pool_SGK.dtype in FORMATS else pool_SGK


def operand_dtype(q: Tensor) -> tl.dtype:
    """Dtype of the products' operands: the query's. Triton's interpreter has no product of bfloat16."""
    names = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if q.device.type == "cpu" else tl.bfloat16}
    return names.get(q.dtype, tl.float32)
