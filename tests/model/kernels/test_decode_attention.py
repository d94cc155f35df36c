"""Attention over a paged cache, of one token a sequence and of chunks, against float64 and plain indexing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from model.kernels.decode_attention import decode_attention
from model.kernels.decode_plan import DecodePlan
from model.kernels.prefill_attention import prefill_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# relative to the output's norm; products have 16-bit operands, and those of an 8-bit cache are float16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
TOLERANCE_8_BITS = 1e-2


@dataclass
class Case:
    """A paged cache in which every slot that no query may see is NaN, and its exact keys and values."""

    lengths: list[int]
    pages: int
    page: int
    table_BP: Tensor
    k_SGK: Tensor
    v_SGK: Tensor
    scales: tuple[Tensor | None, Tensor | None]
    exact_SGK: tuple[Tensor, Tensor]

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        return self.table_BP[sequence].cpu().long()[positions // self.page] * self.page + positions % self.page


def a_case(
    lengths: Sequence[int], oldest: Sequence[int], page: int, n_groups: int, d_head: int, dtype: torch.dtype,
    cache: str = "same", scale_dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Random pages for sequences that see the positions from `oldest` to their length; table entries beside are -1."""
    used = [(length + page - 1) // page for length in lengths]
    n_pages = sum(used) + 2
    table_BP = torch.full((len(lengths), max([*used, 1]) + 1), -1, dtype=torch.int32)
    order = torch.randperm(n_pages).to(torch.int32)
    seen_S = torch.zeros(n_pages * page, dtype=torch.bool)
    for b, count in enumerate(used):
        table_BP[b, :count] = order[sum(used[:b]) : sum(used[: b + 1])]
        positions = torch.arange(oldest[b], lengths[b])
        seen_S[table_BP[b].long()[positions // page] * page + positions % page] = True
        table_BP[b, : oldest[b] // page] = -1
    pools, scales, exact = [], [], []
    for sign in (1, -1):  # of values of a row: sizes from 1e-3 to 1e3 where there are scales
        x_SGK = torch.randn(n_pages * page, n_groups, d_head)
        scale_SG = None
        if cache == "same":
            x_SGK = x_SGK.to(dtype)
            exact.append(x_SGK.double())
            x_SGK[~seen_S] = NAN
        else:
            if sign < 0:
                x_SGK *= 10 ** (3 * (2 * torch.rand(n_pages * page, n_groups, 1) - 1))
            largest = 127.0 if cache == "int8" else 448.0
            scale_SG = (x_SGK.abs().amax(-1) / largest).to(scale_dtype)
            x_SGK = (x_SGK / scale_SG.float()[..., None]).clamp(-largest, largest)
            x_SGK = (x_SGK.round() if cache == "int8" else x_SGK).to(EIGHT_BITS[cache])
            exact.append(x_SGK.double() * scale_SG.double()[..., None])
            scale_SG[~seen_S] = NAN
            x_SGK.view(torch.uint8)[~seen_S] = 0x7F  # NaN in e4m3
            scale_SG = scale_SG.to(DEVICE)
        pools.append(x_SGK.to(DEVICE))
        scales.append(scale_SG)
    return Case(
        list(lengths), n_pages, page, table_BP.to(DEVICE), pools[0], pools[1], (scales[0], scales[1]),
        (exact[0], exact[1]),
    )  # fmt: skip


def exact_attention(case: Case, sequence: int, q_HK: Tensor, oldest: int, newest: int, scale: float) -> Tensor:
    """Attention of one token over the positions from `oldest` to `newest`, in float64."""
    slots = case.slots(sequence, torch.arange(oldest, newest + 1))
    repeats = len(q_HK) // case.k_SGK.shape[1]
    k_MHK, v_MHK = (x_SGK[slots].repeat_interleave(repeats, 1) for x_SGK in case.exact_SGK)
    weights_HM = (torch.einsum("hk,mhk->hm", q_HK.double().cpu(), k_MHK) * scale).softmax(-1)
    return torch.einsum("hm,mhk->hk", weights_HM, v_MHK)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, cache: str) -> None:
    """Each row's error is small, measured by the row's norm."""
    errors = (found.double().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)
    tolerance = TOLERANCE[dtype] if cache == "same" else TOLERANCE_8_BITS
    assert not errors.isnan().any() and (not errors.numel() or float(errors.max()) <= 2 * tolerance)
    assert not errors.numel() or float(errors.mean()) <= tolerance


def decode(case: Case, q_BHK: Tensor, plan: DecodePlan, scale: float = 1.0) -> Tensor:
    """`decode_attention` with buffers that were full of NaN, and a work list of nonsense."""
    plan.partial_IHK.fill_(NAN)
    plan.partial_lse_IH.fill_(NAN)
    for buffer in (plan.items_I4, plan.program_items_P8, plan.sequence_items_B2):
        buffer.fill_(1 << 29)
    plan.update(torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE))
    out_BHK = torch.full_like(q_BHK, NAN)
    decode_attention(
        q_BHK, case.k_SGK, case.v_SGK, case.table_BP, case.page, plan, *case.scales, scale=scale, out_BHK=out_BHK
    )
    return out_BHK


def oldest_of(lengths: Sequence[int], window: int | None) -> list[int]:
    return [max(0, length - window) if window else 0 for length in lengths]


@settings(max_examples=12 if DEVICE.type == "cpu" else 40)
@given(data=st.data())
def test_one_token_a_sequence(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.one_of(st.integers(0, 90), st.integers(0, 900)), min_size=1, max_size=4), "lengths")
    window = data.draw(st.one_of(st.none(), st.integers(1, 300)), "window")
    page = data.draw(st.sampled_from([1, 3, 16, 32, 64, 128]), "page")
    n_groups = data.draw(st.sampled_from([1, 2]), "groups")
    n_heads = n_groups * data.draw(st.sampled_from([1, 2, 5, 16, 32 // n_groups]), "heads of a group")
    d_head = data.draw(st.sampled_from([12, 64, 128]), "d_head")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), "dtype")
    cache = data.draw(st.sampled_from(["same", "int8", "fp8"]), "cache")
    scale_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "scale dtype")
    deterministic = data.draw(st.booleans(), "deterministic")
    tile = data.draw(st.sampled_from([32, 64, 128]), "tile")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    oldest = oldest_of(lengths, window)
    case = a_case(lengths, oldest, page, n_groups, d_head, dtype, cache, scale_dtype)
    q_BHK = torch.randn(len(lengths), n_heads, d_head, device=DEVICE).to(dtype)
    plan = DecodePlan(
        len(lengths), n_heads, n_groups, d_head, 900, window, deterministic, case.k_SGK.dtype, tile,
        n_programs=data.draw(st.sampled_from([1, 4, 40]), "programs"), device=DEVICE,
    )  # fmt: skip
    plan.merges = data.draw(st.booleans(), "merges") and not deterministic
    out_BHK = decode(case, q_BHK, plan, scale=d_head**-0.5)
    if plan.merges:  # nothing of a launch is left to the next
        assert torch.equal(decode(case, q_BHK, plan, scale=d_head**-0.5), out_BHK)
    for b, length in enumerate(lengths):
        if length:
            expected = exact_attention(case, b, q_BHK[b], oldest[b], length - 1, d_head**-0.5)
            assert_near(out_BHK[b], expected, dtype, cache)
        else:
            assert not out_BHK[b].any()


@pytest.mark.parametrize("cache", ["same", "int8", "fp8"])
def test_every_length_to_300_and_odd_ones_beyond(cache: str) -> None:
    if cache != "same" and DEVICE.type == "cpu":
        pytest.skip("the interpreter takes a minute")
    torch.manual_seed(1)
    lengths = [*range(302), 1023, 1025, 2049, 4001]
    dtype = torch.float32 if cache == "same" else torch.float16
    case = a_case(lengths, [0] * len(lengths), 128, 1, 16, dtype, cache)
    q_BHK = torch.randn(len(lengths), 1, 16, device=DEVICE).to(dtype)
    out_BHK = decode(case, q_BHK, DecodePlan(len(lengths), 1, 1, 16, 4001, tile=128, device=DEVICE))
    for b, length in enumerate(lengths[1:], 1):
        assert_near(out_BHK[b], exact_attention(case, b, q_BHK[b], 0, length - 1, 1.0), dtype, cache)


@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=2, max_size=5), window=st.sampled_from([None, 100]),
    cache=st.sampled_from(["same", "int8"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_deterministic_rows_do_not_depend_on_the_batch(
    lengths: list[int], window: int | None, cache: str, seed: int
) -> None:
    torch.manual_seed(seed)
    lengths = [1500, *lengths]
    case = a_case(lengths, oldest_of(lengths, window), 16, 1, 16, torch.float16, cache)
    q_BHK = torch.randn(len(lengths), 3, 16, device=DEVICE).half()
    arguments = (3, 1, 16, 2000, window, True)
    together_BHK = decode(case, q_BHK, DecodePlan(len(lengths), *arguments, n_programs=64, device=DEVICE))
    for b in (0, len(lengths) - 1):
        alone = Case(**{**vars(case), "lengths": lengths[b : b + 1], "table_BP": case.table_BP[b : b + 1]})
        plan = DecodePlan(1, *arguments, n_programs=64, device=DEVICE)
        assert torch.equal(decode(alone, q_BHK[b : b + 1], plan)[0], together_BHK[b])


@settings(max_examples=25)
@given(data=st.data())
def test_items_cover_what_each_sequence_sees_in_equal_shares(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3000), min_size=1, max_size=9), "lengths")
    window = data.draw(st.one_of(st.none(), st.integers(1, 400)), "window")
    deterministic = data.draw(st.booleans(), "deterministic")
    tile = data.draw(st.sampled_from([16, 64]), "tile")
    plan = DecodePlan(len(lengths), 1, 1, 16, 3000, window, deterministic, tile=tile, n_programs=6, device=DEVICE)
    plan.items_I4.fill_(-7)
    plan.update(torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    items = plan.items_I4.tolist()
    programs = plan.program_items_P8[:, :2].tolist()
    n_items = sum(count for _, count in programs)
    assert n_items <= len(items)
    for (first, count), copied in zip(programs, plan.program_items_P8[:, 4:].tolist(), strict=True):
        assert not count or copied == items[first]
    listed = [number for first, count in programs for number in range(first, first + count)]
    assert sorted(listed) == list(range(n_items))
    for b, (first, count) in enumerate(plan.sequence_items_B2.tolist()):
        mine = items[first : first + count]
        assert all(sequence == b and parts == count for sequence, _, _, parts in mine)
        edges = [begin for _, begin, _, _ in mine] + [end for _, _, end, _ in mine[-1:]]
        assert [end for _, _, end, _ in mine] == edges[1:] and edges == sorted(set(edges))
        assert not any(edge % tile for edge in edges[1:-1])
        assert (edges[0], edges[-1]) == (oldest_of(lengths, window)[b], lengths[b]) if lengths[b] else not mine
    if not deterministic:
        n_tiles = [-(-n // tile) - first // tile for n, first in zip(lengths, oldest_of(lengths, window))]
        tiles = [-(-end // tile) - begin // tile for _, begin, end, _ in items[:n_items]]
        shares = [sum(tiles[first : first + count]) for first, count in programs]
        most = max([-(-sum(tiles) // plan.n_programs)] + [-(-n // 32) for n in n_tiles] * plan.merges)
        assert max(shares) <= most


@pytest.mark.parametrize("max_length", [1, 300, 32768, 32769, 100_000] + [3 << 20] * (DEVICE.type == "cuda"))
def test_a_plan_holds_the_items_of_the_longest_sequences(max_length: int) -> None:
    """Not always the longest has the most items."""
    plan = DecodePlan(2, 1, 1, 16, max_length, deterministic=True, device=DEVICE)
    plan.update(torch.tensor([max_length, min(max_length, 64 * 512)], dtype=torch.int32, device=DEVICE))
    assert 2 * int(plan.sequence_items_B2[:, 1].max()) < len(plan.items_I4)


@settings(max_examples=10)
@given(data=st.data())
def test_chunks_of_new_tokens(data: st.DataObject) -> None:
    sizes = st.tuples(st.one_of(st.integers(0, 9), st.integers(0, 70)), st.integers(0, 150))
    chunks = data.draw(st.lists(sizes, min_size=1, max_size=3), "new and cached tokens")
    window = data.draw(st.one_of(st.none(), st.integers(1, 150)), "window")
    page = data.draw(st.sampled_from([1, 3, 16, 64, 128]), "page")
    n_groups = data.draw(st.sampled_from([1, 2]), "groups")
    n_heads = n_groups * data.draw(st.sampled_from([1, 3, 16, 40]), "heads of a group")
    d_head = data.draw(st.sampled_from([12, 64]), "d_head")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), "dtype")
    cache = data.draw(st.sampled_from(["same", "int8", "fp8"]), "cache")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    lengths = [new + cached for new, cached in chunks]
    oldest = [max(0, cached + 1 - window) if window else 0 for _, cached in chunks]
    case = a_case(lengths, [min(pair) for pair in zip(oldest, lengths)], page, n_groups, d_head, dtype, cache)
    starts = [sum(new for new, _ in chunks[:b]) for b in range(len(chunks) + 1)]
    q_THK = torch.randn(starts[-1] + 2, n_heads, d_head, device=DEVICE).to(dtype)  # two rows of no sequence
    out_THK = torch.full_like(q_THK, NAN)
    prefill_attention(
        q_THK, case.k_SGK, case.v_SGK, case.table_BP, page, torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE), window, *case.scales, scale=d_head**-0.5,
        out_THK=out_THK,
    )  # fmt: skip
    for b, (new, cached) in enumerate(chunks):
        for i in range(new):
            first = max(0, cached + i + 1 - window) if window else 0
            expected = exact_attention(case, b, q_THK[starts[b] + i], first, cached + i, d_head**-0.5)
            assert_near(out_THK[starts[b] + i], expected, dtype, cache)
    assert out_THK[starts[-1] :].isnan().all()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_replayed_graph_follows_the_lengths(deterministic: bool) -> None:
    torch.manual_seed(2)
    batches = [[900, 5, 0, 64], [1, 700, 333, 900], [0, 0, 0, 1]]
    case = a_case([900] * 4, [0] * 4, 16, 1, 128, torch.bfloat16)
    plan = DecodePlan(4, 16, 1, 128, 900, None, deterministic, device=DEVICE)
    q_BHK = torch.randn(4, 16, 128, device=DEVICE).bfloat16()
    lengths_B = torch.tensor(batches[0], dtype=torch.int32, device=DEVICE)
    out_BHK = torch.empty_like(q_BHK)

    def step() -> None:
        plan.update(lengths_B)
        decode_attention(q_BHK, case.k_SGK, case.v_SGK, case.table_BP, 16, plan, out_BHK=out_BHK)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in batches:
        lengths_B.copy_(torch.tensor(lengths, dtype=torch.int32))
        out_BHK.fill_(NAN)
        graph.replay()
        replayed_BHK = out_BHK.clone()
        step()
        assert torch.equal(replayed_BHK, out_BHK) and not out_BHK.isnan().any()
        for b, length in enumerate(lengths):
            if length:
                expected = exact_attention(case, b, q_BHK[b], 0, length - 1, 1.0)
                assert_near(out_BHK[b], expected, torch.bfloat16, "same")
