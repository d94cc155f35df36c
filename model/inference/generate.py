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


class Generator:
    """Replies of one model, whose weights do not change; its cache and CUDA graphs are kept between calls.

    n_rows: sequences that are decoded together. max_length: most tokens of a prompt and its reply. path: see
    `open_runner`.
    """

    def __init__(self, model: Transformer, n_rows: int, max_length: int, page_size: int = 16, path: Path = "auto"):
        self.model, self.max_length = model, min(max_length, model.config.max_length)
        weight = model.embed_tokens.weight
        # each row has room for the longest sequence, and a page to grow while another waits
        n_pages = n_rows * (-(-self.max_length // page_size) + 1)
        cache = PagedKVCache(model.config, n_pages, page_size, weight.dtype, weight.device)
        self.runner = open_runner(model, cache, n_rows, self.max_length, wants_logprobs=True, path=path)
        self._scheduler = Scheduler(self.runner, None, self._deliver)
        self._logprobs: dict[Request, list[float]] = {}
        self._reasons: dict[Request, FinishReason] = {}
        self._numbers: dict[Request, int] = {}
        self._on_token: Callable[[Step], None] = lambda step: None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n_samples: int = 1,
        on_token: Callable[[Step], None] = lambda step: None,
    ) -> list[list[Completion]]:
        """`n_samples` completions of every prompt; the pages of equal beginnings are computed once and shared.

        Sample j of prompt i is seeded by (sampling.seed, i, j), independent of the rest of the batch. on_token: called
        with every token as soon as it is on the host. Raises ValueError for a prompt that is empty or not shorter than
        max_length, NonFiniteLogits for non-finite logits.
        """
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < self.max_length:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; it must have 1 to {self.max_length - 1} "
                    f"(max_length of the model is {self.model.config.max_length})"
                )
        requests: list[list[Request]] = [[] for _ in prompts]
        for copy in range(n_samples):  # every prompt is in the cache before its second sample starts
            for number, prompt in enumerate(prompts):
                seed = (sampling.seed * 1_000_003 + number) * 1_000_003 + copy
                room = self.max_length - len(prompt)
                own = replace(sampling, seed=seed, max_new_tokens=min(sampling.max_new_tokens, room))
                request = Request(list(prompt), own, after=requests[number][0] if copy else None)
                requests[number].append(request)
                self._logprobs[request], self._numbers[request] = [], number
                self._scheduler.add(request)
        self._on_token = on_token
        try:
            while self._scheduler.has_work:
                self._scheduler.step()
            return [[Completion(r.generated, self._logprobs[r], self._reasons[r]) for r in own] for own in requests]
        finally:
            for request in self._scheduler.unfinished:
                self._scheduler.end(request, "cancelled")
            for kept in (self._logprobs, self._reasons, self._numbers):
                kept.clear()

    def _deliver(self, step: Step) -> None:
        if step.token is None:
            raise step.error or NonFiniteLogits(
                f"the model's logits for token {step.request.n_generated} of a reply to prompt "
                f"{self._numbers[step.request]} are not finite; its weights or activations have overflowed"
            )
        assert step.logprob is not None
        self._logprobs[step.request].append(step.logprob)
        if step.finish_reason is not None:
            self._reasons[step.request] = step.finish_reason
        self._on_token(step)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    n_samples: int = 1,
    page_size: int = 16,
    on_token: Callable[[Step], None] = lambda step: None,
    path: Path = "auto",
) -> list[list[Completion]]:
    """One call of a `Generator` that is as large as these prompts need."""
    if not prompts:
        return []
    longest = max(map(len, prompts)) + max(sampling.max_new_tokens, 1)
    n_rows = min(len(prompts) * n_samples, MAX_ROWS)
    return Generator(model, n_rows, longest, page_size, path).generate(prompts, sampling, n_samples, on_token)
