"""Sampling, and batched generation through the paged cache with prompts prefilled once for all their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.kv_cache import CacheStep, PagedKVCache
from model.transformer import Transformer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How a reply is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing (arXiv 1904.09751)."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    forbidden_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Generated ids (the stop id included when it was drawn) and their log-probabilities under the model itself."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def sampling_probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution `sampling` draws from: tempered, then cut to top_k, then to the smallest set of mass top_p."""
    logits_V = logits_V.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        kth = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, float("-inf"))
    probabilities_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True)
        mass_before_V = sorted_V.cumsum(-1) - sorted_V
        probabilities_V[order_V[mass_before_V >= sampling.top_p]] = 0
        probabilities_V = probabilities_V / probabilities_V.sum()
    return probabilities_V


def sample(
    logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """(token_B, logprob_B): one draw a row, each by its own rule and generator, so a batch changes no one's draw.

    The log-probability is the model's own (temperature 1, nothing cut).
    """
    logits_BV = logits_BV.float()
    chosen: list[Tensor] = []
    for logits_V, sampling, generator in zip(logits_BV, samplings, generators, strict=True):
        allowed_V = logits_V
        if sampling.forbidden_ids:
            allowed_V = logits_V.index_fill(0, torch.tensor(sampling.forbidden_ids, device=logits_V.device), -torch.inf)
        if sampling.temperature == 0:
            chosen.append(allowed_V.argmax())
        else:
            chosen.append(torch.multinomial(sampling_probabilities(allowed_V, sampling), 1, generator=generator)[0])
    token_B = torch.stack(chosen)
    return token_B, logits_BV.log_softmax(-1).gather(1, token_B[:, None])[:, 0]


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

    Sample j of prompt i draws from a generator seeded by (sampling.seed, i, j), whatever else is in the batch.
    `on_step` is called after every decoding step with the number of sequences still running.
    Raises ValueError for an empty prompt or one that leaves no room below the model's max_length.
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
            generator = torch.Generator(device=device).manual_seed(seed % 2**63)
            running.append(_Sequence(number, len(prompt), length, own, generator, [], []))
    finished = list(running)
    logits_BV = logits_BV.repeat_interleave(n_samples, dim=0)
    while running:
        tokens_B, logprobs_B = sample(logits_BV, [sampling] * len(running), [s.generator for s in running])
        for sequence, token, logprob in zip(running, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
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
    """A cache with room for all samples, pages for every prompt, and the length that each prompt's samples may reach.

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
    generator: torch.Generator
    tokens: list[int]
    logprobs: list[float]

    def is_done(self, stop_ids: tuple[int, ...]) -> bool:
        return self.tokens[-1] in stop_ids or self.n_prompt + len(self.tokens) >= self.longest


def _fork(cache: PagedKVCache, pages: list[int], n_tokens: int) -> list[int]:
    """Pages of a second sequence with the same `n_tokens` tokens: full pages shared, the last partial one copied."""
    n_full = n_tokens // cache.page_size
    cache.allocator.retain(pages[:n_full])
    own = cache.allocator.allocate(len(pages) - n_full)
    for source, target in zip(pages[n_full:], own, strict=True):
        cache.copy_page(source, target)
    return pages[:n_full] + own
