"""Sampling: every value gives the distribution of a plain float64 reference, and no row changes another."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.inference.generate import NO_TOKEN, Sampling, SamplingError, sample, sampling_probabilities, uniform

LARGEST, SMALLEST = sys.float_info.max, 5e-324
TEMPERATURES = (
    st.floats(0, LARGEST)
    | st.integers(0, 10**308)
    | st.sampled_from([0, -0.0, SMALLEST, 1e-320, 1e-45, 1e-40, 1e-8, 0.7, 1, 2, 1e38, 1e40, LARGEST])
)
TOP_P = st.floats(0, 1, exclude_min=True) | st.sampled_from([SMALLEST, 1e-46, 1e-9, 0.5, 1 - 2**-53, 1])
TOP_K = st.integers(0, 8) | st.sampled_from([10**30])
LOGITS = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -1e30, 1e30, 3.4e38, -3.4e38, 1e-45])
ROWS = st.lists(LOGITS, min_size=6, max_size=6)


def sampling(temperature: float, top_k: int, top_p: float, forbidden: tuple[int, ...] = ()) -> Sampling:
    return Sampling(1, (), temperature, top_k, top_p, forbidden_ids=forbidden)


SAMPLINGS = st.builds(sampling, TEMPERATURES, TOP_K, TOP_P, st.sampled_from([(), (0,), (0, 3)]))


def reference(logits: list[float], rule: Sampling) -> list[float]:
    """Python floats and sorting: temper, cut to top_k, normalize, cut to the smallest set of mass top_p, normalize."""
    allowed = {i: logit for i, logit in enumerate(logits) if i not in rule.forbidden_ids}
    ranked = sorted(allowed, key=lambda i: (-allowed[i], i))
    if rule.top_k:
        ranked = [i for i in ranked if allowed[i] >= allowed[ranked[min(rule.top_k, len(ranked)) - 1]]]
    best = allowed[ranked[0]]
    weights = []
    for i in ranked:
        difference = allowed[i] - best
        if difference == 0:
            weights.append(1.0)
        elif rule.temperature == 0:
            weights.append(0.0)
        else:
            weights.append(math.exp(max(difference / rule.temperature, -1e300)))
    probabilities, mass = [0.0] * len(logits), 0.0
    for i, weight in zip(ranked, weights, strict=True):
        if mass / sum(weights) >= rule.top_p and mass > 0:
            break
        probabilities[i] = weight
        mass += weight
    return [p / mass for p in probabilities]


@settings(max_examples=120, deadline=None)
@given(rows=st.lists(st.tuples(ROWS, SAMPLINGS), min_size=1, max_size=4))
def test_probabilities_are_the_reference_s(rows: list[tuple[list[float], Sampling]]) -> None:
    rules = [rule for _, rule in rows]
    found_BV = sampling_probabilities(torch.tensor([logits for logits, _ in rows]), rules)
    for found_V, (logits, rule) in zip(found_BV.tolist(), rows, strict=True):
        exact = torch.tensor(logits).tolist()
        expected = reference(exact, rule)
        # where rounding decides whether one more token enters the set of mass top_p, both sets are right
        if [p > 0 for p in found_V] == [p > 0 for p in expected]:
            assert found_V == pytest.approx(expected, rel=1e-9, abs=1e-12)
        else:
            whole = reference(exact, sampling(rule.temperature, rule.top_k, 1, rule.forbidden_ids))
            ours, theirs = (sum(w for w, p in zip(whole, side) if p) for side in (found_V, expected))
            assert ours == pytest.approx(theirs, abs=1e-9) or min(ours, theirs) == pytest.approx(rule.top_p, abs=1e-9)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(
        st.tuples(ROWS, SAMPLINGS, st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 1 - 2**-53])),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_draws_are_likely_tokens_and_rows_are_independent(rows: list[tuple[list[float], Sampling, float]]) -> None:
    logits, rules, uniforms = zip(*rows)
    # beside rows that no token can be drawn from
    broken: list[Any] = [[math.nan] * 6, [0, math.inf, 0, 0, 0, 0], [0, 0, -math.inf, 0, 0, 0], [0] * 6]
    nothing = sampling(1, 0, 1, tuple(range(6)))
    logits_BV = torch.tensor([*broken, *logits])
    token_B, logprob_B = sample(
        logits_BV, [sampling(1, 0, 0.5), sampling(0, 0, 1), sampling(1, 2, 1), nothing, *rules], [0.5] * 4 + [*uniforms]
    )
    assert token_B[:4].tolist() == [NO_TOKEN] * 4
    assert logprob_B[:4].isnan().all()
    for row, (rule, number) in enumerate(zip(rules, uniforms, strict=True), start=4):
        alone_V, alone_logprob = sample(logits_BV[row : row + 1], [rule], [number])
        assert token_B[row] == alone_V[0]
        assert torch.equal(logprob_B[row], alone_logprob[0])
        probabilities_V = sampling_probabilities(logits_BV[row : row + 1], [rule])[0]
        assert probabilities_V[token_B[row]] > 0
        if rule.temperature == 0:
            best = [-math.inf if i in rule.forbidden_ids else logit for i, logit in enumerate(logits_BV[row].tolist())]
            assert token_B[row] == best.index(max(best))


def test_frequencies() -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0])
    rule = sampling(0.8, 0, 0.95, (4,))
    expected = reference(logits_V.tolist(), rule)
    n = 3_000
    token_B, _ = sample(logits_V.expand(n, -1), [rule] * n, [uniform(7, position) for position in range(n)])
    found = torch.bincount(token_B, minlength=5) / n
    for p, q in zip(found.tolist(), expected, strict=True):
        assert abs(p - q) <= 5 * math.sqrt(q * (1 - q) / n)


def test_numbers_depend_on_seed_and_position_only() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, 10, -1, 2**70) for position in (0, 1, 11)}
    assert len(numbers) == 15
    assert all(0 <= number < 1 for number in numbers)
    assert uniform(1, 11) == uniform(1, 11) != uniform(11, 1)


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
