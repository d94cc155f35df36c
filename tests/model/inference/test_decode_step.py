"""The fused decoding step against `Transformer.extend` in float64, over a cache whose unused slots are NaN."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from model.config import AdjacentSharing, KVSharing, ModelConfig, NoSharing, TailSharing
from model.inference.decode_step import DecodeStep
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.transformer import Transformer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
MAX_LENGTH = 48
SHARINGS: list[KVSharing] = [
    NoSharing(),
    TailSharing(kind="tail", n_layers=2),
    AdjacentSharing(kind="adjacent", group=2),
]


def random_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    """A model with random norms: with all at one, a misplaced norm would not show."""
    base = ModelConfig(
        vocab_size=43, d_model=24, n_layers=4, n_heads=4, d_head=8, d_ff=40, layers="SGSG", window=5,
        rope_theta_local=20.0, rope_theta_global=300.0, max_length=MAX_LENGTH,
    )  # fmt: skip
    model = Transformer(ModelConfig(**{**dict(base), **changes}), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(DEVICE, dtype)


class Caches:
    """Equal caches of the step and of a float64 reference: random pages, NaN in every slot that holds no token."""

    def __init__(self, model: Transformer, page_size: int, width: int):
        self.model, self.page_size, self.width = model, page_size, width
        self.reference = deepcopy(model).double()
        dtype = model.embed_tokens.weight.dtype
        n_pages = 8 * width
        self.ours = PagedKVCache(model.config, n_pages, page_size, dtype, DEVICE)
        self.exact = PagedKVCache(model.config, n_pages, page_size, torch.float64, DEVICE)

    def fill(self, lengths: list[int], per_kind: bool) -> tuple[dict[str, Tensor] | Tensor, Tensor]:
        """(page tables, slots of the new tokens): tokens before each row's newest are cached, nothing else is."""
        order = torch.randperm(8 * self.width).to(torch.int32)
        table_BP = torch.full((len(lengths), self.width), -1, dtype=torch.int32)
        slots_B = torch.full((len(lengths),), -1)
        seen_S = torch.zeros(8 * self.width * self.page_size, dtype=torch.bool)
        for row, length in enumerate(lengths):
            used = -(-length // self.page_size)
            table_BP[row, :used], order = order[:used], order[used:]
            positions = torch.arange(length)
            slots = table_BP[row].long()[positions // self.page_size] * self.page_size + positions % self.page_size
            if length:
                slots_B[row] = slots[-1]
                seen_S[slots[:-1]] = True
        for pools in ("k_SGK", "v_SGK"):
            for layer, pool_SGK in getattr(self.ours, pools).items():
                pool_SGK.copy_(torch.randn(pool_SGK.shape).to(pool_SGK))
                pool_SGK[~seen_S.to(DEVICE)] = NAN
                getattr(self.exact, pools)[layer].copy_(pool_SGK)
        table_BP = table_BP.to(DEVICE)
        kinds = sorted(set(self.model.config.layer_kinds))
        return {kind: table_BP.clone() for kind in kinds} if per_kind else table_BP, slots_B

    def expected(self, tokens: list[int], lengths: list[int], table_BP: Tensor) -> Tensor:
        """logits_BV of the rows with a length, in float64; their keys and values are written."""
        rows = [row for row, length in enumerate(lengths) if length]
        used = [(table_BP[row, : -(-lengths[row] // self.page_size)].tolist(), row) for row in rows]
        step = CacheStep.build([([tokens[row]], lengths[row] - 1, pages) for pages, row in used], DEVICE)
        return self.reference.logits(self.reference.extend(step, self.exact))


def poison(step: DecodeStep) -> None:
    """Fill the step's buffers with NaN."""
    for value in (*vars(step).values(), *step.parts.values()):
        if isinstance(value, Tensor):
            value.fill_(NAN)


def assert_step(caches: Caches, step: DecodeStep, lengths: list[int], per_kind: bool, tolerance: float = 2e-4) -> None:
    """One step equals the reference in logits and cache, and writes nothing but the newest tokens' slots."""
    tables, slots_B = caches.fill(lengths, per_kind)
    table_BP = next(iter(tables.values())) if isinstance(tables, dict) else tables
    tokens = [row * 7 % caches.model.config.vocab_size if length else -1 for row, length in enumerate(lengths)]
    before = {layer: pool_SGK.clone() for layer, pool_SGK in caches.ours.k_SGK.items()}
    poison(step)
    on_device = {"dtype": torch.int32, "device": DEVICE}
    logits_BV = step(torch.tensor(tokens, **on_device), torch.tensor(lengths, **on_device), tables)
    rows = [row for row, length in enumerate(lengths) if length]
    assert bool(logits_BV.isfinite().all())
    expected_BV = caches.expected(tokens, lengths, table_BP)
    assert float((logits_BV[rows] - expected_BV).norm() / expected_BV.norm()) < tolerance
    written_S = torch.zeros(len(next(iter(before.values()))), dtype=torch.bool, device=DEVICE)
    written_S[slots_B[slots_B >= 0].to(DEVICE)] = True
    for ours, exact in ((caches.ours.k_SGK, caches.exact.k_SGK), (caches.ours.v_SGK, caches.exact.v_SGK)):
        for layer in ours:
            found, expected = ours[layer][written_S].double(), exact[layer][written_S]
            assert float((found - expected).norm() / expected.norm()) < tolerance
    for layer, pool_SGK in caches.ours.k_SGK.items():
        assert torch.equal(pool_SGK[~written_S].nan_to_num(7), before[layer][~written_S].nan_to_num(7))


@settings(max_examples=4 if DEVICE.type == "cpu" else 40)
@given(data=st.data())
def test_a_step_equals_the_plain_model(data: st.DataObject) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("kernels on a GPU are for 16 bits")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    rows = data.draw(st.sampled_from([1, 1, 2, 3, 5]), "rows")
    page_size = data.draw(st.sampled_from([1, 4, 16]), "page")
    model = random_model(
        n_kv_heads=data.draw(st.sampled_from([1, 2]), "groups"),
        layers=data.draw(st.sampled_from(["SG", "G", "SGGG"]), "layers"),
        kv_sharing=data.draw(st.sampled_from(SHARINGS), "sharing"),
        final_logit_softcap=data.draw(st.sampled_from([None, 3.0]), "cap"),
    )
    width = -(-MAX_LENGTH // page_size) + 1
    caches = Caches(model, page_size, width)
    step = DecodeStep(
        model, caches.ours.k_SGK, caches.ours.v_SGK, page_size, rows=rows, width=width, max_length=MAX_LENGTH,
        deterministic=data.draw(st.booleans(), "deterministic"),
    )  # fmt: skip
    for _ in range(2):  # the same buffers with another composition
        lengths = data.draw(st.lists(st.integers(0, MAX_LENGTH), min_size=rows, max_size=rows), "lengths")
        if any(lengths):
            assert_step(caches, step, lengths, data.draw(st.booleans(), "a table a kind"))
