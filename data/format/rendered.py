"""Dialogues as they are rendered, in columns: the text of all messages and what supervises it, ready to be encoded."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.format.dialogue import (
    NO_LABEL,
    Dialogue,
    EncodedDialogue,
    message_body,
    n_opening_messages,
    speaker_prefix,
    supervision,
)
from data.format.tokenize import BulkEncoder
from data.packed.cut import CutRule, cut, repeats_opening
from data.packed.packing import DOCUMENT, EncodedCorpus, token_dtype

MESSAGE = np.dtype(
    [("prefix_bytes", "<u4"), ("body_bytes", "<u4"), ("is_trained", "u1"), ("label", "i1"), ("opening", "u1")]
)
"""A message: the bytes of "speaker:" and of " text", whether SFT trains it, its continuation label, and whether it is
one of the narrator's messages that the dialogue begins with."""


@dataclass(frozen=True, slots=True)
class RenderedDialogues:
    """`texts_B` uint8: prefix and body of each message in UTF-8, one after the other; `messages` of type MESSAGE;
    `n_messages` of each dialogue, int64."""

    texts_B: np.ndarray
    messages: np.ndarray
    n_messages: np.ndarray

    def of(self, is_kept: np.ndarray) -> "RenderedDialogues":
        """Some of the dialogues (a mask), in the same order."""
        if is_kept.all():
            return self
        message_is_kept = np.repeat(is_kept, self.n_messages)
        n_bytes = self.messages["prefix_bytes"].astype(np.int64) + self.messages["body_bytes"]
        texts_B = self.texts_B[np.repeat(message_is_kept, n_bytes)]
        return RenderedDialogues(texts_B, self.messages[message_is_kept], self.n_messages[is_kept])


def render(
    dialogues: Sequence[Dialogue], continue_within_seconds: float | None
) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """The parts of RenderedDialogues: the texts as bytes, the messages, and how many each dialogue has."""
    said = [message for dialogue in dialogues for message in dialogue.messages]
    speakers = [message.speaker for message in said]
    prefixes = {speaker: speaker_prefix(speaker).encode() for speaker in dict.fromkeys(speakers)}
    texts = [b""] * (2 * len(said))
    texts[::2] = map(prefixes.__getitem__, speakers)
    texts[1::2] = [message_body(message.text).encode() for message in said]
    n_bytes = np.fromiter(map(len, texts), np.int64, len(texts))
    messages = np.empty(len(said), MESSAGE)
    messages["prefix_bytes"], messages["body_bytes"] = n_bytes[::2], n_bytes[1::2]
    trained_messages: list[bool] = []
    labels: list[int] = []
    opening: list[bool] = []
    for dialogue in dialogues:
        is_trained, label = supervision(dialogue, continue_within_seconds)
        trained_messages += is_trained
        labels += label
        n_opening = n_opening_messages(dialogue.messages)
        opening += [True] * n_opening + [False] * (len(label) - n_opening)
    messages["is_trained"], messages["label"], messages["opening"] = trained_messages, labels, opening
    return texts, messages, np.array([len(dialogue.messages) for dialogue in dialogues], np.int64)


def encode_rendered(
    rendered: RenderedDialogues, encoder: BulkEncoder, rule: CutRule
) -> tuple[EncodedCorpus, list[int]]:
    """The documents of the dialogues in order, as `cut(encode_dialogue(...))` makes them of each; their `dialogue` is
    its number among these. And the numbers of those that are cut and whose opening is too long to be repeated."""
    messages, tokenizer = rendered.messages, encoder.tokenizer
    n_messages, n_dialogues = len(messages), len(rendered.n_messages)
    n_bytes = np.empty(2 * n_messages, np.int64)
    n_bytes[::2], n_bytes[1::2] = messages["prefix_bytes"], messages["body_bytes"]
    ids, n_ids = encoder.encode(rendered.texts_B, n_bytes)
    n_prefix, n_body = n_ids[::2], n_ids[1::2]
    # <bos> of its dialogue and of those before, <|message|> and <|end|> of the messages before, stand before a message
    dialogue_of_message = np.repeat(np.arange(n_dialogues), rendered.n_messages)
    sizes = n_prefix + n_body + 2
    starts = np.cumsum(sizes) - sizes + dialogue_of_message + 1  # of <|message|>
    text_starts = starts + 1 + n_prefix
    ends = starts + sizes  # after <|end|>
    n_tokens = n_dialogues + int(sizes.sum())
    shift = starts + 1 - (np.cumsum(n_prefix + n_body) - (n_prefix + n_body))
    tokens = np.empty(n_tokens, np.int64)
    tokens[np.arange(len(ids)) + np.repeat(shift, n_prefix + n_body)] = ids
    first_messages = np.cumsum(rendered.n_messages) - rendered.n_messages
    tokens[starts[first_messages] - 1] = tokenizer.bos_id
    tokens[starts] = tokenizer.message_id
    tokens[ends - 1] = tokenizer.end_id
    label = np.full(n_tokens, NO_LABEL, np.int8)
    label[ends - 1] = messages["label"]
    steps = np.zeros(n_tokens + 1, np.int8)
    is_trained = messages["is_trained"].astype(bool)
    steps[text_starts[is_trained]] = 1
    steps[ends[is_trained]] -= 1
    loss_mask = np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)
    whole = EncodedDialogue(tokens, loss_mask, label, starts, text_starts)
    edges = np.append(starts[first_messages] - 1, n_tokens)
    opening_before = np.append(0, np.cumsum(messages["opening"], dtype=np.int64))
    first_messages = np.append(first_messages, n_messages)
    n_opening = np.diff(opening_before[first_messages])
    return _cut_all(whole, edges, first_messages, n_opening, rule, tokenizer.vocab_size)


def _cut_all(
    whole: EncodedDialogue,
    edges: np.ndarray,
    first_messages: np.ndarray,
    n_opening: np.ndarray,
    rule: CutRule,
    vocab_size: int,
) -> tuple[EncodedCorpus, list[int]]:
    """Dialogues one after the other (they begin at `edges`) as documents: those that fit are kept as they are. And
    those whose opening is not repeated."""
    sizes, dtype = np.diff(edges), token_dtype(vocab_size)
    uncut = np.zeros(len(sizes), DOCUMENT)
    uncut["length"], uncut["dialogue"] = sizes, np.arange(len(sizes))
    parts: list[EncodedCorpus] = []
    kept_from = 0  # dialogue
    without_opening: list[int] = []

    def keep_until(number: int) -> None:
        if number > kept_from or not parts:
            span = slice(int(edges[kept_from]), int(edges[number]))
            tokens = whole.tokens[span].astype(dtype)
            parts.append(EncodedCorpus(tokens, whole.loss_mask[span], whole.label[span], uncut[kept_from:number]))

    for number in np.flatnonzero(sizes > rule.row_length).tolist():
        keep_until(number)
        kept_from = number + 1
        one = _one(whole, edges, first_messages, number, int(n_opening[number]))
        parts.append(EncodedCorpus.of(cut(one, rule, number), vocab_size))
        if not repeats_opening(one, rule):
            without_opening.append(number)
    keep_until(len(sizes))
    return (parts[0] if len(parts) == 1 else EncodedCorpus.join(parts)), without_opening


def _one(
    whole: EncodedDialogue, edges: np.ndarray, first_messages: np.ndarray, number: int, n_opening: int
) -> EncodedDialogue:
    start, end = int(edges[number]), int(edges[number + 1])
    messages = slice(int(first_messages[number]), int(first_messages[number + 1]))
    return EncodedDialogue(
        whole.tokens[start:end],
        whole.loss_mask[start:end],
        whole.label[start:end],
        whole.message_starts[messages] - start,
        whole.text_starts[messages] - start,
        n_opening,
    )
