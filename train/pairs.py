"""On-policy preference pairs: sample several replies to real contexts, let the scorer rank them, keep the extremes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track

from data.dialogue import decode_reply
from data.dialogue_json import read_dialogues
from data.preferences import PreferencePair, read_pairs, write_pairs
from data.tokenizer import DialogueTokenizer
from eval.context import ReplyContext, select_contexts
from model.attention_ops import Documents
from model.generate import Completion, Sampling, generate
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import load_scorer
from recipes.loader import Section
from train.engine import World

CONTEXTS_A_FILE = 32


class OnPolicyPairs(Section):
    """Pairs made by the model itself: `n_candidates` replies to each context, best against worst by the scorer."""

    kind: Literal["on_policy"]
    scorer: str
    n_contexts: PositiveInt
    n_candidates: Annotated[int, Field(ge=2)] = 4
    max_context_tokens: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_score_difference: NonNegativeFloat = 0.0
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longest allowed ratio of the two replies' token counts: keeps "longer" from standing in for "better"."""


@torch.no_grad()
def score_replies(
    trunk: Transformer, head: ScalarHead, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[float]:
    """Logit that the partner writes again, at the last token of each prompt + reply."""
    device = trunk.embed_tokens.weight.device
    sequences = [[*prompt, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    tokens_T = torch.tensor([token for sequence in sequences for token in sequence], device=device)
    documents = Documents.from_lengths([len(sequence) for sequence in sequences], device=device)
    score_T = head(trunk(tokens_T, documents))
    return score_T[documents.boundaries[1:].long() - 1].tolist()


def sample_pairs(
    settings: OnPolicyPairs, policy: Transformer, data: Path, tokenizer: DialogueTokenizer,
    seed: int, folder: Path, world: World, console: Console,
) -> list[PreferencePair]:  # fmt: skip
    """The pairs of `settings`, kept below `folder` in small files: an interrupted run makes the missing ones only.

    The files, and what is in them, do not depend on the number of ranks.
    """
    dialogues = list(read_dialogues(data / "dialogues" / "train.jsonl"))
    without: Counter[str] = Counter()
    contexts = select_contexts(
        dialogues, tokenizer, settings.n_contexts, seed, settings.max_context_tokens, left_out=without
    )
    trunk, head = load_scorer(Path(settings.scorer) / "model", world.device)
    policy.eval()
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(contexts), CONTEXTS_A_FILE)
    paths = [folder / f"contexts_{start:06d}.jsonl" for start in starts]
    mine = [(start, path) for start, path in zip(starts, paths, strict=True)][world.rank :: world.size]
    for start, path in track(mine, "sampling replies", console=console, disable=not console.is_terminal):
        if not path.exists():
            part = contexts[start : start + CONTEXTS_A_FILE]
            write_pairs(path, _pairs_of(part, settings, policy, trunk, head, tokenizer, seed + start))
    policy.train()
    world.barrier()
    pairs = [pair for path in paths for pair in read_pairs(path)]
    console.print(
        f"{len(pairs)} on-policy pairs from {len(contexts)} contexts x {settings.n_candidates} candidates "
        f"({len(contexts) - len(pairs)} contexts gave none: too few finished replies, or too close)",
        highlight=False,
    )
    return pairs


def _pairs_of(
    contexts: Sequence[ReplyContext],
    settings: OnPolicyPairs,
    policy: Transformer,
    trunk: Transformer,
    head: ScalarHead,
    tokenizer: DialogueTokenizer,
    seed: int,
) -> list[PreferencePair]:
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=(tokenizer.end_id,),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        forbidden_ids=tokenizer.forbidden_in_reply,
    )
    pairs = []
    candidates = generate(policy, [context.prompt for context in contexts], sampling, n_samples=settings.n_candidates)
    for context, completions in zip(contexts, candidates, strict=True):
        finished = {tuple(c.tokens): c for c in completions if c.finish_reason == "stop" and len(c.tokens) > 1}
        replies = list(finished.values())
        if len(replies) < 2:
            continue
        scores = score_replies(trunk, head, [context.prompt] * len(replies), [reply.tokens for reply in replies])
        pair = _extremes(context, replies, scores, settings, tokenizer)
        if pair is not None:
            pairs.append(pair)
    return pairs


def _extremes(
    context: ReplyContext, replies: Sequence[Completion], scores: Sequence[float], settings: OnPolicyPairs,
    tokenizer: DialogueTokenizer,
) -> PreferencePair | None:  # fmt: skip
    """Best against worst, unless they are too close, too different in length, or the same text."""
    ranked = sorted(range(len(replies)), key=lambda i: scores[i])
    worst, best = ranked[0], ranked[-1]
    lengths = sorted((len(replies[best].tokens), len(replies[worst].tokens)))
    chosen, rejected = (decode_reply(tokenizer, replies[i].tokens) for i in (best, worst))
    too_uneven = settings.max_length_ratio is not None and lengths[1] > settings.max_length_ratio * lengths[0]
    if scores[best] - scores[worst] < settings.min_score_difference or too_uneven or chosen == rejected:
        return None
    return PreferencePair(
        id=f"{context.dialogue_id}:{context.turn}",
        messages=context.messages,
        character=context.character,
        chosen=chosen,
        rejected=rejected,
        source="on_policy",
        metadata={"chosen_score": scores[best], "rejected_score": scores[worst]},
    )
