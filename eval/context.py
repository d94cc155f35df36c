"""Held-out contexts to reply to and the replies models give: shared by ranking, preference, quality and samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.dialogue import NARRATOR, Dialogue, Message, decode_reply, encode_message, encode_prompt, encode_reply
from data.tokenizer import DialogueTokenizer
from model.generate import Sampling, generate
from model.transformer import Transformer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ReplyContext:
    """What came before one reply of the character, cut to a token budget at message borders, and the human reply."""

    dialogue_id: str
    messages: tuple[Message, ...]
    character: str
    human_reply: str
    turn: int  # number of the reply in the whole dialogue, counted from 1
    prompt: tuple[int, ...]
    human_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """A reply as text and as tokens with the closing <|end|>; `finished` is False where the token limit cut it."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


def select_contexts(
    dialogues: Sequence[Dialogue],
    tokenizer: DialogueTokenizer,
    n: int,
    seed: int,
    max_prompt_tokens: int = 192,
    min_messages: int = 2,
) -> list[ReplyContext]:
    """Up to `n` contexts, at most one a dialogue (so that they are independent), drawn by `seed` alone.

    A context ends in a message of somebody else and holds at least `min_messages` messages before any cut.
    """
    rng = np.random.default_rng(seed)
    chosen: list[ReplyContext] = []
    for number in rng.permutation(len(dialogues)):
        dialogue = dialogues[number]
        places = _reply_places(dialogue, min_messages)
        # One draw a dialogue, used or not, keeps later draws the same when a limit changes.
        pick = float(rng.random())
        if not places:
            continue
        context = _context_at(dialogue, places[int(pick * len(places))], tokenizer, max_prompt_tokens)
        if context is not None:
            chosen.append(context)
        if len(chosen) == n:
            break
    return chosen


def _reply_places(dialogue: Dialogue, min_messages: int) -> list[int]:
    """Indices of the character's messages that answer somebody; one kept out of the loss is no reply to learn from."""
    messages = dialogue.messages
    return [
        i
        for i in range(max(1, min_messages), len(messages))
        if messages[i].speaker == dialogue.character
        and messages[i].is_trained
        and messages[i - 1].speaker not in (dialogue.character, NARRATOR)
        and messages[i].text.strip()
    ]


def _context_at(
    dialogue: Dialogue, place: int, tokenizer: DialogueTokenizer, max_prompt_tokens: int
) -> ReplyContext | None:
    """The context before message `place`, its oldest messages dropped until it fits; a scene definition stays."""
    reply = dialogue.messages[place]
    pinned = 1 if dialogue.messages[0].speaker == NARRATOR else 0
    # A prompt is the concatenation of its messages, so lengths add up; only as many are encoded as fit.
    length = len(encode_prompt(tokenizer, dialogue.messages[:pinned], dialogue.character))
    first = place
    while first > pinned:
        length += len(encode_message(tokenizer, dialogue.messages[first - 1]))
        if length > max_prompt_tokens:
            break
        first -= 1
    if first == place:
        return None
    kept = (*dialogue.messages[:pinned], *dialogue.messages[first:place])
    prompt = tuple(encode_prompt(tokenizer, kept, dialogue.character))
    assert len(prompt) <= max_prompt_tokens
    human_tokens = tuple(encode_reply(tokenizer, reply.text))
    return ReplyContext(dialogue.id, kept, dialogue.character, reply.text, place + 1, prompt, human_tokens)


def sample_replies(
    model: Transformer,
    tokenizer: DialogueTokenizer,
    contexts: Sequence[ReplyContext],
    sampling: Sampling,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reply]:
    """One reply a context. Context i is drawn with a seed of its own, the same for every model compared."""
    replies: list[Reply] = []
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        seeded = replace(sampling, seed=sampling.seed + start)
        for completions in generate(model, [context.prompt for context in batch], seeded):
            replies.append(_reply(tokenizer, completions[0].tokens, completions[0].finish_reason == "stop"))
        on_progress(len(replies), len(contexts))
    return replies


def _reply(tokenizer: DialogueTokenizer, tokens: Sequence[int], finished: bool) -> Reply:
    kept = [token for token in tokens if token != tokenizer.end_id]
    # A cut reply is closed too: the scorer reads its opinion at <|end|>.
    return Reply(decode_reply(tokenizer, kept), (*kept, tokenizer.end_id), finished)


def human_replies(contexts: Sequence[ReplyContext]) -> list[Reply]:
    """What the human behind the character really wrote, in the form of model replies."""
    return [Reply(context.human_reply, context.human_tokens, True) for context in contexts]
