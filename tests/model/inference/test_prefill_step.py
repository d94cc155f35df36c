"""The fused prefill step against `Transformer.extend` in float64: chunks behind cached tokens, padding, the tail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from model.inference.decode_step import DecodeStep, DecodeWeights
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.inference.prefill_step import PrefillStep
from tests.model.inference.test_decode_step import DEVICE, MAX_LENGTH, NAN, SHARINGS, random_model

N_PAGES = 40


@settings(max_examples=8, deadline=None)
@given(
    sharing=st.sampled_from(SHARINGS),
    n_kv_heads=st.sampled_from([1, 2]),
    chunks=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=3),
    page_size=st.sampled_from([4, 16]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_chunks_equal_the_plain_path(
    sharing: object, n_kv_heads: int, chunks: list[tuple[int, int]], page_size: int, padding: int, seed: int
) -> None:
    """(cached tokens, new tokens) of each sequence; sequences and tokens beyond are padding."""
    model = random_model(kv_sharing=sharing, n_kv_heads=n_kv_heads)
    exact = random_model(torch.float64, kv_sharing=sharing, n_kv_heads=n_kv_heads)
    generator = torch.Generator().manual_seed(seed)
    ours = PagedKVCache(model.config, N_PAGES, page_size, torch.float32, DEVICE)
    theirs = PagedKVCache(model.config, N_PAGES, page_size, torch.float64, DEVICE)
    for cache in (ours, theirs):
        for pool in (*cache.k_SGK.values(), *cache.v_SGK.values()):
            pool.fill_(NAN)
    order = torch.randperm(N_PAGES, generator=generator).tolist()
    width = -(-MAX_LENGTH // page_size)
    pages = [[order.pop() for _ in range(-(-(start + new) // page_size))] for start, new in chunks]
    texts = [torch.randint(43, (start + new,), generator=generator).tolist() for start, new in chunks]
    before = [(text[:start], 0, own) for text, (start, _), own in zip(texts, chunks, pages, strict=True) if start]
    if before:
        exact.extend(CacheStep.build(before, DEVICE), theirs)
        for layer in theirs.k_SGK:
            ours.k_SGK[layer].copy_(theirs.k_SGK[layer])
            ours.v_SGK[layer].copy_(theirs.v_SGK[layer])
    new = [(text[start:], start, own) for text, (start, _), own in zip(texts, chunks, pages, strict=True)]
    expected_BV = exact.logits(exact.extend(CacheStep.build(new, DEVICE), theirs))

    n_sequences = len(chunks) + 1
    int32 = {"dtype": torch.int32, "device": DEVICE}
    starts = [0]
    for _, length in chunks:
        starts.append(starts[-1] + length)
    n_tokens = starts[-1]
    starts_B1 = torch.tensor([*starts, n_tokens], **int32)  # type: ignore[call-overload]
    context_B = torch.tensor([*(start for start, _ in chunks), 0], **int32)  # type: ignore[call-overload]
    table_BP = torch.full((n_sequences, width), -1, **int32)  # type: ignore[call-overload]
    for row, own in enumerate(pages):
        table_BP[row, : len(own)] = torch.tensor(own)
    tokens_T = torch.tensor([t for tokens, _, _ in new for t in tokens] + [41] * padding, **int32)  # type: ignore[call-overload]
    weights = DecodeWeights(model, MAX_LENGTH)
    x_TD = torch.full((n_tokens + padding + 3, model.config.d_model), NAN, device=DEVICE)
    step = PrefillStep(
        weights, ours.k_SGK, ours.v_SGK, page_size, x_TD, tokens=n_tokens + padding, sequences=n_sequences
    )
    step(tokens_T, starts_B1, context_B, dict.fromkeys(weights.rope_LC, table_BP))
    finish = DecodeStep(
        model, ours.k_SGK, ours.v_SGK, page_size, rows=n_sequences, width=width, max_length=MAX_LENGTH, weights=weights
    )
    lengths_B = torch.tensor([*(len(text) for text in texts), 0], **int32)  # type: ignore[call-overload]
    lasts = [*(end - 1 for end in starts[1:]), 0]
    first_layer = model.config.n_layers - model.config.n_tail_layers
    logits_BV = finish.finish(x_TD[lasts], first_layer, lengths_B, table_BP)
    torch.testing.assert_close(logits_BV[:-1].double(), expected_BV, rtol=2e-4, atol=2e-4)
    assert logits_BV.isfinite().all()
    for name in ("k_SGK", "v_SGK"):
        for layer, pool in getattr(theirs, name).items():
            found = getattr(ours, name)[layer].double()
            torch.testing.assert_close(found, pool, rtol=1e-4, atol=1e-4, equal_nan=True)
