"""The whole model against a plain loop over layers, positions and heads, and its attention back ends as one model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention_ops import Backend, Documents
from model.config import AdjacentSharing, KVSharing, ModelConfig, NoSharing, TailSharing
from model.transformer import Transformer

VOCAB = 19
SHARINGS: list[KVSharing] = [
    NoSharing(),
    AdjacentSharing(kind="adjacent", group=2),
    AdjacentSharing(kind="adjacent", group=3),
    TailSharing(kind="tail", n_layers=3),
]


def model_of(attention: Backend, seed: int, **changes: Any) -> Transformer:
    """A float64 model with random norms: at one, many a misplaced norm would go unseen."""
    base = ModelConfig(
        vocab_size=VOCAB, d_model=12, n_layers=6, n_heads=4, d_head=6, d_ff=10, layers="SSG", window=3,
        rope_theta_local=20.0, rope_theta_global=300.0, max_length=64,
    )  # fmt: skip
    model = Transformer(ModelConfig(**{**dict(base), **changes}), attention, seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def norm(x_K: Tensor, scale_K: Tensor | float) -> Tensor:
    return x_K / (x_K.square().mean() + 1e-6).sqrt() * scale_K


def rotated(x_K: Tensor, position: int, theta: float) -> Tensor:
    half = len(x_K) // 2
    turned = [Tensor()] * len(x_K)
    for pair in range(half):
        angle = position * theta ** (-2 * pair / len(x_K))
        first, second = x_K[pair], x_K[pair + half]
        turned[pair] = first * math.cos(angle) - second * math.sin(angle)
        turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return torch.stack(turned)


def plain_attention(
    config: ModelConfig, weights: dict[str, Tensor], kind: str, keys_values: list[Any], xs: list[Tensor]
) -> list[Tensor]:
    """One layer's attention, query by query and head by head; makes the keys and values where the list is empty."""
    theta = config.rope_theta_local if kind == "S" else config.rope_theta_global
    if not keys_values:
        for position, x_D in enumerate(xs):
            k_GK, v_GK = ((weights[f"w_{name}.weight"] @ x_D).view(-1, config.d_head) for name in "kv")
            keys = [rotated(norm(k_K, weights["k_norm.weight"]), position, theta) for k_K in k_GK]
            keys_values.append((keys, [norm(v_K, 1.0) for v_K in v_GK]))
    outs = []
    for position, x_D in enumerate(xs):
        oldest = max(0, position - config.window + 1) if kind == "S" else 0
        heads = []
        for head, q_K in enumerate((weights["w_q.weight"] @ x_D).view(-1, config.d_head)):
            q_K = rotated(norm(q_K, weights["q_norm.weight"]), position, theta)
            group = head * config.n_kv_heads // config.n_heads
            seen = [(keys[group], values[group]) for keys, values in keys_values[oldest : position + 1]]
            odds = [torch.exp(q_K @ k_K) for k_K, _ in seen]
            heads.append(sum(odd * v_K for odd, (_, v_K) in zip(odds, seen, strict=True)) / sum(odds))
        outs.append(weights["w_o.weight"] @ torch.cat(heads))
    return outs


def plain_logits(config: ModelConfig, parameters: dict[str, Tensor], tokens: list[int], group: int) -> Tensor:
    """logits_LV of one document; every `group` layers of a kind, counted from the first, use the first one's keys."""
    embed_VD = parameters["embed_tokens.weight"]
    xs = [embed_VD[token] * math.sqrt(config.d_model) for token in tokens]
    so_far: dict[str, int] = {"S": 0, "G": 0}
    keys_values: dict[str, list[Any]] = {}
    for layer in range(config.n_layers):
        kind, prefix = config.layers[layer % len(config.layers)], f"blocks.{layer}."
        weights = {name.removeprefix(prefix): p for name, p in parameters.items() if name.startswith(prefix)}
        of_attention = {name.removeprefix("attention."): p for name, p in weights.items()}
        if so_far[kind] % group == 0:
            keys_values[kind] = []
        so_far[kind] += 1
        normed = [norm(x_D, weights["attention_norm_in.weight"]) for x_D in xs]
        attended = plain_attention(config, of_attention, kind, keys_values[kind], normed)
        xs = [x + norm(out, weights["attention_norm_out.weight"]) for x, out in zip(xs, attended, strict=True)]
        for place, x_D in enumerate(xs):
            normed_D = norm(x_D, weights["ff_norm_in.weight"])
            gate_F = weights["feed_forward.w_gate.weight"] @ normed_D
            gate_F = 0.5 * gate_F * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate_F + 0.044715 * gate_F**3)))
            out_D = weights["feed_forward.w_out.weight"] @ (gate_F * (weights["feed_forward.w_in.weight"] @ normed_D))
            xs[place] = x_D + norm(out_D, weights["ff_norm_out.weight"])
    logits_LV = torch.stack([embed_VD @ norm(x_D, parameters["final_norm.weight"]) for x_D in xs])
    cap = config.final_logit_softcap
    return logits_LV if cap is None else cap * torch.tanh(logits_LV / cap)


@settings(max_examples=12, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3]),
    pattern=st.text("SG", max_size=5).map(lambda text: text + "G"),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 8),
    softcap=st.sampled_from([None, 2.0]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_adjacent_sharing_is_a_plain_loop(
    group: int, pattern: str, n_kv_heads: int, window: int, softcap: float | None, lengths: list[int], seed: int
) -> None:
    sharing = NoSharing() if group == 1 else AdjacentSharing(kind="adjacent", group=group)
    model = model_of(
        "sdpa", seed, layers=pattern, n_layers=6 // len(pattern) * len(pattern), n_kv_heads=n_kv_heads, window=window,
        kv_sharing=sharing, final_logit_softcap=softcap,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    direction_TV = torch.randn(sum(lengths), VOCAB, generator=generator, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    found_TV = model.logits(model(tokens_T, Documents.from_lengths(lengths)))
    expected_TV = torch.cat(
        [plain_logits(model.config, parameters, tokens_L.tolist(), group) for tokens_L in tokens_T.split(lengths)]
    )
    # the tables of the rotation are float32, whatever the model is
    torch.testing.assert_close(found_TV, expected_TV, rtol=1e-5, atol=1e-5)
    found, expected = (
        torch.autograd.grad((logits_TV * direction_TV).sum(), list(parameters.values()), materialize_grads=True)
        for logits_TV in (found_TV, expected_TV)
    )
    whole = torch.stack([gradient.norm() for gradient in expected]).norm()
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7 * whole, name


def results(
    backend: Backend, lengths: list[int], row_length: int | None, sharing: KVSharing, n_kv_heads: int, window: int,
    seed: int, differentiate: bool,
) -> list[Tensor]:  # fmt: skip
    """Hidden states of packed documents, and the gradients of all weights."""
    model = model_of(backend, seed, kv_sharing=sharing, n_kv_heads=n_kv_heads, window=window, d_head=16)
    generator = torch.Generator().manual_seed(seed)
    tokens_T = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    direction_TD = torch.randn(sum(lengths), 12, generator=generator, dtype=torch.float64)
    with torch.set_grad_enabled(differentiate):
        hidden_TD = model(tokens_T, Documents.from_lengths(lengths, row_length))
    if not differentiate:
        return [hidden_TD]
    return [hidden_TD.detach(), *torch.autograd.grad((hidden_TD * direction_TD).sum(), list(model.parameters()))]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    in_rows=st.booleans(),
    sharing=st.sampled_from(SHARINGS),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_back_ends_are_one_model(
    backend: Backend, rows: list[list[int]], in_rows: bool, sharing: KVSharing, n_kv_heads: int, window: int, seed: int
) -> None:
    """Ragged and empty documents; flex has no backward pass on a CPU, so there only its forward pass is compared."""
    row_length = max(max(sum(row) for row in rows), 1)
    lengths = [length for row in rows for length in (*row, row_length - sum(row))]
    row, differentiate = row_length if in_rows else None, backend != "flex"
    arguments = (lengths, row, sharing, n_kv_heads, window, seed, differentiate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.attention_ops.why_not", lambda *_: None)  # flex is refused on a CPU: it is slow
        found = results(backend, *arguments)
    expected = results("reference", *arguments)
    whole = torch.stack([tensor.norm() for tensor in expected]).norm()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-6 * whole
