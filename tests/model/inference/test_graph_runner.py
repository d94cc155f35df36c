"""On a GPU: graphs of the fused path against the plain path in float32, whatever the batch, the chunks and the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig, NoSharing, TailSharing
from model.inference.generate import generate
from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import open_runner
from model.inference.sampling import Sampling
from model.inference.scheduler import Scheduler, Step
from model.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
VOCAB = 512


def tiny(sharing: Any, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCAB, d_model=128, n_layers=6, n_heads=4, d_head=32, d_ff=256, layers="SSG", window=20,
        kv_sharing=sharing, max_length=512,
    )  # fmt: skip
    model = Transformer(config, seed=3)
    with torch.no_grad():  # farther apart than rounding, so that greedy tokens can be compared
        model.embed_tokens.weight *= 3
    return model.to("cuda", dtype)


def run(
    scheduler: Scheduler, steps: list[Step], requests: list[Request], arrivals: dict[int, int]
) -> dict[Request, list[int]]:
    """Add request i before step arrivals[i], and run to the end."""
    number = 0
    while scheduler.has_work or number <= max(arrivals.values()):
        for i, at in arrivals.items():
            if at == number:
                scheduler.add(requests[i])
        scheduler.step()
        number += 1
        assert number < 3000, "no progress"
    return {request: request.generated for request in requests}


def scheduler_of(
    model: Transformer, path: Any, n_pages: int, n_rows: int = 6, chunk: int = 40, deterministic: bool = False
) -> tuple[Scheduler, list[Step]]:
    cache = PagedKVCache(model.config, n_pages, 16, model.embed_tokens.weight.dtype, "cuda")
    for pool in (*cache.k_SGK.values(), *cache.v_SGK.values()):
        pool.fill_(float("nan"))
    steps: list[Step] = []
    runner = open_runner(model, cache, n_rows, 512, path=path, deterministic=deterministic)
    return Scheduler(runner, chunk, steps.append), steps


def requests_of(n: int, seed: int, temperature: float, n_new: int = 24) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    stem = torch.randint(5, VOCAB, (48,), generator=generator).tolist()
    requests = []
    for number in range(n):
        tail = torch.randint(5, VOCAB, (int(torch.randint(1, 90, (1,), generator=generator)),), generator=generator)
        rule = Sampling(n_new - number % 5, (3,), temperature, top_k=40 * (number % 2), seed=number)
        requests.append(Request([*stem[: 16 * (number % 4)], *tail.tolist()], rule))
    return requests


def margin_of(model: Transformer, tokens: list[int], n_prompt: int, at: int) -> float:
    """Difference of the two largest logits where token `at` of a reply is drawn, on the plain path in float32."""
    from model.attention_ops import Documents

    text = torch.tensor(tokens[: n_prompt + at], device="cuda")
    logits_V = model.logits(model(text, Documents.from_lengths([len(text)], device="cuda"))[-1:])[0]
    top = logits_V.float().topk(2).values
    return float(top[0] - top[1])


@pytest.mark.parametrize("sharing", [NoSharing(), TailSharing(kind="tail", n_layers=3)])
@pytest.mark.parametrize("n_pages", [200, 24])
def test_greedy_replies_are_those_of_the_plain_path(sharing: Any, n_pages: int) -> None:
    """With eviction and preemption at 24 pages. Tokens differ only where the two best logits are as good as equal."""
    model, exact = tiny(sharing), tiny(sharing).float()
    exact.attention_backend = "sdpa"
    scheduler, _ = scheduler_of(model, "fused", n_pages)
    assert scheduler.runner.lag == 1
    requests = requests_of(14, 1, 0.0)
    replies = run(scheduler, [], requests, {i: i // 2 for i in range(14)})
    expected = generate(exact, [r.tokens[: r.n_prompt] for r in requests], Sampling(24, (3,), 0.0), path="plain")
    n_equal = 0
    for request, (completion,) in zip(requests, expected, strict=True):
        found, wanted = replies[request], completion.tokens[: request.sampling.max_new_tokens]
        differ = [i for i, (a, b) in enumerate(zip(found, wanted)) if a != b]
        if not differ:
            assert found == wanted
            n_equal += 1
        else:
            assert margin_of(exact, [*request.tokens[: request.n_prompt], *wanted], request.n_prompt, differ[0]) < 0.05
    assert n_equal >= 8
    allocator = scheduler.cache.allocator
    assert allocator.n_free + scheduler.prefix_cache.n_pages == allocator.n_pages


def test_a_deterministic_reply_does_not_depend_on_the_batch() -> None:
    model = tiny(NoSharing())
    together_scheduler, _ = scheduler_of(model, "fused", 300, n_rows=16, deterministic=True)
    requests = requests_of(16, 2, 0.8)
    together = run(together_scheduler, [], requests, {i: i // 3 for i in range(16)})
    alone_scheduler, _ = scheduler_of(model, "fused", 300, n_rows=16, deterministic=True)
    for request in requests:
        alone = Request(request.tokens[: request.n_prompt], request.sampling)
        run(alone_scheduler, [], [alone], {0: 0})
        assert alone.generated == together[request]


def test_samples_of_one_prompt_differ_and_share_its_pages() -> None:
    model = tiny(NoSharing())
    prompt = torch.randint(5, VOCAB, (100,), generator=torch.Generator().manual_seed(5)).tolist()
    rule = Sampling(12, (), 3.0, seed=3)  # hot: the embeddings are large
    (samples,) = generate(model, [prompt], rule, n_samples=6)
    assert len({tuple(sample.tokens) for sample in samples}) == 6
    again = generate(model, [prompt], rule, n_samples=6)
    assert [s.tokens for s in again[0]] == [s.tokens for s in samples]
    assert all(logprob < 0 for sample in samples for logprob in sample.logprobs)
