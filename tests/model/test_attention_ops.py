"""Every training back end that runs here against the reference, on ragged packed documents."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_ops import BACKENDS, AttentionBackendError, Backend, Documents, choose_backend, why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = [name for name in get_args(Backend) if name not in ("auto", "reference")]
TOLERANCE = {torch.float64: 1e-5, torch.bfloat16: 2e-2}
"""Allowed error as a share of the reference's norm; flex and SDPA accumulate in float32."""

Gradients = tuple[torch.Tensor, ...]


def outputs(
    backend: str, lengths: list[int], row_length: int | None, window: int | None, heads: tuple[int, int, int],
    dtype: torch.dtype, seed: int,
) -> Gradients:  # fmt: skip
    """Output and the gradients of q, k, v of random inputs, the same for every back end; rounded to `dtype` first."""
    n_heads, n_kv_heads, d_head = heads
    documents = Documents.from_lengths(lengths, row_length, DEVICE)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, direction = (
        torch.randn(sum(lengths), h, d_head, generator=generator, dtype=torch.float64).to(dtype)
        for h in (n_heads, n_kv_heads, n_kv_heads, n_heads)
    )
    compute = torch.float32 if backend == "reference" and dtype == torch.bfloat16 else dtype
    q, k, v = ((x * scale).to(DEVICE, compute).requires_grad_() for x, scale in ((q, d_head**-0.5), (k, 1), (v, 1)))
    out = BACKENDS[backend](q, k, v, documents, window)
    return (out.detach(), *torch.autograd.grad((out * direction.to(DEVICE, compute)).sum(), (q, k, v)))


def assert_equal_to_reference(backend: str, *arguments: object, dtype: torch.dtype, seed: int) -> None:
    found = outputs(backend, *arguments, dtype, seed)  # type: ignore[arg-type]
    expected = outputs("reference", *arguments, dtype, seed)  # type: ignore[arg-type]
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.double() - theirs.double()).norm()
        assert error <= TOLERANCE[dtype] * (theirs.double().norm() + 0.1), (backend, float(error))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 12)),
    n_kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
    in_rows=st.booleans(),
)
def test_small_documents_equal_the_reference(
    rows: list[list[int]], window: int | None, n_kv_heads: int, seed: int, in_rows: bool
) -> None:
    row_length = max(max(sum(row) for row in rows), 1)
    lengths = [length for row in rows for length in (*row, row_length - sum(row))]
    row = row_length if in_rows else None
    assert_equal_to_reference("sdpa", lengths, row, window, (4, n_kv_heads, 16), dtype=torch.float64, seed=seed)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("heads", [(16, 1, 128), (4, 2, 64), (3, 3, 128)])
@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
def test_sixteen_bits_on_a_gpu_equal_the_reference(backend: str, heads: tuple[int, int, int]) -> None:
    if reason := why_not(backend, DEVICE, torch.bfloat16):
        pytest.skip(f"{backend}: {reason}")
    for window, lengths in product(
        [None, 1, 37, 128, 5000], [[513], [1, 0, 700, 0, 129, 3], [64] * 8 + [0] * 30 + [257, 1]]
    ):
        assert_equal_to_reference(
            backend, lengths, sum(lengths), window, heads, dtype=torch.bfloat16, seed=sum(lengths)
        )


def test_documents_give_positions_and_numbers() -> None:
    documents = Documents.from_lengths([3, 0, 2])
    assert documents.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert documents.document_T.tolist() == [0, 0, 0, 2, 2]
    assert documents.boundaries.tolist() == [0, 3, 3, 5]


def test_a_missing_backend_is_named() -> None:
    with pytest.raises(AttentionBackendError, match="flash_attn_4 cannot run here"):
        choose_backend("flash_attn_4", torch.device("cpu"), torch.float32)
    assert choose_backend("auto", torch.device("cpu"), torch.float32) == "sdpa"
