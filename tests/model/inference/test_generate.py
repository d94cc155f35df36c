"""Cached generation must equal uncached: whatever the batch, the pages, the chunks, the windows and the sharing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attention_ops import Documents
from model.config import AdjacentSharing, KVSharing, ModelConfig, NoSharing, TailSharing
from model.inference.blocks import OutOfPages, PageAllocator
from model.inference.generate import Generator, NonFiniteLogits, generate
from model.inference.kv_cache import CacheStep, PagedKVCache
from model.inference.runner import Chunk, Draws
from model.inference.sampling import Sampling
from model.inference.scheduler import Step
from model.transformer import Transformer

SHARINGS: list[KVSharing] = [
    NoSharing(),
    TailSharing(kind="tail", n_layers=3),
    AdjacentSharing(kind="adjacent", group=2),
    AdjacentSharing(kind="adjacent", group=3),
]


def tiny(sharing: KVSharing, n_kv_heads: int = 1, layers: str = "SSG", window: int = 5) -> Transformer:
    config = ModelConfig(
        vocab_size=41, d_model=24, n_layers=6, n_heads=4, n_kv_heads=n_kv_heads, d_head=8, d_ff=32, layers=layers,
        window=window, kv_sharing=sharing, final_logit_softcap=20.0, max_length=64,
    )  # fmt: skip
    return Transformer(config, seed=3).double().eval()


def uncached_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor(tokens), Documents.from_lengths([len(tokens)])))[-1]


@settings(max_examples=30, deadline=None)
@given(
    sharing=st.sampled_from(SHARINGS),
    n_kv_heads=st.sampled_from([1, 2]),
    layers=st.sampled_from(["SSG", "SGG", "G", "GSSSSG"]),
    window=st.sampled_from([1, 5, 30]),
    chunks=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 9),
)
def test_extend_in_any_chunks_equals_one_pass(
    sharing: KVSharing, n_kv_heads: int, layers: str, window: int, chunks: list[list[int]], page_size: int, seed: int
) -> None:
    if layers == "GSSSSG" and isinstance(sharing, TailSharing):
        sharing = TailSharing(kind="tail", n_layers=2)
    model = tiny(sharing, n_kv_heads, layers, window)
    generator = torch.Generator().manual_seed(seed)
    cache = PagedKVCache(model.config, n_pages=200, page_size=page_size, dtype=torch.float64)
    for pool in (*cache.k_SGK.values(), *cache.v_SGK.values()):
        pool.fill_(float("nan"))
    scattered = torch.randperm(200, generator=generator).tolist()
    texts = [torch.randint(41, (sum(c),), generator=generator).tolist() for c in chunks]
    pages = [[scattered.pop() for _ in range(cache.pages_for(len(text)))] for text in texts]
    done = [0] * len(texts)
    for turn in range(max(len(c) for c in chunks)):
        alive = [b for b, c in enumerate(chunks) if turn < len(c)]
        step = CacheStep.build([(texts[b][done[b] : done[b] + chunks[b][turn]], done[b], pages[b]) for b in alive])
        logits_BV = model.logits(model.extend(step, cache))
        for row, b in enumerate(alive):
            done[b] += chunks[b][turn]
            torch.testing.assert_close(logits_BV[row], uncached_logits(model, texts[b][: done[b]]))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_greedy_generation_equals_uncached(sharing: KVSharing) -> None:
    model = tiny(sharing)
    prompts = [[1, 2, 3], [7] * 17, [4]]
    sampling = Sampling(max_new_tokens=12, stop_ids=(0,), temperature=0)
    for prompt, samples in zip(prompts, generate(model, prompts, sampling, n_samples=2, page_size=4), strict=True):
        tokens = list(prompt)
        for token, logprob in zip(samples[0].tokens, samples[0].logprobs, strict=True):
            logits_V = uncached_logits(model, tokens)
            assert token == logits_V.argmax()
            assert logprob == pytest.approx(logits_V.float().log_softmax(-1)[token].item(), abs=1e-4)
            tokens.append(token)
        assert samples[1].tokens == samples[0].tokens


def test_generation_may_end_with_its_first_token() -> None:
    model = tiny(NoSharing())
    first = int(uncached_logits(model, [1, 2, 3]).argmax())
    ((completion,),) = generate(model, [[1, 2, 3]], Sampling(max_new_tokens=5, stop_ids=(first,), temperature=0))
    assert (completion.tokens, completion.finish_reason) == ([first], "stop")


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = tiny(SHARINGS[1])
    sampling = Sampling(max_new_tokens=10, stop_ids=(0,), temperature=1.0, top_p=0.9, seed=5)
    alone = generate(model, [[1, 2, 3]], sampling, n_samples=2)
    together = generate(model, [[1, 2, 3], [9, 9], [5] * 20], sampling, n_samples=2)
    assert alone[0] == together[0]
    assert alone[0][0].tokens != alone[0][1].tokens


def test_generation_stops_at_the_context_limit() -> None:
    model = tiny(NoSharing())
    (completion,) = generate(model, [[1] * 60], Sampling(max_new_tokens=50, stop_ids=(), temperature=0))[0]
    assert len(completion.tokens) == 4
    assert completion.finish_reason == "length"
    with pytest.raises(ValueError, match="prompt 0 has 64 tokens"):
        generate(model, [[1] * 64], Sampling(max_new_tokens=1, stop_ids=()))


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny(NoSharing())
    with torch.no_grad():
        model.embed_tokens.weight[7] = torch.nan
    with pytest.raises(NonFiniteLogits, match="token 0 of a reply to prompt 0"):
        generate(model, [[1, 2], [7, 7]], Sampling(max_new_tokens=3, stop_ids=()))


def test_pages_are_counted() -> None:
    allocator = PageAllocator(3)
    pages = allocator.allocate(2)
    allocator.retain(pages[:1])
    allocator.release(pages)
    assert allocator.n_free == 2
    with pytest.raises(OutOfPages, match="3 cache pages requested, 2 of 3 are free"):
        allocator.allocate(3)
    assert allocator.n_free == 2


def test_a_generator_starts_afresh_after_a_call_that_failed() -> None:
    """Its pages and rows are free again, and its replies are those of a new one."""
    model = tiny(NoSharing())
    generator = Generator(model, n_rows=2, max_length=40, page_size=4)
    sampling = Sampling(max_new_tokens=6, stop_ids=(), temperature=1.0, seed=2)

    def leave(step: Step) -> None:
        if step.request.n_generated == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate([[1, 2], [3, 4], [5, 6]], sampling, on_token=leave)
    for _ in range(2):
        found = generator.generate([[1, 2], [3, 4], [5, 6]], sampling, n_samples=2)
        assert found == generate(model, [[1, 2], [3, 4], [5, 6]], sampling, n_samples=2)
    with pytest.raises(
        ValueError, match=r"prompt 1 has 40 tokens; it must have 1 to 39 \(max_length of the model is 64\)"
    ):
        generator.generate([[1], [1] * 40], sampling)
    scheduler = generator._scheduler
    allocator = scheduler.cache.allocator
    assert allocator.n_free + scheduler.prefix_cache.n_pages == allocator.n_pages


def test_a_prompt_is_computed_once_for_all_its_samples() -> None:
    model = tiny(NoSharing())
    generator = Generator(model, n_rows=8, max_length=40, page_size=4)
    sampling = Sampling(max_new_tokens=3, stop_ids=(), temperature=1.0)
    n_prefilled: list[int] = []
    prefill = generator.runner.prefill

    def counted(chunks: Sequence[Chunk]) -> Draws | None:
        n_prefilled.extend(len(chunk.tokens) for chunk in chunks)
        return prefill(chunks)

    generator.runner.prefill = counted  # type: ignore[method-assign]
    generator.generate([[1] * 18, [2] * 18], sampling, n_samples=4)
    assert sorted(n_prefilled) == [2] * 6 + [18] * 2, "the samples share four full pages"
