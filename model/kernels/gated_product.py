"""gelu(x w_gate) * (x w_in): a product and a gate kernel, or one kernel of quack-kernels if available."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.geglu import geglu
from model.obstacle import Obstacle, failure, import_obstacle

_MOST_ERROR = 0.02
"""Relative to the norm; rounding to 16 bits gives 0.006."""
_GatedProduct = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def gated_product(x_TD: Tensor, w_gate_in_XD: Tensor) -> tuple[Tensor, bool, Tensor]:
    """(gate_in_TX, interleaved, product_TF): x times the weights (first half of the rows: gate), and its GeGLU.

    interleaved: columns of gate_in_TX alternate between gate and linear branch; otherwise all of the gate's come first.
    `geglu_backward` takes both layouts.
    """
    in_one, _ = _gated_product_of_quack(x_TD.device, x_TD.dtype)
    # the kernel loads 16 bytes at a time
    if in_one and x_TD.numel() and x_TD.shape[1] % 8 == 0 and len(w_gate_in_XD) % 16 == 0:
        gate_in_TX, product_TF = in_one(x_TD, w_gate_in_XD)
        return gate_in_TX, True, product_TF
    gate_in_TX = F.linear(x_TD, w_gate_in_XD)
    return gate_in_TX, False, geglu(gate_in_TX)


def why_not_in_one(device: torch.device, dtype: torch.dtype) -> Obstacle | None:
    """Why product and gate are two kernels on this device, or None."""
    return _gated_product_of_quack(device, dtype)[1]


@cache
def _gated_product_of_quack(device: torch.device, dtype: torch.dtype) -> tuple[_GatedProduct | None, Obstacle | None]:
    """quack-kernels' product with the gate in its epilogue, or why it cannot be used; runs it once to check."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return None, Obstacle("unfit", "quack-kernels' gated product is used on compute capability 9 (Hopper) only")
    if dtype not in (torch.bfloat16, torch.float16):
        return None, Obstacle("unfit", f"quack-kernels' gated product computes in 16 bits, not in {dtype}")
    obstacle = import_obstacle("quack.gemm_interface")
    if obstacle:
        return None, obstacle
    try:
        in_one = _configured()
    except Exception as error:  # names and arguments change between versions
        return None, failure(error)
    obstacle = _obstacle(in_one, device, dtype)
    return (None, obstacle) if obstacle else (in_one, None)


def _configured() -> _GatedProduct:
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_gated

    # slightly the fastest of eight on an H100
    config = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)

    def in_one(x_TD: Tensor, w_gate_in_XD: Tensor) -> tuple[Tensor, Tensor]:
        return gemm_gated(x_TD, w_gate_in_XD.T, activation="geglu", concat_layout=("B",), config=config)

    return in_one


def _obstacle(in_one: _GatedProduct, device: torch.device, dtype: torch.dtype) -> Obstacle | None:
    """Why the kernel cannot be used: run it once and compare, since it may not compile here or give wrong results."""
    generator = torch.Generator(device).manual_seed(0)
    x_TD, w_XD = (torch.randn(256, 64, device=device, dtype=dtype, generator=generator) / 3 for _ in range(2))
    expected_TX = F.linear(x_TD, w_XD)
    gate_TF, linear_TF = expected_TX.float().chunk(2, dim=1)
    expected_TF = F.gelu(gate_TF, approximate="tanh") * linear_TF
    try:
        gate_in_TX, product_TF = in_one(x_TD, w_XD)
        found_TX = torch.cat([gate_in_TX[:, 0::2], gate_in_TX[:, 1::2]], dim=1)
        pairs = ((found_TX.float(), expected_TX.float()), (product_TF.float(), expected_TF))
        errors = [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
    except Exception as error:  # compilers raise their own types
        return failure(error)
    if not max(errors) <= _MOST_ERROR:
        return Obstacle("broken", f"wrong results: off by {errors[0]:.1%} and {errors[1]:.1%}")
    return None
