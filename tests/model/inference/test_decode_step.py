"""The fused decoding step against `Transformer.extend` in float64, over a cache whose unused slots are NaN."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from model.config import AdjacentSharing, KVSharing, ModelConfig, NoSharing, TailSharing
from model.inference.decode_step import DecodeStep, DecodeWeights, unsupported
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.transformer import Block, Transformer

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

    def __init__(self, model: Transformer, page_size: int, width: int, n_pages: int | None = None):
        self.model, self.page_size, self.width = model, page_size, width
        self.reference = deepcopy(model).double()
        dtype = model.embed_tokens.weight.dtype
        n_pages = self.n_pages = n_pages or 8 * width
        self.ours = PagedKVCache(model.config, n_pages, page_size, dtype, DEVICE)
        self.exact = PagedKVCache(model.config, n_pages, page_size, torch.float64, DEVICE)

    def fill(self, lengths: list[int], per_kind: bool) -> tuple[dict[str, Tensor] | Tensor, Tensor]:
        """(page tables, slots of the new tokens): tokens before each row's newest are cached, nothing else is."""
        order = torch.randperm(self.n_pages).to(torch.int32)
        table_BP = torch.full((len(lengths), self.width), -1, dtype=torch.int32)
        slots_B = torch.full((len(lengths),), -1)
        seen_S = torch.zeros(self.n_pages * self.page_size, dtype=torch.bool)
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
    tokens_B, lengths_B = torch.tensor([tokens, lengths], dtype=torch.int32, device=DEVICE)
    logits_BV = step(tokens_B, lengths_B, tables)
    rows = [row for row, length in enumerate(lengths) if length]
    assert bool(logits_BV.isfinite().all())
    expected_BV = caches.expected(tokens, lengths, table_BP)
    expected_BV = expected_BV.detach()
    assert float((logits_BV[rows] - expected_BV).norm() / expected_BV.norm()) < tolerance
    written_S = torch.zeros(len(next(iter(before.values()))), dtype=torch.bool, device=DEVICE)
    written_S[slots_B[slots_B >= 0].to(DEVICE)] = True
    for ours, exact in ((caches.ours.k_SGK, caches.exact.k_SGK), (caches.ours.v_SGK, caches.exact.v_SGK)):
        for layer in ours:
            found, expected = ours[layer][written_S].double(), exact[layer][written_S]
            assert float((found - expected).norm() / expected.norm()) < tolerance
    for layer, pool_SGK in caches.ours.k_SGK.items():
        assert torch.equal(pool_SGK[~written_S].nan_to_num(7), before[layer][~written_S].nan_to_num(7))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels on a GPU are for 16 bits")
@pytest.mark.parametrize(
    ("rows", "deterministic", "cap"), [(1, False, 3.0), (1, True, None), (3, False, None), (4, True, 3.0)]
)
@settings(max_examples=4)
@given(data=st.data())
def test_a_step_equals_the_plain_model(rows: int, deterministic: bool, cap: float | None, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    page_size = data.draw(st.sampled_from([16, 4, 1]), "page")
    model = random_model(
        n_kv_heads=data.draw(st.sampled_from([1, 2]), "groups"),
        layers=data.draw(st.sampled_from(["SG", "G", "SGGG"]), "layers"),
        kv_sharing=data.draw(st.sampled_from(SHARINGS), "sharing"),
        final_logit_softcap=cap,
    )
    width = -(-MAX_LENGTH // page_size) + 1
    caches = Caches(model, page_size, width)
    step = DecodeStep(
        model, caches.ours.k_SGK, caches.ours.v_SGK, page_size, rows=rows, width=width, max_length=MAX_LENGTH,
        deterministic=deterministic,
    )  # fmt: skip
    for _ in range(2):  # the same buffers with another composition
        lengths = data.draw(st.lists(st.integers(0, MAX_LENGTH), min_size=rows, max_size=rows), "lengths")
        if any(lengths):
            assert_step(caches, step, lengths, data.draw(st.booleans(), "a table a kind"))


def test_parameters_become_views_of_the_stacked_weights() -> None:
    model = random_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = DecodeWeights(model, MAX_LENGTH)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    block = cast(Block, model.blocks[0])
    attention, feed_forward = block.attention, block.feed_forward
    stacked = weights.layers[0].w_qkv_XD, weights.layers[0].w_gate_in_XD
    for stacked_XD, parts in zip(
        stacked, [(attention.w_q, attention.w_k, attention.w_v), (feed_forward.w_gate, feed_forward.w_in)]
    ):
        assert torch.equal(torch.cat([part.weight for part in parts]), stacked_XD)
        assert {part.weight.untyped_storage().data_ptr() for part in parts} == {stacked_XD.untyped_storage().data_ptr()}


def test_what_is_unsupported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = random_model(d_model=32, n_heads=2, d_head=16, d_ff=48).config
    gpu = torch.device("cuda")
    assert unsupported(config, torch.bfloat16, gpu) is None
    cases: list[tuple[dict[str, int], torch.dtype, torch.device, str]] = [
        ({}, torch.bfloat16, torch.device("cpu"), "CUDA device, not cpu"),
        ({}, torch.float32, gpu, "bfloat16 or float16, not float32"),
        ({"d_head": 256}, torch.bfloat16, gpu, "at most 128, not 256"),
        ({"d_head": 12}, torch.float16, gpu, "multiple of 8 and at most 128, not 12"),
        ({"d_model": 36, "d_ff": 50}, torch.float16, gpu, "d_model=36 and d_ff=50"),
    ]
    for changes, dtype, device, said in cases:
        assert said in str(unsupported(config.model_copy(update=changes), dtype, device))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later, not 7.5" in str(unsupported(config, torch.bfloat16, gpu))


needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
ON_GPU = {"d_model": 256, "n_heads": 4, "d_head": 64, "d_ff": 512, "vocab_size": 512, "window": 20}


@needs_gpu
@pytest.mark.parametrize("rows", [1, 5, 24, 100, 260])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bfloat16_is_near_the_exact_model_and_graphs_follow_the_batch(rows: int, deterministic: bool) -> None:
    torch.manual_seed(rows)
    model = random_model(torch.bfloat16, **ON_GPU, final_logit_softcap=20.0)
    width = MAX_LENGTH // 16
    caches = Caches(model, 16, width, n_pages=rows * width)
    step = DecodeStep(
        model, caches.ours.k_SGK, caches.ours.v_SGK, 16, rows=rows, width=width, max_length=MAX_LENGTH,
        deterministic=deterministic,
    )  # fmt: skip
    batches = [torch.randint(1, MAX_LENGTH + 1, (rows,)).tolist() for _ in range(2)]
    batches[1][rows // 2] = 0 if rows > 1 else 1
    tokens_B, lengths_B = torch.zeros(2, rows, dtype=torch.int32, device=DEVICE)
    table_BP = torch.zeros(rows, width, dtype=torch.int32, device=DEVICE)
    step(tokens_B, lengths_B, table_BP)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_BV = step(tokens_B, lengths_B, table_BP)
    for lengths in batches:
        assert_step(caches, step, lengths, per_kind=True, tolerance=0.03)
        tables, _ = caches.fill(lengths, per_kind=False)
        assert isinstance(tables, Tensor)
        table_BP.copy_(tables)
        tokens_B.copy_(torch.arange(rows) % 512)
        lengths_B.copy_(torch.tensor(lengths))
        poison(step)
        graph.replay()
        replayed_BV = logits_BV.clone()
        used = lengths_B > 0
        assert torch.equal(replayed_BV[used], step(tokens_B, lengths_B, table_BP)[used])


@needs_gpu
def test_deterministic_rows_have_the_same_bits_in_every_bucket() -> None:
    torch.manual_seed(1)
    model = random_model(torch.bfloat16, **ON_GPU, n_kv_heads=2)
    width, most = MAX_LENGTH // 16, 300
    caches = Caches(model, 16, width, n_pages=most * width)
    lengths = torch.randint(1, MAX_LENGTH + 1, (most,)).tolist()
    table_BP, _ = caches.fill(lengths, per_kind=False)
    assert isinstance(table_BP, Tensor)
    tokens_B, lengths_B = torch.arange(most, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    weights = DecodeWeights(model, MAX_LENGTH)
    found = {}
    for rows in (most, 256, 100, 33, 16, 2, 1):
        step = DecodeStep(
            model, caches.ours.k_SGK, caches.ours.v_SGK, 16, rows=rows, width=width, max_length=MAX_LENGTH,
            deterministic=True, weights=weights,
        )  # fmt: skip
        found[rows] = step(tokens_B[:rows].to(DEVICE), lengths_B[:rows].to(DEVICE), table_BP[:rows])
    for rows, logits_BV in found.items():
        assert torch.equal(logits_BV, found[most][:rows]), rows
