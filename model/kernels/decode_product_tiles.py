"""Which division of a decoding step's products is fastest: measured on one H100 at width 2048, feed-forward 5632."""

from __future__ import annotations

import torch
import triton

from model.kernels.decode_product import Tiles
from model.kernels.decode_vector_product import VectorTiles


def product_tiles(name: str, rows: int, n_out: int, n_in: int, deterministic: bool) -> Tiles:
    """Tiles of a product of `rows` rows; the same for any number of rows if deterministic."""
    if name in ("gate_in", "logits"):
        return Tiles(64, 64)
    return Tiles(64, 64, splits=4)


def vector_tiles(name: str, n_out: int, n_in: int, device: torch.device) -> VectorTiles:
    """Tiles of a product of one row."""
    block_k = min(triton.next_power_of_2(n_in), 4096 if name != "out" else 2048)
    if name == "gate_in":
        return VectorTiles(4, block_k, 264)
    return VectorTiles(8, block_k, 264)
