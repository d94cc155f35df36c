"""Sampling of a decoding step's tokens and the advance of its rows, in one kernel: `model.inference.sampler` on a GPU.

A program reads a row of logits a few times, from the L2 cache. Thresholds of top_k and top_p are found by bisection
over the bits of a float, so nothing is sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from model.inference.rows import FORBIDDEN as _FORBIDDEN
from model.inference.rows import STOP as _STOP
from model.inference.rows import Rows
from model.kernels.launch import overlapping

FORBIDDEN, STOP = tl.constexpr(_FORBIDDEN), tl.constexpr(_STOP)
_BLOCK = 32768
"""Most tokens that a program holds in registers at once."""


@triton.jit
def _shifted(z, count: tl.constexpr):
    return z ^ (z >> count)


@triton.jit
def _uniform(seed_low, seed_high, position):
    """The sampler's `uniform`, to 24 bits."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    z = seed + (position + 1).to(tl.uint64) * tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    z = _shifted(z, 30) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    z = _shifted(z, 27) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return (_shifted(z, 31) >> 40).to(tl.float32) * (1.0 / 16777216)


@triton.jit
def _ordered(x):
    """Integers in the order of the floats."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # one zero
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _load(logits_ptr, flags_ptr, start, vocab, BLOCK: tl.constexpr):
    """(logits, those of allowed tokens and -inf) of a block."""
    token = start + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token, mask=token < vocab, other=float("-inf"))
    flags = tl.load(flags_ptr + token, mask=token < vocab, other=1).to(tl.int32)
    return logits, tl.where((flags & FORBIDDEN) != 0, float("-inf"), logits)


@triton.jit
def _weights(allowed, best, temperature, threshold):
    # halved, so that no difference of finite numbers overflows
    weights = tl.exp(2 * ((0.5 * allowed - 0.5 * best) / temperature))
    return tl.where((allowed > float("-inf")) & (_ordered(allowed) >= threshold), weights, 0.0)


@triton.jit
def _mass(logits_ptr, flags_ptr, vocab, best, temperature, threshold, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """Number or total weight of the tokens whose logit is at least the threshold."""
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        _, allowed = _load(logits_ptr, flags_ptr, start, vocab, BLOCK)
        if COUNTS:
            kept = (allowed > float("-inf")) & (_ordered(allowed) >= threshold)
            mass += tl.sum(kept.to(tl.float32)).to(tl.float64)
        else:
            mass += tl.sum(_weights(allowed, best, temperature, threshold)).to(tl.float64)
    return mass


@triton.jit
def _threshold(
    logits_ptr, flags_ptr, vocab, best, temperature, low, wanted, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest threshold, at least `low`, above which the mass is at least `wanted`."""
    below = low.to(tl.int64)
    above = _ordered(best).to(tl.int64) + 1
    while above - below > 1:
        middle = (below + above) // 2
        mass = _mass(logits_ptr, flags_ptr, vocab, best, temperature, middle.to(tl.int32), COUNTS, BLOCK)
        below = tl.where(mass >= wanted, middle, below)
        above = tl.where(mass >= wanted, above, middle)
    return below.to(tl.int32)


@triton.jit(do_not_specialize=["n_rows", "vocab"])
def _sample_kernel(
    logits_ptr, state_ptr, flags_ptr, rows_ptr, lengths_ptr, result_ptr, n_rows, vocab,
    GIVEN_ROWS: tl.constexpr, WANTS_LOGPROBS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    if OVERLAPS:
        gdc_wait()
    row = index
    if GIVEN_ROWS:
        row = tl.load(rows_ptr + index)
    field_ptr = state_ptr + tl.maximum(row, 0)
    length_ptr = lengths_ptr + index if GIVEN_ROWS else field_ptr + n_rows
    length = tl.load(length_ptr)
    if (length > 0) & (row >= 0):
        logits_ptr += index.to(tl.int64) * vocab
        flags_ptr += row.to(tl.int64) * vocab
        n_left = tl.load(field_ptr + 2 * n_rows) - 1
        n_drawn = tl.load(field_ptr + 3 * n_rows)
        temperature = tl.load(field_ptr + 6 * n_rows).to(tl.float32, bitcast=True)
        top_k = tl.load(field_ptr + 7 * n_rows)
        top_p = tl.load(field_ptr + 8 * n_rows).to(tl.float32, bitcast=True)

        best = tl.full([], float("-inf"), tl.float32)
        largest = tl.full([], float("-inf"), tl.float32)
        n_bad = tl.full([], 0, tl.int32)
        token = tl.full([], 0, tl.int32)
        for start in range(0, vocab, BLOCK):
            logits, allowed = _load(logits_ptr, flags_ptr, start, vocab, BLOCK)
            ids = start + tl.arange(0, BLOCK)
            n_bad += tl.sum((ids < vocab).to(tl.int32) - (tl.abs(logits) < float("inf")).to(tl.int32))
            largest = tl.maximum(largest, tl.max(logits))
            block_best = tl.max(allowed)
            if block_best > best:
                token = tl.min(tl.where(allowed == block_best, ids, 0x7FFFFFFF))
                best = block_best
        can_draw = (n_bad == 0) & (best > float("-inf"))

        if can_draw & (temperature > 0):
            threshold = _ordered(tl.full([], float("-inf"), tl.float32))
            if (top_k > 0) & (top_k < vocab):
                threshold = _threshold(
                    logits_ptr, flags_ptr, vocab, best, temperature, threshold, top_k.to(tl.float64), True, BLOCK
                )
            total = _mass(logits_ptr, flags_ptr, vocab, best, temperature, threshold, False, BLOCK)
            if top_p < 1:
                threshold = _threshold(
                    logits_ptr, flags_ptr, vocab, best, temperature, threshold, total * top_p.to(tl.float64),
                    False, BLOCK,
                )  # fmt: skip
                total = _mass(logits_ptr, flags_ptr, vocab, best, temperature, threshold, False, BLOCK)
            seed_low = tl.load(field_ptr + 4 * n_rows)
            seed_high = tl.load(field_ptr + 5 * n_rows)
            target = total * _uniform(seed_low, seed_high, n_drawn).to(tl.float64)
            before = tl.full([], 0.0, tl.float64)
            drawn = tl.full([], -1, tl.int32)
            last = tl.full([], 0, tl.int32)
            for start in range(0, vocab, BLOCK):
                if drawn < 0:
                    _, allowed = _load(logits_ptr, flags_ptr, start, vocab, BLOCK)
                    ids = start + tl.arange(0, BLOCK)
                    weights = _weights(allowed, best, temperature, threshold)
                    after = before + tl.sum(weights).to(tl.float64)
                    last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0)))
                    if after > target:
                        is_hit = (before + tl.cumsum(weights).to(tl.float64) > target) & (weights > 0)
                        hit = tl.min(tl.where(is_hit, ids, 0x7FFFFFFF))
                        drawn = tl.where(hit < 0x7FFFFFFF, hit, -1)
                    before = after
            token = tl.where(drawn >= 0, drawn, last)  # rounding may leave no token above the target

        logprob = tl.full([], float("nan"), tl.float32)
        if WANTS_LOGPROBS & can_draw:
            total_exp = tl.full([], 0.0, tl.float32)
            for start in range(0, vocab, BLOCK):
                logits, _ = _load(logits_ptr, flags_ptr, start, vocab, BLOCK)
                total_exp += tl.sum(tl.exp(logits - largest))
            logprob = tl.load(logits_ptr + token) - largest - tl.log(total_exp)
        is_stop = (tl.load(flags_ptr + token).to(tl.int32) & STOP) != 0
        finish = tl.where(can_draw, tl.where(is_stop, 1, tl.where(n_left <= 0, 2, 0)), 3)
        token = tl.where(can_draw, token, -1)
        tl.store(field_ptr, token)
        tl.store(field_ptr + n_rows, tl.where(finish == 0, length + 1, 0))
        tl.store(field_ptr + 2 * n_rows, n_left)
        tl.store(field_ptr + 3 * n_rows, n_drawn + 1)
        tl.store(result_ptr + row, token)
        tl.store(result_ptr + n_rows + row, finish)
        tl.store(result_ptr + 2 * n_rows + row, logprob.to(tl.int32, bitcast=True))


def sample_rows(
    logits_BV: Tensor, rows: Rows, result_3R: Tensor, rows_B: Tensor | None = None, lengths_B: Tensor | None = None,
    wants_logprobs: bool = False,
) -> None:  # fmt: skip
    """Draw the next token of each row that is not idle, and advance the row (see `model.inference.sampler`).

    logits_BV: float32, of the first B rows, or of rows_B (int32; -1: none) whose sequences have lengths_B tokens.
    result_3R: int32 (token, finish, bits of the log-probability) of each row, written where a token is drawn.
    """
    batch, vocab = logits_BV.shape
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    assert logits_BV.is_contiguous() and rows.state_FR.is_contiguous() and rows.flags_RV.is_contiguous()
    assert (rows_B is None) == (lengths_B is None) and result_3R.shape == (3, len(rows))
    _sample_kernel[(batch,)](
        logits_BV, rows.state_FR, rows.flags_RV, rows_B, lengths_B, result_3R, len(rows), vocab,
        GIVEN_ROWS=rows_B is not None, WANTS_LOGPROBS=wants_logprobs,
        BLOCK=block, num_warps=min(max(block // 1024, 4), 32), **overlapping(logits_BV.device),
    )  # fmt: skip
