"""The optimizer: which parameters decay, and AdamW's settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from recipes.loader import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Section):
    """AdamW (arXiv 1711.05101). Matrices decay; norms, embeddings and biases do not."""

    kind: Literal["adamw"]
    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clipping: PositiveFloat = 1.0


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices outside the embedding with `weight_decay`, everything else without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (decayed if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, settings: AdamW) -> torch.optim.Optimizer:
    """A fused AdamW over `module`; its learning rate is set anew at every step by the loop."""
    return torch.optim.AdamW(
        parameter_groups(module, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
