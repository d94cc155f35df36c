"""Which division of a decoding step's products is fastest: measured on an H100 at width 2048, feed-forward 5632."""

from __future__ import annotations

import torch
import triton

from model.kernels.decode_product import Tiles
from model.kernels.decode_vector_product import VectorTiles
from model.kernels.launch import n_processors


def product_tiles(
    name: str, rows: int, n_out: int, n_in: int, deterministic: bool, device: torch.device
) -> Tiles | None:
    """Tiles of a step's product, by its name; None where cuBLAS is faster.

    deterministic: the same order of sums for any number of rows.
    """
    divided = name not in ("gate_in", "logits")  # their output is not a sum
    if deterministic:
        return Tiles(64, 64, splits=4 if divided else 1, n_warps=4 if rows <= 64 else 8, prefetch=1024)
    if rows <= 16:
        if name == "logits":
            return Tiles(64, 128, n_stages=3, prefetch=0)
        if name == "gate_in":
            return Tiles(64, 128, prefetch=1024, rows_a_block=_even_rows(n_out, 1, 64, device))
        splits = 4 if name == "out" else 2
        even_rows = _even_rows(n_out, splits, 64, device) if name == "qkv" else None
        return Tiles(64, 256, splits, n_stages=3, rows_a_block=even_rows)
    if rows <= 128:
        if name == "logits":
            return Tiles(128, 128, n_warps=8, n_stages=3, prefetch=1024)
        if name == "gate_in":
            even_rows = _even_rows(n_out, 1, 64, device)
            return Tiles(64, 128, prefetch=1024, rows_a_block=even_rows) if rows <= 64 else None
        return Tiles(64, 128, splits=4 if name == "out" else 2, prefetch=4096 if name in ("q", "o") else 1024)
    return Tiles(128, 64, n_warps=8) if name == "logits" and rows <= 256 else None


def _even_rows(n_out: int, splits: int, block_n: int, device: torch.device) -> int | None:
    """Rows of a block that give every processor a program, if blocks of block_n rows are too few."""
    rows = 4 * triton.cdiv(n_out * splits, 4 * n_processors(device))
    return rows if rows < block_n else None


def vector_tiles(name: str, n_out: int, n_in: int, device: torch.device) -> VectorTiles:
    """Tiles of a product of one row, by its name."""
    block_k = min(triton.next_power_of_2(n_in), 2048) if name == "out" else triton.next_power_of_2(n_in)
    programs = n_processors(device)
    block_n, n_programs, n_warps, prefetch = {
        "qkv": (8, n_out, 4, 0),
        "q": (8, n_out, 4, 0),
        "o": (4, 2 * programs, 4, 3),
        "gate_in": (4, 2 * programs, 4, 1),
        "out": (4, n_out, 8, 0),
        "logits": (8, n_out, 4, 0),
    }[name]
    return VectorTiles(max(block_n * 2048 // max(block_k, 2048), 1), block_k, n_programs, n_warps, prefetch)
