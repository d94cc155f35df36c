"""A fused block is the plain block: values, gradients of every parameter and of shared keys, sums in float32."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_ops import Documents, why_not
from model.config import AdjacentSharing, ModelConfig, NoSharing, TailSharing
from model.execution import ExecutionError, Recompute, shape_blocks
from model.transformer import Transformer

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECOMPUTE: list[Recompute] = ["none", "elementwise", "block"]
SHARING = [NoSharing(), TailSharing(kind="tail", n_layers=2), AdjacentSharing(kind="adjacent", group=2)]


def model_of(sharing: Any, fused: bool, recompute: Recompute = "none", **changes: Any) -> Transformer:
    """A decoder whose norms are not at their initial scale, the same whatever the execution."""
    sizes = {"vocab_size": 37, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_head": 12, "d_ff": 40, "window": 3}
    form = {"n_layers": 4, "layers": "SG", "kv_sharing": sharing, "max_length": 64}
    config = ModelConfig(**{**sizes, **form, **changes})
    model = Transformer(config, "sdpa", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    for block in model.blocks:
        block.fused, block.recompute = fused, recompute
    return model.to(DEVICE)


def run(model: Transformer, lengths: list[int]) -> list[Tensor]:
    """Hidden states, and the gradients of all parameters of a random projection of them."""
    generator = torch.Generator().manual_seed(3)
    tokens_T = torch.randint(1, model.config.vocab_size, (sum(lengths),), generator=generator).to(DEVICE)
    direction_TD = torch.randn(sum(lengths), model.config.d_model, generator=generator)
    hidden_TD = model(tokens_T, Documents.from_lengths(lengths, device=DEVICE))
    parameters = list(model.parameters())
    total = (hidden_TD * direction_TD.to(hidden_TD)).sum()
    return [hidden_TD.detach(), *torch.autograd.grad(total, parameters)]


def distances(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """The difference of each pair of tensors, as a share of the expected one's norm."""
    pairs = zip(found, expected, strict=True)
    return [float((ours.double() - theirs.double()).norm() / theirs.double().norm()) for ours, theirs in pairs]


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("sharing", SHARING, ids=lambda sharing: sharing.kind)
def test_it_computes_what_the_plain_block_does(sharing: Any, recompute: Recompute) -> None:
    lengths = [5, 0, 7, 1]
    expected = run(model_of(sharing, fused=False), lengths)
    assert max(distances(run(model_of(sharing, fused=True, recompute=recompute), lengths), expected)) < 2e-5


@pytest.mark.parametrize("adjacent_sums", [True, False])
def test_gradients_are_added_to_the_engines_float32_sums(adjacent_sums: bool) -> None:
    """Where an engine offers `main_grad`, twice the gradient is there after two passes, and no `.grad`."""
    lengths = [4, 7]
    expected = run(model_of(NoSharing(), fused=True), lengths)[1:]
    model = model_of(NoSharing(), fused=True)
    weights = [parameter for block in model.blocks for parameter in block.parameters()]
    flat = torch.zeros(sum(weight.numel() for weight in weights), device=DEVICE)
    for weight, part in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        total = part.view(weight.shape) if adjacent_sums else torch.zeros_like(weight)
        weight.main_grad = total  # type: ignore[attr-defined]
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        tokens_T = torch.randint(1, 37, (11,), generator=generator).to(DEVICE)
        direction_TD = torch.randn(11, 24, generator=generator).to(DEVICE)
        (model(tokens_T, Documents.from_lengths(lengths, device=DEVICE)) * direction_TD).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        total = getattr(parameter, "main_grad", None)
        assert (total is None) == (parameter.grad is not None)
        found = parameter.grad if total is None else total
        assert found is not None
        assert (found - 2 * gradient).norm() <= 1e-4 * gradient.norm()


def test_without_gradients_it_keeps_nothing() -> None:
    with torch.no_grad():
        model = model_of(NoSharing(), fused=True)
        hidden_TD = model(torch.arange(1, 9, device=DEVICE), Documents.from_lengths([8], device=DEVICE))
    assert hidden_TD.grad_fn is None


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("backend", ["flash_attn_4", "varlen", "sdpa"])
@pytest.mark.parametrize("sharing", SHARING, ids=lambda sharing: sharing.kind)
def test_sixteen_bits_are_no_further_from_float32_than_the_plain_block(sharing: Any, backend: Any) -> None:
    if reason := why_not(backend, DEVICE, torch.bfloat16):
        pytest.skip(f"{backend}: {reason}")
    sizes = {"vocab_size": 512, "d_model": 512, "n_heads": 8, "n_kv_heads": 1, "d_head": 64, "d_ff": 1408}
    lengths = [513, 0, 300, 77, 6, 0, 128]
    models = {fused: model_of(sharing, fused, window=100, max_length=1024, **sizes).bfloat16() for fused in (0, 1)}
    exact = run(models[0].float(), lengths)
    for model in models.values():
        model.attention_backend = backend
    # over all tensors: one alone may be nearer by chance
    plain, fused = (mean(distances(run(models[number].bfloat16(), lengths), exact)) for number in (0, 1))
    assert fused <= 1.05 * plain


def test_what_cannot_be_is_said() -> None:
    model = model_of(NoSharing(), fused=False)
    cpu = torch.device("cpu")
    assert shape_blocks(model.blocks, "auto", "none", 2, cpu) == "plain"
    assert [block.recompute for block in model.blocks] == ["block", "block", "none", "none"]
    for execution, recompute, blocks, message in (
        ("fused", "none", 0, "its kernels need a GPU, not cpu"),
        ("auto", "elementwise", 0, "engine.recompute=elementwise needs fused blocks"),
        ("plain", "none", 5, "engine.recompute_blocks=5: the model has 4 blocks"),
    ):
        with pytest.raises(ExecutionError, match=message):
            shape_blocks(model.blocks, execution, recompute, blocks, cpu)  # type: ignore[arg-type]
