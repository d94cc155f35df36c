"""User sensitivity: the change of the next-token distribution when one message of the history is replaced.

A cache key without the user's messages, or a model that ignores them, passes every test of interfaces; here it shows
as zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from data.format.encode import encode_prompt
from data.format.tokenizer import DialogueTokenizer
from eval.context import ReplyContext, dialogues_of
from eval.scoring import OnProgress, next_token_logprobs, share_of, silent
from eval.statistics import NOT_NEGATIVE, Bootstrap
from model.transformer import Transformer
from recipes.loader import Section

FloatArray = NDArray[np.float64]
MAX_DISTANCE = 4


class UserSensitivitySection(Section):
    """Number of contexts; in each, the last four messages are replaced, one at a time."""

    n_contexts: PositiveInt


def replaced_prompts(
    contexts: Sequence[ReplyContext], tokenizer: DialogueTokenizer, seed: int
) -> list[tuple[int, int, str, tuple[int, ...]]]:
    """(context, distance from the reply in messages, side, prompt) with the text of one message replaced.

    The new text is a message of the same side in another context.
    """
    rng = np.random.default_rng(seed)
    texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    for number, context in enumerate(contexts):
        for message in context.messages:
            texts[message.speaker == context.character].append((number, message.text))
    out = []
    for number, context in enumerate(contexts):
        for distance in range(1, min(MAX_DISTANCE, len(context.messages)) + 1):
            place = len(context.messages) - distance
            message = context.messages[place]
            own = message.speaker == context.character
            others = [text for source, text in texts[own] if source != number and text != message.text]
            if not others:
                continue
            changed = replace(message, text=others[int(rng.integers(len(others)))])
            messages = (*context.messages[:place], changed, *context.messages[place + 1 :])
            prompt = tuple(encode_prompt(tokenizer, messages, context.character))
            out.append((number, distance, "character" if own else "user", prompt))
    return out


def kl_divergence(logp_BV: FloatArray, logq_BV: FloatArray) -> FloatArray:
    """KL(p || q) of each row, in nats."""
    return np.asarray((np.exp(logp_BV) * (logp_BV - logq_BV)).sum(axis=-1))


def evaluate_user_sensitivity(
    models: Mapping[str, Transformer],
    tokenizer: DialogueTokenizer,
    contexts: Sequence[ReplyContext],
    seed: int,
    batch_tokens: int,
    bootstrap: Bootstrap,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Mean KL by side and by distance, and the number of replaced user messages without any effect (must be 0)."""
    changes = replaced_prompts(contexts, tokenizer, seed)
    prompts = [context.prompt for context in contexts] + [prompt for *_, prompt in changes]
    result: dict[str, Any] = {}
    for step, (name, model) in enumerate(models.items()):
        logprob_BV = next_token_logprobs(model, prompts, batch_tokens, share_of(on_progress, step, len(models))).numpy()
        base = logprob_BV[[number for number, *_ in changes]].astype(np.float64)
        kl_N = kl_divergence(base, logprob_BV[len(contexts) :].astype(np.float64))
        result[name] = summarize_changes(changes, kl_N, dialogues_of(contexts), bootstrap)
    return result


def summarize_changes(
    changes: Sequence[tuple[int, int, str, tuple[int, ...]]],
    kl_N: FloatArray,
    dialogue_C: NDArray[np.int64],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Mean KL by side and by distance; `kl_N`: one value for each of `changes`; `dialogue_C`: of each context."""
    dialogue_N = dialogue_C[np.array([number for number, *_ in changes], dtype=np.int64)]
    distance_N = np.array([distance for _, distance, *_ in changes], dtype=np.int64)
    user_N = np.array([side == "user" for _, _, side, _ in changes], dtype=bool)
    by_side = {}
    for side, chosen_N in (("user", user_N), ("character", ~user_N)):
        at_distance = [chosen_N & (distance_N == distance) for distance in range(1, MAX_DISTANCE + 1)]
        by_side[side] = {
            "kl": bootstrap.mean(kl_N[chosen_N], dialogue_N[chosen_N], NOT_NEGATIVE),
            "by_distance": [bootstrap.mean(kl_N[here_N], dialogue_N[here_N], NOT_NEGATIVE) for here_N in at_distance],
        }
    # below float32 rounding: no effect
    ignored = int((kl_N[user_N & (distance_N == 1)] < 1e-9).sum())
    return by_side | {
        "ignored_last_user_messages": ignored,
        "n_last_user_messages": int((user_N & (distance_N == 1)).sum()),
    }
