"""Products with adjacent weights as one matrix, and weight gradients accumulated in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def product(left_XT: Tensor, right_TY: Tensor) -> Tensor:
    """left @ right with a float32 result, for any dtype of the factors."""
    if left_XT.dtype != torch.float32 and left_XT.device.type == "cuda":
        return torch.mm(left_XT, right_TY, out_dtype=torch.float32)
    return (left_XT @ right_TY).float()


def add_product(total_XY: Tensor, left_XT: Tensor, right_TY: Tensor) -> None:
    """total += left @ right in float32, in place, for any dtype of the factors."""
    if left_XT.dtype == total_XY.dtype:
        total_XY.addmm_(left_XT, right_TY)
    elif left_XT.device.type == "cuda":
        torch.addmm(total_XY, left_XT, right_TY, out_dtype=torch.float32, out=total_XY)
    else:
        total_XY += left_XT @ right_TY


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """The matrices (of equal width) stacked: a view if they are adjacent in memory, else a copy.

    In an engine's flat buffer, a module's consecutive weights are adjacent.
    """
    view = _as_one(matrices)
    return torch.cat(list(matrices)) if view is None else view


def weight_gradients(weights: Sequence[Tensor], grad_TX: Tensor, input_TY: Tensor) -> list[Tensor | None]:
    """The gradients grad^T input of weights stacked along X.

    If the weights have a float32 `main_grad`, the product accumulates there and None is returned for each, which saves
    writing and reading 16-bit gradients.
    """
    sizes = [len(weight) for weight in weights]
    sums: list[Tensor] = [weight.main_grad for weight in weights if hasattr(weight, "main_grad")]
    if len(sums) < len(weights):
        return list((grad_TX.T @ input_TY).split(sizes))
    whole_XY = _as_one(sums)
    if whole_XY is not None:
        add_product(whole_XY, grad_TX.T, input_TY)
    else:
        for total_XY, part_TX in zip(sums, grad_TX.split(sizes, dim=1), strict=True):
            add_product(total_XY, part_TX.T, input_TY)
    return [None] * len(weights)


def scaled_gradient(weight: Tensor, gradient: Tensor, scale: Tensor) -> Tensor | None:
    """A float32 gradient (overwritten) times a scalar, in the weight's dtype; None if added to `main_grad`."""
    if hasattr(weight, "main_grad"):
        weight.main_grad.addcmul_(gradient, scale)
        return None
    return gradient.mul_(scale).to(weight.dtype)


def _as_one(matrices: Sequence[Tensor]) -> Tensor | None:
    """A view of matrices that are adjacent in one storage; None if they are not."""
    first, width = matrices[0], matrices[0].shape[1]
    end = first.storage_offset()
    for matrix in matrices:
        same = matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and matrix.is_contiguous() and matrix.storage_offset() == end):
            return None
        end += matrix.numel()
    n_rows = sum(len(matrix) for matrix in matrices)
    return first.detach().as_strided((n_rows, width), (width, 1), first.storage_offset())
