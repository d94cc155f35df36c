"""On-policy preference pairs: sample replies to real contexts, score them, and pair the best with the worst."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track

from data.clean.ledger import reasons_text
from data.format.dialogue_json import read_dialogues
from data.format.encode import decode_reply
from data.format.tokenizer import DialogueTokenizer
from data.format.visible_text import says_nothing, visible
from data.prompt.fit import NEWEST_TOO_LONG, SCENE_TOO_LONG, TOGETHER_TOO_LONG
from data.sources.preferences import PreferencePair, read_pairs, write_pairs
from data.sources.record import LeftOut
from eval.context import ReplyContext, select_contexts
from model.attention_ops import Documents
from model.inference.generate import MAX_ROWS, Completion, Generator
from model.inference.sampling import Sampling
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import load_scorer
from recipes.files import write_json
from recipes.loader import Section
from recipes.run_identity import Location
from train.deepspeed.world import World

CONTEXTS_A_FILE = 32

UNFINISHED = "fewer than two finished replies that differ and say something"
EQUAL_SCORES = "all replies score the same"
TOO_CLOSE = "scores closer than min_score_difference"
TOO_UNEVEN = "lengths further apart than max_length_ratio"
_REMEDIES = {
    UNFINISHED: "raise max_new_tokens or n_candidates",
    EQUAL_SCORES: "use a scorer with a higher held-out AUC, or raise n_candidates",
    TOO_CLOSE: "lower min_score_difference or raise n_candidates",
    TOO_UNEVEN: "raise max_length_ratio or n_candidates",
    NEWEST_TOO_LONG: "raise max_context_tokens",
    SCENE_TOO_LONG: "raise max_context_tokens",
    TOGETHER_TOO_LONG: "raise max_context_tokens",
}


class NoPairsError(ValueError):
    """No context gave a pair; the message has counts by reason and names the keys to change."""


class OnPolicyPairs(Section):
    """Pairs sampled from the policy: `n_candidates` replies to each context, best against worst by the scorer."""

    kind: Literal["on_policy"]
    scorer: Location
    n_contexts: PositiveInt
    n_candidates: Annotated[int, Field(ge=2)] = 4
    max_context_tokens: PositiveInt
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_score_difference: NonNegativeFloat = 0.0
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Largest allowed ratio of the two replies' token counts, so that length does not stand for quality."""


@torch.no_grad()
def score_replies(
    trunk: Transformer, head: ScalarHead, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[float]:
    """Logit of "the partner writes again" at the last token of each prompt + reply."""
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
    """The pairs of `settings`, cached in small files below `folder`: an interrupted run resumes with the missing files.

    The files do not depend on the number of ranks. Raises NoPairsError when there is no pair.
    """
    dialogues = list(read_dialogues(data / "dialogues" / "train.jsonl"))
    without: Counter[str] = Counter()
    contexts = select_contexts(
        dialogues, tokenizer, settings.n_contexts, seed, settings.max_context_tokens, left_out=without
    )
    trunk, head = load_scorer(Path(settings.scorer) / "model", world.device, policy.embed_tokens.weight.dtype)
    policy.eval()
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(contexts), CONTEXTS_A_FILE)
    paths = [folder / f"contexts_{start:06d}.jsonl" for start in starts]
    n_rows = min(CONTEXTS_A_FILE * settings.n_candidates, MAX_ROWS)
    generator = Generator(policy, n_rows, settings.max_context_tokens + settings.max_new_tokens)
    mine = [(start, path) for start, path in zip(starts, paths, strict=True)][world.rank :: world.size]
    for start, path in track(mine, "sampling replies", console=console, disable=not console.is_terminal):
        if not path.exists():
            part = contexts[start : start + CONTEXTS_A_FILE]
            made = _pairs_of(part, settings, generator, trunk, head, tokenizer, seed + start)
            write_json(_counts_of(path), Counter(one.reason for one in made if isinstance(one, LeftOut)))
            write_pairs(path, (one for one in made if isinstance(one, PreferencePair)))
    policy.train()
    world.barrier()
    pairs = [pair for path in paths for pair in read_pairs(path)]
    reasons: Counter[str] = Counter()
    for path in paths:
        reasons.update(json.loads(_counts_of(path).read_text(encoding="utf-8")))
    message = (
        f"{len(pairs)} on-policy pairs from {len(contexts)} contexts x {settings.n_candidates} candidates "
        f"({settings.n_contexts} contexts asked for, {len(dialogues)} dialogues in {data})"
    )
    if reasons:
        message += f"; contexts without a pair: {reasons_text(reasons)}"
    if without:
        message += f"; dialogues without a context: {reasons_text(without)}"
    if not pairs:
        raise NoPairsError(f"{message}. {_advice(reasons or without)}")
    console.print(message, highlight=False, soft_wrap=True)
    return pairs


def _counts_of(path: Path) -> Path:
    """Counts of the contexts without a pair of a file of pairs, written before it."""
    return path.with_suffix(".json")


def _advice(reasons: Counter[str]) -> str:
    """What to change, most common reason first."""
    remedies = dict.fromkeys(_REMEDIES[reason] for reason, _ in reasons.most_common() if reason in _REMEDIES)
    if not remedies:
        return "On-policy pairs need dialogues whose character answers somebody: look at the data with data.inspect"
    return f"In the on_policy entry of pairs: {'; '.join(remedies)}"


def _pairs_of(
    contexts: Sequence[ReplyContext],
    settings: OnPolicyPairs,
    generator: Generator,
    trunk: Transformer,
    head: ScalarHead,
    tokenizer: DialogueTokenizer,
    seed: int,
) -> list[PreferencePair | LeftOut]:
    """The pair of each context, or why it has none."""
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=(tokenizer.end_id,),
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seed,
        forbidden_ids=tokenizer.forbidden_in_reply,
    )
    made: list[PreferencePair | LeftOut] = []
    candidates = generator.generate([context.prompt for context in contexts], sampling, settings.n_candidates)
    for context, completions in zip(contexts, candidates, strict=True):
        replies = distinct_replies(completions, tokenizer)
        if len(replies) < 2:
            made.append(LeftOut(UNFINISHED))
            continue
        scores = score_replies(trunk, head, [context.prompt] * len(replies), [reply.tokens for reply in replies])
        made.append(extremes(context, replies, scores, settings, tokenizer))
    return made


def distinct_replies(completions: Sequence[Completion], tokenizer: DialogueTokenizer) -> list[Completion]:
    """Finished, non-empty replies, without repetitions."""
    replies: dict[str, Completion] = {}
    for completion in completions:
        text = decode_reply(tokenizer, completion.tokens)
        if completion.finish_reason == "stop" and not says_nothing(text):
            replies.setdefault(visible(text), completion)
    return list(replies.values())


def extremes(
    context: ReplyContext, replies: Sequence[Completion], scores: Sequence[float], settings: OnPolicyPairs,
    tokenizer: DialogueTokenizer,
) -> PreferencePair | LeftOut:  # fmt: skip
    """Best against worst of distinct replies, unless scores are too close or lengths too different."""
    ranked = sorted(range(len(replies)), key=lambda i: scores[i])
    worst, best = ranked[0], ranked[-1]
    difference = scores[best] - scores[worst]
    if not difference > 0:
        return LeftOut(EQUAL_SCORES)
    if difference < settings.min_score_difference:
        return LeftOut(TOO_CLOSE)
    shorter, longer = sorted((len(replies[best].tokens), len(replies[worst].tokens)))
    if settings.max_length_ratio is not None and longer > settings.max_length_ratio * shorter:
        return LeftOut(TOO_UNEVEN)
    chosen, rejected = (decode_reply(tokenizer, replies[i].tokens) for i in (best, worst))
    return PreferencePair(
        id=f"{context.dialogue_id}:{context.turn}",
        messages=context.messages,
        character=context.character,
        chosen=chosen,
        rejected=rejected,
        source="on_policy",
        metadata={"chosen_score": scores[best], "rejected_score": scores[worst]},
    )
