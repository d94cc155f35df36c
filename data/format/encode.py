"""The token form of a dialogue, for every stage: `<bos>`, then for each message a header `<|message|>{speaker}:` and a
reply ` {text}<|end|>`. A generation prompt ends with a header, so what a model generates is a reply.

Texts are escaped: an engine that reads control tokens as special strings never finds one in a user's text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Protocol

import numpy as np

from data.format.dialogue import (
    NO_LABEL,
    SPEAKER_END,
    Dialogue,
    Message,
    check_speaker,
    n_opening_messages,
    supervision,
)

CONTROL_SURFACES = ("<pad>", "<unk>", "<bos>", "<|message|>", "<|end|>")  # in the order of their ids, 0 to 4
_, _, BOS, MESSAGE, END = CONTROL_SURFACES
TEXT_START = " "  # between the header and the text
WORD_JOINER = "\u2060"
MESSAGE_COLUMNS = np.dtype(
    [("prefix_bytes", "<u4"), ("body_bytes", "<u4"), ("is_trained", "u1"), ("label", "i1"), ("opening", "u1")]
)
"""A message: the bytes of `speaker_prefix` and `message_body`, whether SFT trains it, its continuation label, and
whether it is one of the narrator's messages at the beginning of the dialogue."""

_SURFACE = re.compile("|".join(re.escape(surface) for surface in CONTROL_SURFACES))
_JOINERS = re.compile(f"{WORD_JOINER}({WORD_JOINER}?)")


class Encoder(Protocol):
    """The part of a tokenizer that is used here (DialogueTokenizer is one)."""

    bos_id: int
    message_id: int
    end_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def escape(text: str) -> str:
    """`text` with U+2060 inserted after the first character of every control surface, and its own U+2060 doubled."""
    if WORD_JOINER in text:
        text = text.replace(WORD_JOINER, WORD_JOINER * 2)
    if "<" not in text:
        return text
    return _SURFACE.sub(lambda match: match[0][0] + WORD_JOINER + match[0][1:], text)


def unescape(text: str) -> str:
    """The exact inverse of `escape`: a pair of U+2060 becomes one, a single one is removed."""
    return _JOINERS.sub(r"\1", text) if WORD_JOINER in text else text


@lru_cache(4096)  # few speakers, many messages
def speaker_prefix(speaker: str) -> str:
    """The text of a header: the escaped name and a colon."""
    return escape(speaker) + SPEAKER_END


def message_body(text: str) -> str:
    """The text of a reply: a space and the escaped text."""
    return TEXT_START + escape(text)


def texts_of(dialogues: Iterable[Dialogue]) -> list[str]:
    """What is tokenized of dialogues: prefix and body of each message."""
    return [t for d in dialogues for m in d.messages for t in (speaker_prefix(m.speaker), message_body(m.text))]


def encode_header(tokenizer: Encoder, speaker: str) -> list[int]:
    """`<|message|>speaker:`. Raises DialogueError for an invalid name."""
    check_speaker(speaker)
    return [tokenizer.message_id, *tokenizer.encode(speaker_prefix(speaker))]


def encode_reply(tokenizer: Encoder, text: str) -> list[int]:
    """` text<|end|>`, which follows a header."""
    return [*tokenizer.encode(message_body(text)), tokenizer.end_id]


def decode_reply(tokenizer: Encoder, ids: Sequence[int]) -> str:
    """The text of generated ids, the exact inverse of `encode_reply`: drops control tokens and one leading space."""
    return unescape(tokenizer.decode(ids).removeprefix(TEXT_START))


def encode_message(tokenizer: Encoder, message: Message) -> list[int]:
    """`<|message|>speaker: text<|end|>`."""
    return encode_header(tokenizer, message.speaker) + encode_reply(tokenizer, message.text)


def encode_prompt(tokenizer: Encoder, messages: Iterable[Message], character: str) -> list[int]:
    """The tokens to generate `character`'s reply from: `<bos>`, the messages and a header."""
    encoded = (encode_message(tokenizer, message) for message in messages)
    return [tokenizer.bos_id, *chain.from_iterable(encoded), *encode_header(tokenizer, character)]


@dataclass(frozen=True, slots=True)
class EncodedDialogue:
    """A dialogue as n tokens (int64) with their supervision.

    `loss_mask` uint8: 1 on the replies that SFT trains. `label` int8: the continuation label (0 or 1) at the `<|end|>`
    of a labeled message, -1 elsewhere. `message_starts`: positions of `<|message|>`; `text_starts`: positions of the
    first token of each reply; `n_opening`: the narrator's messages at the beginning.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    label: np.ndarray
    message_starts: np.ndarray
    text_starts: np.ndarray
    n_opening: int = 0


@dataclass(frozen=True, slots=True)
class EncodedDialogues:
    """Concatenated dialogues: arrays as in EncodedDialogue with positions in the concatenation; dialogue i has the
    tokens `edges[i]:edges[i + 1]` and the messages `message_edges[i]:message_edges[i + 1]`; `n_opening` of each."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    label: np.ndarray
    message_starts: np.ndarray
    text_starts: np.ndarray
    edges: np.ndarray
    message_edges: np.ndarray
    n_opening: np.ndarray

    def one(self, number: int) -> EncodedDialogue:
        """A dialogue, without copying its tokens."""
        start, end = self.edges[number : number + 2].tolist()
        messages = slice(*self.message_edges[number : number + 2].tolist())
        return EncodedDialogue(
            self.tokens[start:end],
            self.loss_mask[start:end],
            self.label[start:end],
            self.message_starts[messages] - start,
            self.text_starts[messages] - start,
            int(self.n_opening[number]),
        )


@dataclass(frozen=True, slots=True)
class RenderedDialogues:
    """Dialogues as text in columns: `texts_B` uint8, prefix and body of each message in UTF-8, concatenated;
    `messages` of type MESSAGE_COLUMNS; `n_messages` of each dialogue, int64."""

    texts_B: np.ndarray
    messages: np.ndarray
    n_messages: np.ndarray

    @property
    def n_bytes(self) -> np.ndarray:
        """The size of each prefix and each body, alternating, int64."""
        return np.stack([self.messages["prefix_bytes"], self.messages["body_bytes"]], axis=1).ravel().astype(np.int64)

    def of(self, is_kept: np.ndarray) -> "RenderedDialogues":
        """The dialogues of a mask, in the same order."""
        if is_kept.all():
            return self
        message_is_kept = np.repeat(is_kept, self.n_messages)
        texts_B = self.texts_B[np.repeat(np.repeat(message_is_kept, 2), self.n_bytes)]
        return RenderedDialogues(texts_B, self.messages[message_is_kept], self.n_messages[is_kept])


def render(dialogues: Sequence[Dialogue], continue_within_seconds: float | None = None) -> RenderedDialogues:
    """The texts of dialogues and their supervision (data/format/dialogue.py)."""
    texts = [text.encode() for text in texts_of(dialogues)]
    n_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
    messages = np.empty(len(texts) // 2, MESSAGE_COLUMNS)
    messages["prefix_bytes"], messages["body_bytes"] = n_bytes[::2], n_bytes[1::2]
    trained: list[bool] = []
    labels: list[int] = []
    opening: list[bool] = []
    for dialogue in dialogues:
        is_trained, label = supervision(dialogue, continue_within_seconds)
        trained += is_trained
        labels += label
        n_opening = n_opening_messages(dialogue.messages)
        opening += [True] * n_opening + [False] * (len(label) - n_opening)
    messages["is_trained"], messages["label"], messages["opening"] = trained, labels, opening
    n_messages = np.array([len(dialogue.messages) for dialogue in dialogues], np.int64)
    return RenderedDialogues(np.frombuffer(b"".join(texts), np.uint8), messages, n_messages)


def add_control_tokens(
    tokenizer: Encoder, rendered: RenderedDialogues, ids: np.ndarray, n_ids: np.ndarray
) -> EncodedDialogues:
    """Dialogues from the token ids of their texts, `n_ids` of each prefix and body, alternating."""
    messages, n_prefix, n_body = rendered.messages, n_ids[::2], n_ids[1::2]
    message_edges = np.append(0, np.cumsum(rendered.n_messages))
    first = message_edges[:-1]  # message of each dialogue
    part_sizes = np.stack([1 + n_prefix, n_body + 1], axis=1)  # header and reply
    part_sizes[first, 0] += 1  # <bos>
    text_starts, ends = np.cumsum(part_sizes).reshape(-1, 2).T
    message_starts = text_starts - 1 - n_prefix
    edges = np.append(message_starts[first] - 1, len(ids) + 2 * len(messages) + len(first))
    tokens = np.empty(edges[-1], np.int64)
    is_text = np.ones(len(tokens), bool)
    controls = ((edges[:-1], tokenizer.bos_id), (message_starts, tokenizer.message_id), (ends - 1, tokenizer.end_id))
    for places, control in controls:
        tokens[places], is_text[places] = control, False
    tokens[is_text] = ids
    is_trained = np.stack([np.zeros(len(messages), np.uint8), messages["is_trained"]], axis=1)
    loss_mask = np.repeat(is_trained.ravel(), part_sizes.ravel())
    label = np.full(len(tokens), NO_LABEL, np.int8)
    label[ends - 1] = messages["label"]
    n_opening = np.diff(np.append(0, np.cumsum(messages["opening"], dtype=np.int64))[message_edges])
    return EncodedDialogues(tokens, loss_mask, label, message_starts, text_starts, edges, message_edges, n_opening)


def encode_dialogue(
    tokenizer: Encoder, dialogue: Dialogue, continue_within_seconds: float | None = None
) -> EncodedDialogue:
    """One dialogue; training data is encoded by the same functions, many dialogues at a time."""
    encoded = tokenizer.encode_many(texts_of([dialogue]))
    n_ids = np.fromiter(map(len, encoded), np.int64, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.int64, int(n_ids.sum()))
    return add_control_tokens(tokenizer, render([dialogue], continue_within_seconds), ids, n_ids).one(0)
