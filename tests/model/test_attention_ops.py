"""Every training back end that runs here against the reference, on ragged packed documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_ops import AttentionBackendError, Documents, choose_backend, reference_attention, sdpa_attention


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    n_kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    in_rows=st.booleans(),
)
def test_sdpa_equals_reference(
    rows: list[list[int]], window: int | None, n_kv_heads: int, seed: int, in_rows: bool
) -> None:
    row_length = max(max(sum(row) for row in rows), 1)
    lengths = [length for row in rows for length in (*row, row_length - sum(row))]
    documents = Documents.from_lengths(lengths, row_length if in_rows else None)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, n_kv_heads, n_kv_heads)
    )
    out, expected = (op(q, k, v, documents, window) for op in (sdpa_attention, reference_attention))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((out * direction).sum(), (q, k, v)),
        torch.autograd.grad((expected * direction).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_documents_give_positions_and_numbers() -> None:
    documents = Documents.from_lengths([3, 0, 2])
    assert documents.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert documents.document_T.tolist() == [0, 0, 0, 2, 2]
    assert documents.boundaries.tolist() == [0, 3, 3, 5]


def test_a_missing_backend_is_named() -> None:
    with pytest.raises(AttentionBackendError, match="flash_attn_4 cannot run here"):
        choose_backend("flash_attn_4", torch.device("cpu"))
    assert choose_backend("auto", torch.device("cpu")) == "sdpa"
