"""Sampling: every value gives the distribution of a plain float64 reference, and no row changes another."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.inference import sampler
from model.inference.rows import Rows, RowStart
from model.inference.sampler import CONTINUES, FAILED, FULL, NO_TOKEN, STOPPED, advance, sample, uniform
from model.inference.sampling import Sampling, SamplingError

LARGEST, SMALLEST = sys.float_info.max, 5e-324
TEMPERATURES = (
    st.floats(0, LARGEST)
    | st.integers(0, 10**308)
    | st.sampled_from([0, -0.0, SMALLEST, 1e-320, 1e-45, 1e-40, 1e-8, 0.7, 1, 2, 1e38, 1e40, LARGEST])
)
TOP_P = st.floats(0, 1, exclude_min=True) | st.sampled_from([SMALLEST, 1e-46, 1e-9, 0.5, 1 - 2**-53, 1])
TOP_K = st.integers(0, 8) | st.sampled_from([10**30])
LOGITS = st.integers(-(2**20), 2**20).map(lambda n: n * 2.0**-15) | st.sampled_from(
    [0.0, 1.0, -1e30, 1e30, 1e38, -1e38]
)
ROWS = st.lists(LOGITS, min_size=6, max_size=6)
UNIFORMS = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53])


def sampling(temperature: float, top_k: int, top_p: float, forbidden: tuple[int, ...] = ()) -> Sampling:
    return Sampling(1, (), temperature, top_k, top_p, forbidden_ids=forbidden)


SAMPLINGS = st.builds(sampling, TEMPERATURES, TOP_K, TOP_P, st.sampled_from([(), (0,), (0, 3)]))


def rows_of(rules: list[Sampling], vocab_size: int = 6, n_drawn: int = 0) -> Rows:
    rows = Rows(len(rules), vocab_size)
    rows.assign({row: RowStart(rule, n_drawn, rule.max_new_tokens) for row, rule in enumerate(rules)})
    return rows


def reference(logits: list[float], rule: Sampling, top_p: float) -> list[float]:
    """Python floats and sorting: temper, cut to top_k, normalize, cut to the smallest set of mass top_p, with ties."""
    allowed = {i: logit for i, logit in enumerate(logits) if i not in rule.forbidden_ids}
    ranked = sorted(allowed, key=lambda i: (-allowed[i], i))
    if rule.top_k:
        ranked = [i for i in ranked if allowed[i] >= allowed[ranked[min(rule.top_k, len(ranked)) - 1]]]
    best = allowed[ranked[0]]
    # float32 holds no higher temperature, and one that is that low is greedy
    temperature = min(rule.temperature, torch.finfo(torch.float32).max) if rule.temperature > 1e-30 else 0
    weights = [math.exp(max((allowed[i] - best) / temperature, -1e300)) if temperature else 1.0 for i in ranked]
    if not temperature:
        return [float(i == ranked[0]) for i in range(len(logits))]
    probabilities, mass, last = [0.0] * len(logits), 0.0, math.inf
    for i, weight in zip(ranked, weights, strict=True):
        if mass / sum(weights) >= top_p and mass > 0 and allowed[i] < last:
            break
        probabilities[i], last = weight, allowed[i]
        mass += weight
    return [p / mass for p in probabilities]


def agrees(token: int, number: float, logits: list[float], rule: Sampling) -> bool:
    """Whether `number` draws the token: to float32's rounding, which may also decide on the last token of top_p."""
    for top_p in (rule.top_p, rule.top_p * (1 + 1e-5), rule.top_p * (1 - 1e-5)):
        probabilities = reference(logits, rule, top_p)
        low = sum(probabilities[:token])
        if probabilities[token] > 0 and low - 1e-5 <= number <= low + probabilities[token] + 1e-5:
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(ROWS, SAMPLINGS, UNIFORMS), min_size=1, max_size=4), block=st.sampled_from([1, 4, 256]))
def test_draws_are_the_reference_s_and_rows_are_independent(
    rows: list[tuple[list[float], Sampling, float]], block: int
) -> None:
    # beside rows that no token can be drawn from
    broken: list[Any] = [[math.nan] * 6, [0, math.inf, 0, 0, 0, 0], [0, 0, -math.inf, 0, 0, 0], [0] * 6]
    nothing = sampling(1, 0, 1, tuple(range(6)))
    rules = [sampling(1, 0, 0.5), sampling(0, 0, 1), sampling(1, 2, 1), nothing, *(rule for _, rule, _ in rows)]
    logits_BV = torch.tensor([*broken, *(logits for logits, _, _ in rows)])
    numbers = torch.tensor([0.5] * 4 + [number for _, _, number in rows], dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "_BLOCK", block)
        patch.setattr(sampler, "uniform", lambda seed_B, position_B: numbers[: len(seed_B)])
        token_B, logprob_B = sample(logits_BV, rows_of(rules), wants_logprobs=True)
        assert logprob_B is not None
        assert token_B[:4].tolist() == [NO_TOKEN] * 4
        assert logprob_B[:4].isnan().all()
        for row, (logits, rule, number) in enumerate(rows, start=4):
            assert agrees(int(token_B[row]), number, torch.tensor(logits).tolist(), rule)
            numbers = torch.tensor([number], dtype=torch.float64)
            alone_B, alone_logprob_B = sample(logits_BV[row : row + 1], rows_of([rule]), wants_logprobs=True)
            assert alone_logprob_B is not None
            assert token_B[row] == alone_B[0]
            assert torch.equal(logprob_B[row], alone_logprob_B[0])
            expected = logits_BV[row].double().log_softmax(-1)[token_B[row]]
            torch.testing.assert_close(logprob_B[row].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_nucleus_of_more_tokens_than_are_sorted_first(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.linspace(0, 1, 5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(1))]
    sorted_V, order_V = logits_V.double().softmax(-1).sort(descending=True)
    n_kept = int((sorted_V.cumsum(-1) < top_p).sum()) + 1
    kept = set(order_V[:n_kept].tolist())
    n = 400
    rules = [Sampling(1, (), 1.0, 0, top_p, seed=seed) for seed in range(n)]
    token_B, _ = sample(logits_V.expand(n, -1), rows_of(rules, 5000))
    drawn = token_B.tolist()
    assert len({token for token in drawn if token not in kept}) <= 1, "rounding may add the next one"
    assert len(set(drawn)) > 0.9 * n * (1 - n / n_kept)
    ranks = torch.argsort(order_V)[token_B.long()]
    assert (ranks > 0.8 * n_kept).any(), "the least likely ones too"


def test_frequencies() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    n = 3_000
    rules = [Sampling(1, (), 0.8, 0, 0.95, seed=seed, forbidden_ids=(4,)) for seed in range(n)]
    expected = reference(logits_V.tolist(), rules[0], 0.95)
    for n_drawn in (0, 7):
        token_B, _ = sample(logits_V.expand(n, -1), rows_of(rules, 5, n_drawn))
        found = torch.bincount(token_B, minlength=5) / n
        for p, q in zip(found.tolist(), expected, strict=True):
            assert abs(p - q) <= 5 * math.sqrt(q * (1 - q) / n)


def test_random_numbers() -> None:
    """Uniform, uncorrelated over seeds and positions, and the published generator's (seed 1234567)."""
    first = uniform(torch.tensor([1234567]), torch.tensor([0]))
    assert first.item() == (6457827717110365317 >> 11) * 2.0**-53
    seeds, positions = torch.arange(300).repeat_interleave(300), torch.arange(300).repeat(300)
    rows = rows_of([Sampling(1, (), seed=seed) for seed in range(300)])
    numbers = uniform(rows.seed_R.repeat_interleave(300), positions).view(300, 300)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert len(numbers.unique()) == 90_000
    assert abs(numbers.mean() - 0.5) < 5 / math.sqrt(12 * 90_000)
    for a, b in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(a.numel())
    assert len(seeds) == 90_000


def test_seeds_of_any_size() -> None:
    seeds = [0, 1, 10, -1, 2**70, 2**70 + 1]
    rows = rows_of([Sampling(1, (), seed=seed) for seed in seeds])
    assert len(set(rows.seed_R.tolist())) == len(seeds)
    assert rows.seed_R.tolist() == rows_of([Sampling(1, (), seed=seed) for seed in seeds]).seed_R.tolist()


def state(rows: Rows) -> list[Tensor]:
    return [rows.token_R, rows.length_R, rows.n_left_R, rows.n_drawn_R]


def test_advance() -> None:
    """Ends with a stop token before the length, without a token before either; ended rows are idle."""
    rows = Rows(5, 8)
    rule = Sampling(3, (6, 7))
    rows.assign({row: RowStart(rule, 2, n_left) for row, n_left in enumerate([3, 3, 1, 1, 3])})
    rows.length_R[:] = torch.tensor([10, 20, 30, 40, 50])
    finish_B = advance(rows, torch.tensor([5, 7, 5, 6, NO_TOKEN], dtype=torch.int32))
    assert finish_B.tolist() == [CONTINUES, STOPPED, FULL, STOPPED, FAILED]
    token_R, length_R, n_left_R, n_drawn_R = (field.tolist() for field in state(rows))
    assert (token_R, length_R) == ([5, 7, 5, 6, NO_TOKEN], [11, 0, 0, 0, 0])
    assert (n_left_R, n_drawn_R) == ([2, 2, 0, 0, 2], [3] * 5)


def test_selected_rows_are_the_rows_in_this_order() -> None:
    rules = [Sampling(1, (), temperature=number) for number in (0.0, 1.0, 0.0, 2.0)]
    rows = rows_of(rules)
    some = rows.select([3, 0])
    assert (some.temperature_R.tolist(), some.samplings) == ([2.0, 0.0], [rules[3], rules[0]])
    assert not some.all_greedy and rows.select([2, 0]).all_greedy
    first = rows.select([0, 1])
    first.length_R[:] = 9
    assert rows.length_R.tolist() == [9, 9, 0, 0], "the first rows are a view"
    rows.clear([1])
    assert rows.length_R.tolist() == [9, 0, 0, 0]
    assert rows.select([1, 2]).all_greedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1e-9), ("temperature", math.nan), ("temperature", math.inf), ("temperature", 10**400),
        ("top_p", 0), ("top_p", -0.0), ("top_p", 1.1), ("top_p", math.nan), ("top_k", -1),
    ],
)  # fmt: skip
def test_values_without_meaning_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(SamplingError, match=f"^{field} is"):
        Sampling(1, (), **{field: value})
