"""Batched generation: replies to many prompts, by the scheduler and runner that serve requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import Path, open_runner
from model.inference.sampling import Sampling
from model.inference.scheduler import FinishReason, Scheduler, Step
from model.transformer import Transformer

MAX_ROWS = 256
"""Sequences that are decoded together."""


class NonFiniteLogits(ValueError):  # noqa: N818 (reads as what happened)
    """Non-finite logits, from which no token can be sampled."""


@dataclass(frozen=True)
class Completion:
    """Generated ids (including a sampled stop id), and their log-probabilities under the unmodified model."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_samples: int = 1,
    page_size: int = 16,
    on_token: Callable[[Step], None] = lambda step: None,
    path: Path = "auto",
) -> list[list[Completion]]:
    """`n_samples` completions of every prompt; the pages of equal beginnings are computed once and shared.

    Sample j of prompt i is seeded by (sampling.seed, i, j), independent of the rest of the batch. on_token: called with
    every token as soon as it is on the host. path: see `open_runner`. Raises ValueError for a prompt that is empty or
    not shorter than the model's max_length, NonFiniteLogits for non-finite logits.
    """
    if not prompts:
        return []
    max_length = model.config.max_length
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) < max_length:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens; it must have 1 to {max_length - 1} "
                f"(max_length of the model is {max_length})"
            )
    longest = [min(len(prompt) + sampling.max_new_tokens, max_length) for prompt in prompts]
    n_rows = min(len(prompts) * n_samples, MAX_ROWS)
    # as many pages as the longest sequences need at the same time, and one for each to grow
    n_pages = sum(sorted(-(-length // page_size) + 1 for length in longest for _ in range(n_samples))[-n_rows:])
    weight = model.embed_tokens.weight
    cache = PagedKVCache(model.config, n_pages, page_size, weight.dtype, weight.device)
    logprobs: dict[Request, list[float]] = {}
    reasons: dict[Request, FinishReason] = {}

    def deliver(step: Step) -> None:
        if step.token is None:
            raise step.error or NonFiniteLogits(
                f"the model's logits for token {step.request.n_generated} of a reply to prompt "
                f"{_number_of(step.request, requests)} are not finite; its weights or activations have overflowed"
            )
        assert step.logprob is not None
        logprobs.setdefault(step.request, []).append(step.logprob)
        if step.finish_reason is not None:
            reasons[step.request] = step.finish_reason
        on_token(step)

    runner = open_runner(model, cache, n_rows, max(longest), wants_logprobs=True, path=path)
    scheduler = Scheduler(runner, runner.max_prefill_tokens, deliver)
    requests: list[list[Request]] = [[] for _ in prompts]
    for copy in range(n_samples):  # every prompt is in the cache before its second sample starts
        for number, prompt in enumerate(prompts):
            seed = (sampling.seed * 1_000_003 + number) * 1_000_003 + copy
            own = replace(sampling, seed=seed, max_new_tokens=longest[number] - len(prompt))
            request = Request(list(prompt), own, after=requests[number][0] if copy else None)
            requests[number].append(request)
            scheduler.add(request)
    while scheduler.has_work:
        scheduler.step()
    return [[Completion(r.generated, logprobs[r], reasons[r]) for r in own] for own in requests]


def _number_of(request: Request, requests: Sequence[Sequence[Request]]) -> int:
    return next(number for number, own in enumerate(requests) if request in own)
