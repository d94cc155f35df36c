"""The sampling kernel against the plain sampler: tokens, log-probabilities, and the state of every row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from model.inference.rows import Rows, RowStart
from model.inference.sampler import FAILED, advance, sample
from model.inference.sampling import Sampling
from model.kernels import sample as sample_kernel
from model.kernels.sample import sample_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 37
RULES = st.builds(
    Sampling,
    max_new_tokens=st.integers(1, 3),
    stop_ids=st.sampled_from([(), (3,), tuple(range(VOCAB))]),
    temperature=st.sampled_from([0.0, 1e-40, 1e-3, 0.7, 1.0, 3.0, 1e40]),
    top_k=st.sampled_from([0, 1, 2, 5, VOCAB, 10**30]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
    forbidden_ids=st.sampled_from([(), (0,), (5, 36)]),
)


def rows_of(rules: list[Sampling], n_drawn: list[int]) -> Rows:
    rows = Rows(len(rules), VOCAB, DEVICE)
    starts = {row: RowStart(rule, n_drawn[row], rule.max_new_tokens) for row, rule in enumerate(rules)}
    rows.assign(starts)
    return rows


@settings(max_examples=12, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    block=st.sampled_from([16, 64]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    given_rows=st.booleans(),
)
def test_draws_what_the_plain_sampler_draws(
    rules: list[Sampling], seed: int, block: int, spread: float, given_rows: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = len(rules)
    # rounded, so that there are ties
    logits_BV = (torch.randn(n, VOCAB, generator=generator) * spread * 4).round() / 4
    logits_BV[0, 7] = {0: math.nan, 1: math.inf, 2: -math.inf}.get(seed % 7, logits_BV[0, 7])
    logits_BV = logits_BV.to(DEVICE)
    length_B = torch.randint(0, 3, (n,), generator=generator, dtype=torch.int32).to(DEVICE)
    n_drawn = torch.randint(0, 50, (n,), generator=generator).tolist()
    ours, plain = rows_of(rules, n_drawn), rows_of(rules, n_drawn)
    for rows in (ours, plain):
        rows.length_R.copy_(length_B)
    result_3R = torch.full((3, n), 99, dtype=torch.int32, device=DEVICE)
    token_B, logprob_B = sample(logits_BV, plain, wants_logprobs=True)
    assert logprob_B is not None
    finish_B = advance(plain, token_B)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_kernel, "_BLOCK", block)
        if given_rows:
            # in another order, and beside one that is padding
            order = torch.randperm(n, generator=generator).to(DEVICE)
            ours.length_R.fill_(0)
            rows_B = torch.cat([order, order.new_tensor([-1])]).int()
            lengths_B = torch.cat([length_B[order], length_B.new_tensor([5])])
            padded_BV = torch.cat([logits_BV[order], torch.full_like(logits_BV[:1], math.nan)])
            sample_rows(padded_BV, ours, result_3R, rows_B, lengths_B, wants_logprobs=True)
        else:
            sample_rows(logits_BV, ours, result_3R, wants_logprobs=True)
    for row in range(n):
        if length_B[row] == 0:
            assert result_3R[:, row].tolist() == [99] * 3
            assert ours.length_R[row] == 0 and ours.n_drawn_R[row] == n_drawn[row]
            continue
        token, finish, bits = result_3R[:, row].tolist()
        if token != token_B[row]:  # where rounding decides: on the edge between two tokens, or of the nucleus
            assert not torch.equal(logits_BV[row].isfinite().all(), torch.tensor(False))
            assert near_an_edge(rules[row], logits_BV[row].cpu(), plain, row, token, int(token_B[row]))
            continue
        assert finish == finish_B[row]
        found = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        torch.testing.assert_close(found, logprob_B[row].cpu(), rtol=1e-5, atol=1e-5, equal_nan=True)
        assert torch.equal(ours.state_FR[:4, row], plain.state_FR[:4, row])
        assert (finish == FAILED) == bool(logprob_B[row].isnan())


def near_an_edge(rule: Sampling, logits_V: torch.Tensor, plain: Rows, row: int, ours: int, theirs: int) -> bool:
    """Whether a change of the random number or of top_p by float32's rounding makes the plain sampler draw `ours`."""
    from model.inference import sampler

    drawn = plain.n_drawn_R[row : row + 1].cpu() - 1
    number = sampler.uniform(plain.seed_R[row : row + 1].cpu(), drawn)
    for shift in (-1e-6, 0.0, 1e-6):
        for top_p in (rule.top_p, min(rule.top_p * (1 + 1e-6), 1.0), rule.top_p * (1 - 1e-6)):
            near = Rows(1, VOCAB)
            values = {**rule.__dict__, "top_p": top_p}
            near.assign({0: RowStart(Sampling(**values), 0, 1)})
            with pytest.MonkeyPatch.context() as patch:
                moved = (number + shift).clamp(0, 1 - 2**-53)
                patch.setattr(sampler, "uniform", lambda seed_B, position_B, moved=moved: moved)
                if sampler.sample(logits_V[None], near)[0].item() == ours:
                    return True
    return False


def test_frequencies_of_a_filtered_distribution() -> None:
    n = 1000 if DEVICE.type == "cuda" else 150
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 5.0, *[-9.0] * (VOCAB - 5)], device=DEVICE)
    rules = [Sampling(9, (), 0.8, 3, 0.95, seed=seed, forbidden_ids=(4,)) for seed in range(n)]
    rows = rows_of(rules, [2] * n)
    rows.length_R.fill_(4)
    result_3R = torch.empty(3, n, dtype=torch.int32, device=DEVICE)
    sample_rows(logits_V.expand(n, -1).contiguous(), rows, result_3R)
    expected = (torch.tensor([2.0, 1.0, 0.0]).double() / 0.8).softmax(-1)
    kept = expected[:2] / expected[:2].sum() if expected[:2].sum() >= 0.95 else expected
    found = torch.bincount(result_3R[0].cpu(), minlength=VOCAB) / n
    assert found[len(kept) :].sum() == 0
    for p, q in zip(found.tolist(), kept.tolist(), strict=False):
        assert abs(p - q) <= 5 * math.sqrt(q * (1 - q) / n)
