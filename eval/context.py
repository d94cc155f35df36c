"""Held-out contexts and the replies of models to them, for ranking, preference, quality and samples."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.format.dialogue import NARRATOR, Dialogue, Message, n_opening_messages
from data.format.encode import decode_reply, encode_reply
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer
from data.format.visible_text import says_nothing
from data.prompt.fit import fit_prompt
from data.sources.record import LeftOut
from model.inference.generate import generate
from model.inference.sampling import Sampling
from model.inference.scheduler import Step
from model.transformer import Transformer

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class ReplyContext:
    """The messages before one reply of the character that `fit_prompt` keeps, and the human reply."""

    dialogue_id: str
    messages: tuple[Message, ...]
    character: str
    human_reply: str
    turn: int  # 1-based number of the reply in the whole dialogue
    prompt: tuple[int, ...]
    human_tokens: tuple[int, ...]
    dialogue: int  # its index among the held-out dialogues, as in the shards
    n_opening: int = 0  # messages of the narrator's opening, which precede those that are dropped


def dialogues_of(contexts: Sequence[ReplyContext]) -> NDArray[np.int64]:
    """The dialogue of each context, the cluster of intervals."""
    return np.array([context.dialogue for context in contexts], dtype=np.int64)


@dataclass(frozen=True)
class Reply:
    """A reply as text and as tokens with the final <|end|>; `finished` is False if the token limit cut it."""

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
    left_out: Counter[str] | None = None,
) -> list[ReplyContext]:
    """Up to `n` contexts, at most one a dialogue (so that they are independent), sampled with `seed`.

    A context ends with a message of another speaker and has at least `min_messages` messages before the oldest are
    dropped. `left_out` receives the number of visited dialogues without a context, by reason.
    """
    rng = np.random.default_rng(seed)
    encoder = MessageEncoder(tokenizer)
    chosen: list[ReplyContext] = []
    reasons: Counter[str] = Counter() if left_out is None else left_out
    for number in rng.permutation(len(dialogues)):
        dialogue = dialogues[number]
        places = _reply_places(dialogue, min_messages)
        # one random number a dialogue, used or not, so that a changed limit does not change later choices
        pick = float(rng.random())
        if not places:
            reasons[f"the character answers nobody after {min_messages} messages"] += 1
            continue
        context = _context_at(dialogue, int(number), places[int(pick * len(places))], encoder, max_prompt_tokens)
        if isinstance(context, LeftOut):
            reasons[context.reason] += 1
        else:
            chosen.append(context)
        if len(chosen) == n:
            break
    return chosen


def human_texts(dialogues: Sequence[Dialogue], min_messages: int) -> list[str]:
    """A reply of each dialogue with a context: an upper bound of contexts that needs no tokenizer."""
    places = ((dialogue, _reply_places(dialogue, min_messages)) for dialogue in dialogues)
    return [dialogue.messages[found[0]].text for dialogue, found in places if found]


def _reply_places(dialogue: Dialogue, min_messages: int) -> list[int]:
    """Indices of the character's messages that answer another speaker; untrained messages are not replies."""
    messages = dialogue.messages
    return [
        i
        for i in range(max(1, min_messages), len(messages))
        if messages[i].speaker == dialogue.character
        and messages[i].is_trained
        and messages[i - 1].speaker not in (dialogue.character, NARRATOR)
        and not says_nothing(messages[i - 1].text)
        and not says_nothing(messages[i].text)
    ]


def _context_at(
    dialogue: Dialogue, number: int, place: int, encoder: MessageEncoder, max_prompt_tokens: int
) -> ReplyContext | LeftOut:
    """The context before message `place`, or the reason why it does not fit."""
    reply = dialogue.messages[place]
    fitted = fit_prompt(encoder, dialogue.messages[:place], dialogue.character, max_prompt_tokens)
    if isinstance(fitted, LeftOut):
        return fitted
    human_tokens = tuple(encode_reply(encoder.tokenizer, reply.text))
    prompt = tuple(fitted.tokens)
    return ReplyContext(
        dialogue.id, fitted.messages, dialogue.character, reply.text, place + 1, prompt, human_tokens, number,
        n_opening_messages(dialogue.messages[:place]),
    )  # fmt: skip


def sample_replies(
    model: Transformer,
    tokenizer: DialogueTokenizer,
    contexts: Sequence[ReplyContext],
    sampling: Sampling,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Reply]:
    """One reply a context. Each context has its own seed, the same for all models."""
    n_done = 0

    def on_token(step: Step) -> None:
        nonlocal n_done
        if step.finish_reason is not None:
            n_done += 1
            on_progress(n_done, len(contexts))

    completions = generate(model, [context.prompt for context in contexts], sampling, on_token=on_token)
    return [_reply(tokenizer, one.tokens, one.finish_reason == "stop") for (one,) in completions]


def _reply(tokenizer: DialogueTokenizer, tokens: Sequence[int], finished: bool) -> Reply:
    kept = [token for token in tokens if token != tokenizer.end_id]
    # also closes a cut reply: the scorer's output is read at <|end|>
    return Reply(decode_reply(tokenizer, kept), (*kept, tokenizer.end_id), finished)


def human_replies(contexts: Sequence[ReplyContext]) -> list[Reply]:
    """The replies in the data, in the form of model replies."""
    return [Reply(context.human_reply, context.human_tokens, True) for context in contexts]
