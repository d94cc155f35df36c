"""The optimizer: AdamW for everything, or Muon for the blocks' matrices with AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import nn

from model.transformer import Block
from recipes.loader import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Section):
    """AdamW (arXiv 1711.05101). Weight decay applies to matrices, not to norms, embeddings and biases."""

    kind: Literal["adamw"]
    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    gradient_clipping: PositiveFloat = 1.0


class Muon(Section):
    """Muon (arXiv 2502.16982) for the matrices of the blocks; AdamW for embeddings, norms and heads.

    All singular values of an update are near lr * sqrt(max(1, rows / columns)), for any gradient norm. `lr` and
    `momentum` apply to the blocks' matrices, `adamw_*` to the rest, `weight_decay` to all matrices.
    """

    kind: Literal["muon"]
    lr: PositiveFloat
    momentum: Beta = 0.95
    weight_decay: NonNegativeFloat = 0.1
    gradient_clipping: PositiveFloat = 1.0
    adamw_lr: PositiveFloat
    adamw_beta1: Beta = 0.9
    adamw_beta2: Beta = 0.95
    adamw_eps: PositiveFloat = 1e-8

    def obstacle(self, precision: str, zero_stage: int) -> str | None:
        """Why Muon does not work with this precision and ZeRO stage, or None.

        Only DeepSpeed's bfloat16 optimizer with float32 accumulation (stage 1) clips *before* it orthogonalizes. The
        others clip the orthogonalized update, which rescales it arbitrarily, and report its norm as the gradient norm,
        so that `gradient_clipping` has no meaning.
        """
        if precision == "bfloat16" and zero_stage == 1:
            return None
        return (
            f"optimizer.kind muon needs precision bfloat16 and zero_stage 1, found {precision} and {zero_stage}: "
            "elsewhere DeepSpeed clips the orthogonalized update instead of the gradient. Change these, or use "
            "optimizer.kind adamw"
        )


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]


@dataclass(frozen=True)
class ParameterRoles:
    """The parameters of a module, by how the optimizer treats them."""

    block_matrices: list[nn.Parameter] = field(default_factory=list)
    """Linear layers of blocks: with weight decay, and orthogonalized by Muon."""
    head_matrices: list[nn.Parameter] = field(default_factory=list)
    """Other linear layers, such as a reward model's head: with weight decay."""
    others: list[nn.Parameter] = field(default_factory=list)
    """Embeddings, norms and biases: without weight decay."""


def parameter_roles(module: nn.Module) -> ParameterRoles:
    """Classify by the modules that hold the parameters, not by their names or shapes."""
    blocks = [block for block in module.modules() if isinstance(block, Block)]
    in_block = {id(linear.weight) for block in blocks for linear in _linears(block)}
    matrices = {id(linear.weight) for linear in _linears(module)}
    roles = ParameterRoles()
    for parameter in module.parameters():
        if id(parameter) in in_block:
            roles.block_matrices.append(parameter)
        else:
            (roles.head_matrices if id(parameter) in matrices else roles.others).append(parameter)
    return roles


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def build_optimizer(module: nn.Module, settings: AdamW | Muon) -> torch.optim.Optimizer:
    """The optimizer of `module`, with parameter groups at their peak learning rates."""
    roles = parameter_roles(module)
    _import_muon(is_compiled=isinstance(settings, Muon) and roles.others[0].is_cuda)
    return _adamw(roles, settings) if isinstance(settings, AdamW) else _muon(roles, settings)


def _adamw(roles: ParameterRoles, settings: AdamW) -> torch.optim.Optimizer:
    groups = [
        {"params": [*roles.block_matrices, *roles.head_matrices], "weight_decay": settings.weight_decay},
        {"params": roles.others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def _import_muon(is_compiled: bool) -> None:
    """Import DeepSpeed's Muon, which DeepSpeed does whatever the optimizer is, with or without torch.compile.

    Compiling its Newton-Schulz iteration on a CPU takes a C++ compiler and a minute, and gains nothing; the import of
    the compiler alone takes a second of every start.
    """
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    if not is_compiled:
        compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function


def _muon(roles: ParameterRoles, settings: Muon) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = {
        "use_muon": True,
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        "ns_method": "gram",
    }
    rest: dict[str, Any] = {
        "use_muon": False,
        "lr": settings.adamw_lr,
        "betas": (settings.adamw_beta1, settings.adamw_beta2),
        "eps": settings.adamw_eps,
    }
    groups = [
        {"params": roles.block_matrices, **muon},
        {"params": roles.head_matrices, **rest, "weight_decay": settings.weight_decay},
        {"params": roles.others, **rest, "weight_decay": 0.0},
    ]
    return MuonWithAuxAdam(
        [group for group in groups if group["params"]], torch.optim.AdamW, {"lr": settings.adamw_lr, "fused": True}
    )
