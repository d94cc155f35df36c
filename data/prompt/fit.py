"""The truncation rule of every prompt with a token limit: DPO, SFT, evaluation, sampling and serving.

1. The narrator's opening (scene and character definitions) is pinned.
2. The newest message, and narration after it, are pinned: the reply answers them.
3. Between them, the newest messages that fit are kept, without gaps. Narration inside a conversation is treated like
   other messages.

If the pinned messages do not fit, there is no prompt but a reason that names the part that is too long: with no
context, or a truncated newest message, the model would answer something else. (A prompt template pins its own parts and
truncates in rare deep steps: data/prompt/truncation.py.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.format.dialogue import NARRATOR, Message, n_opening_messages
from data.format.encode import Encoder
from data.format.message_encoder import MessageEncoder
from data.sources.record import LeftOut

REPLY_TOO_LONG = "the reply alone is too long"
SCENE_TOO_LONG = "the narrator's opening messages are too long"
NEWEST_TOO_LONG = "the newest message is too long"
TOGETHER_TOO_LONG = "the narrator's opening messages and the newest message are too long together"


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """The kept messages, the tokens to generate from, and the number of messages that were cut."""

    messages: tuple[Message, ...]
    tokens: list[int]
    n_cut: int


def fit_prompt(
    tokenizer: Encoder | MessageEncoder,
    messages: Sequence[Message],
    character: str,
    max_tokens: int,
    reply_tokens: int = 0,
) -> FittedPrompt | LeftOut:
    """The prompt for `character`'s reply to `messages`, of at most `max_tokens` tokens less the reply's, or the reason
    why there is none.

    Each message is encoded once, from the newest back, up to the first that does not fit. Without messages the prompt
    is `<bos><|message|>character:`. Raises DialogueError for an invalid name.
    """
    encoder = tokenizer if isinstance(tokenizer, MessageEncoder) else MessageEncoder(tokenizer)
    reply = encoder.opening(character)
    room = max_tokens - reply_tokens - 1 - len(reply)  # 1 for <bos>
    if room < 0:
        return LeftOut(REPLY_TOO_LONG)
    room_of_all = room
    n_opening = n_opening_messages(messages)
    opening: list[int] = []
    for message in messages[:n_opening]:
        opening += encoder.message(message.speaker, message.text)
        if len(opening) > room:
            return LeftOut(SCENE_TOO_LONG)
    room -= len(opening)
    first, newest_first = len(messages), []
    n_pinned = _n_newest(messages[n_opening:], character)
    while first > n_opening:
        message = messages[first - 1]
        ids = encoder.message(message.speaker, message.text)
        if len(ids) > room:
            break
        room -= len(ids)
        newest_first.append(ids)
        first -= 1
    if len(newest_first) < n_pinned:
        fits_alone = _fits(encoder, messages[len(messages) - n_pinned :], room_of_all)
        return LeftOut(TOGETHER_TOO_LONG if fits_alone else NEWEST_TOO_LONG)
    tokens = [encoder.tokenizer.bos_id, *opening]
    for ids in reversed(newest_first):
        tokens += ids
    kept = (*messages[:n_opening], *messages[first:])
    return FittedPrompt(kept, [*tokens, *reply], len(messages) - len(kept))


def _fits(encoder: MessageEncoder, messages: Sequence[Message], room: int) -> bool:
    for message in messages:
        room -= len(encoder.message(message.speaker, message.text))
        if room < 0:
            return False
    return True


def _n_newest(conversation: Sequence[Message], character: str) -> int:
    """The number of pinned messages at the end: the newest one and, if that is narration, back to the newest of
    others."""
    if character == NARRATOR:  # narration is its own messages
        return min(1, len(conversation))
    notes = next((i for i, message in enumerate(reversed(conversation)) if message.speaker != NARRATOR), None)
    return 0 if notes is None else notes + 1
