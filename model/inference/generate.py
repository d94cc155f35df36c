"""Sampling, and batched generation over the paged KV cache; each prompt is prefilled once for all its samples."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.inference.kv_cache import CacheStep, PagedKVCache
from model.transformer import Transformer

FinishReason = Literal["stop", "length"]
NO_TOKEN = -1


class SamplingError(ValueError):
    """A sampling parameter out of range; the message names it."""


class NonFiniteLogits(ValueError):  # noqa: N818 (reads as what happened)
    """Non-finite logits, from which no token can be sampled."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters (nucleus sampling: arXiv 1904.09751). Raises SamplingError for a value out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 disable the filters. Ties with the k-th most likely token are kept, and
    the most likely token is kept for any top_p.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # unlike float(), a comparison accepts integers of any size
        if not 0 <= self.temperature <= sys.float_info.max:
            raise SamplingError(f"temperature is {self.temperature!r}; expected a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p is {self.top_p!r}; expected a number above 0 and at most 1")
        if self.top_k < 0:
            raise SamplingError(f"top_k is {self.top_k!r}; expected 0 (no cut) or more")


@dataclass(frozen=True)
class Completion:
    """Generated ids (including a sampled stop id), and their log-probabilities under the unmodified model."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) for token `position` of a reply; depends on seed and position only."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sampling_probabilities(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Float64 sampling probabilities (B, V), after temperature, top_k and top_p.

    A row is NaN when it has a non-finite logit or all its tokens are forbidden. Temperature 0 splits the mass between
    the most likely tokens.
    """
    allowed_BV = _allowed(logits_BV, samplings).double()
    for row, sampling in enumerate(samplings):
        # before the temperature, since a very high one makes different logits equal
        if 0 < sampling.top_k < allowed_BV.shape[1]:
            allowed_V = allowed_BV[row]
            allowed_V.masked_fill_(allowed_V < allowed_V.topk(sampling.top_k).values[-1], -torch.inf)
    # The best logit is 0 before the division, so that no temperature overflows it, and a tiny one sends the others to
    # -inf. Hardware may take a subnormal number for 0.
    temperatures = [max(float(sampling.temperature), sys.float_info.min) for sampling in samplings]
    temperature_B = torch.tensor(temperatures, dtype=torch.float64, device=allowed_BV.device)
    probabilities_BV = ((allowed_BV - allowed_BV.amax(-1, keepdim=True)) / temperature_B[:, None]).softmax(-1)
    for row, sampling in enumerate(samplings):
        if sampling.top_p < 1:
            probabilities_BV[row] = _nucleus(allowed_BV[row], probabilities_BV[row], sampling.top_p)
    return probabilities_BV


def _allowed(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """A copy of the logits with -inf for forbidden tokens; a row with a non-finite logit becomes NaN."""
    allowed_BV = logits_BV.masked_fill(~logits_BV.isfinite().all(-1, keepdim=True), torch.nan)
    for row, sampling in enumerate(samplings):
        if sampling.forbidden_ids:
            forbidden = torch.tensor(sampling.forbidden_ids, device=allowed_BV.device)
            allowed_BV[row].index_fill_(0, forbidden, -torch.inf)
    return allowed_BV


def _nucleus(logits_V: Tensor, probabilities_V: Tensor, top_p: float) -> Tensor:
    """Renormalized probabilities of the smallest set of most likely tokens with mass >= `top_p` (at least one)."""
    order_V = logits_V.argsort(descending=True, stable=True)
    sorted_V = probabilities_V[order_V]
    mass_V = sorted_V.cumsum(0)
    is_cut_V = torch.cat([torch.zeros_like(mass_V[:1]), mass_V[:-1]]) >= top_p
    is_cut_V[0] = False
    kept_V = torch.empty_like(sorted_V).scatter_(0, order_V, sorted_V.masked_fill(is_cut_V, 0))
    return kept_V / kept_V.sum()


def sample(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(token_B, logprob_B): one token per row, with the row's own parameters and random number (see `uniform`).

    Log-probabilities are the model's own (temperature 1, no filters). Rows are independent; one whose
    `sampling_probabilities` are NaN gets NO_TOKEN and a log-probability of NaN.
    """
    is_greedy_B = torch.tensor([sampling.temperature == 0 for sampling in samplings], device=logits_BV.device)
    if bool(is_greedy_B.all()):
        allowed_BV = _allowed(logits_BV, samplings)
        token_B, is_drawn_B = allowed_BV.argmax(-1), allowed_BV.amax(-1).isfinite()
    else:
        probabilities_BV = sampling_probabilities(logits_BV, samplings)
        token_B = _inverse_cumulative(probabilities_BV, uniforms)
        if bool(is_greedy_B.any()):
            token_B = torch.where(is_greedy_B, probabilities_BV.argmax(-1), token_B)
        is_drawn_B = ~probabilities_BV[:, 0].isnan()  # rows are NaN as a whole
    logprob_B = logits_BV.float().log_softmax(-1).gather(1, token_B[:, None])[:, 0]
    return token_B.where(is_drawn_B, NO_TOKEN), logprob_B.where(is_drawn_B, torch.nan)


def _inverse_cumulative(probabilities_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Inverse transform sampling: each row's first token whose cumulative probability exceeds its random number."""
    cumulative_BV = probabilities_BV.cumsum(-1).masked_fill(probabilities_BV == 0, 0)
    uniform_B = torch.tensor(uniforms, dtype=torch.float64, device=probabilities_BV.device)
    above_BV = cumulative_BV > (uniform_B * cumulative_BV.amax(-1))[:, None]
    return above_BV.byte().argmax(-1)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_samples: int = 1,
    page_size: int = 16,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """`n_samples` completions of every prompt; each prompt is prefilled once and its full pages are shared.

    Sample j of prompt i is seeded by (sampling.seed, i, j), independent of the rest of the batch. on_step: called
    after every decoding step with the number of running sequences. Raises ValueError for a prompt that is empty or not
    shorter than the model's max_length, NonFiniteLogits for non-finite logits.
    """
    if not prompts:
        return []
    device = model.embed_tokens.weight.device
    cache, prompt_pages, longest = _prepare(model, prompts, sampling, n_samples, page_size)
    step = CacheStep.build([(prompt, 0, pages) for prompt, pages in zip(prompts, prompt_pages, strict=True)], device)
    logits_BV = model.logits(model.extend(step, cache))

    running: list[_Sequence] = []
    for number, (prompt, pages, length) in enumerate(zip(prompts, prompt_pages, longest, strict=True)):
        for copy in range(n_samples):
            own = pages if copy == n_samples - 1 else _fork(cache, pages, len(prompt))
            own = own + cache.allocator.allocate(cache.pages_for(length) - len(own))
            seed = (sampling.seed * 1_000_003 + number) * 1_000_003 + copy
            running.append(_Sequence(number, len(prompt), length, own, seed, [], []))
    finished = list(running)
    logits_BV = logits_BV.repeat_interleave(n_samples, dim=0)
    while running:
        uniforms = [uniform(s.seed, len(s.tokens)) for s in running]
        tokens_B, logprobs_B = sample(logits_BV, [sampling] * len(running), uniforms)
        for sequence, token, logprob in zip(running, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            if token == NO_TOKEN:
                raise NonFiniteLogits(
                    f"the model's logits for token {len(sequence.tokens)} of a reply to prompt {sequence.prompt} are "
                    "not finite; its weights or activations have overflowed"
                )
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
        running = [sequence for sequence in running if not sequence.is_done(sampling.stop_ids)]
        if on_step is not None:
            on_step(len(running))
        if running:
            step = CacheStep.build([(s.tokens[-1:], s.n_prompt + len(s.tokens) - 1, s.pages) for s in running], device)
            logits_BV = model.logits(model.extend(step, cache))
    completions: list[list[Completion]] = [[] for _ in prompts]
    for sequence in finished:
        reason: FinishReason = "stop" if sequence.tokens[-1] in sampling.stop_ids else "length"
        completions[sequence.prompt].append(Completion(sequence.tokens, sequence.logprobs, reason))
    return completions


def _prepare(
    model: Transformer, prompts: Sequence[Sequence[int]], sampling: Sampling, n_samples: int, page_size: int
) -> tuple[PagedKVCache, list[list[int]], list[int]]:
    """A cache for all samples, the pages of every prompt, and the maximum length of each prompt's samples.

    Raises ValueError for a prompt that is empty or too long.
    """
    max_length, weight = model.config.max_length, model.embed_tokens.weight
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; it must have 1 to {max_length - 1} "
                f"(max_length of the model is {max_length})"
            )
    longest = [min(len(prompt) + sampling.max_new_tokens, max_length) for prompt in prompts]
    n_pages = sum(-(-length // page_size) * n_samples for length in longest)
    cache = PagedKVCache(model.config, n_pages, page_size, weight.dtype, weight.device)
    return cache, [cache.allocator.allocate(cache.pages_for(len(prompt))) for prompt in prompts], longest


@dataclass
class _Sequence:
    prompt: int
    n_prompt: int
    longest: int
    pages: list[int]
    seed: int
    tokens: list[int]
    logprobs: list[float]

    def is_done(self, stop_ids: tuple[int, ...]) -> bool:
        return self.tokens[-1] in stop_ids or self.n_prompt + len(self.tokens) >= self.longest


def _fork(cache: PagedKVCache, pages: list[int], n_tokens: int) -> list[int]:
    """Pages of a second sequence with the same `n_tokens` tokens: shares full pages, copies a partial last one."""
    n_full = n_tokens // cache.page_size
    cache.allocator.retain(pages[:n_full])
    own = cache.allocator.allocate(len(pages) - n_full)
    for source, target in zip(pages[n_full:], own, strict=True):
        cache.copy_page(source, target)
    return pages[:n_full] + own
