"""The divisions of products fit the GPU and, in deterministic steps, do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from model.kernels.decode_product import MOST_ROWS
from model.kernels.decode_product_tiles import product_tiles, vector_tiles
from model.kernels.paged_attention import padded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARED_MEMORY = 227 * 1024
NAMES = ("qkv", "q", "o", "gate_in", "out", "logits")


@given(
    name=st.sampled_from(NAMES), rows=st.integers(1, 1024), n_out=st.integers(1, 200_000), n_in=st.integers(8, 30_000),
    deterministic=st.booleans(),
)  # fmt: skip
def test_operands_fit_in_shared_memory(name: str, rows: int, n_out: int, n_in: int, deterministic: bool) -> None:
    tiles = product_tiles(name, rows, n_out, n_in, deterministic, DEVICE)
    if tiles is None:
        assert rows > 64 and not deterministic
        return
    elements = (tiles.block_n * (2 if name == "gate_in" else 1) + min(padded(rows), MOST_ROWS)) * tiles.block_k
    assert 2 * elements * tiles.n_stages <= SHARED_MEMORY
    assert 0 < (tiles.rows_a_block or tiles.block_n) <= tiles.block_n
    assert tiles.splits == 1 or name not in ("gate_in", "logits")
    if deterministic:
        one = product_tiles(name, 1, n_out, n_in, True, DEVICE)
        assert one is not None
        assert (tiles.block_n, tiles.block_k, tiles.splits) == (one.block_n, one.block_k, one.splits)
        assert tiles.rows_a_block is None


@given(name=st.sampled_from(NAMES), n_out=st.integers(1, 200_000), n_in=st.integers(8, 4096))
def test_the_tile_of_a_normed_row_holds_it(name: str, n_out: int, n_in: int) -> None:
    tiles = vector_tiles(name, n_out, n_in, DEVICE)
    assert tiles.block_n >= 1 and tiles.block_n * tiles.block_k <= 8 * 2048
    assert tiles.block_k >= n_in or name == "out"
