"""Splits dialogues longer than a row into documents. Each token of a dialogue is trained in one document. Later
documents begin with repeated context (the narrator's opening and the newest messages before the split), which has no
loss and no labels."""

from dataclasses import dataclass

import numpy as np

from data.format.dialogue import NO_LABEL
from data.format.encode import EncodedDialogue, EncodedDialogues
from data.packed.packing import DOCUMENT, Document, EncodedCorpus, token_dtype

_LEAST_NEW = 8  # new tokens of a document: a character of four byte tokens always fits


@dataclass(frozen=True, slots=True)
class CutRule:
    """Rows of `row_length` tokens. A later document repeats the narrator's opening (if it takes at most half a row) and
    at most `context_tokens` of what follows it. `inside_character_V`: True for ids that continue a UTF-8 character,
    which cannot begin a document."""

    row_length: int
    context_tokens: int
    inside_character_V: np.ndarray

    def __post_init__(self) -> None:
        assert self.row_length >= 16 and 0 <= self.context_tokens <= self.row_length // 2


def cut(encoded: EncodedDialogue, rule: CutRule, dialogue: int = 0) -> list[Document]:
    """The dialogue as documents of at most `row_length` tokens, each beginning with `<bos>`.

    A dialogue that fits is one document. A longer one is split between messages, and a message longer than a row
    between characters of its text.
    """
    if len(encoded.tokens) <= rule.row_length:
        return [Document(encoded.tokens, encoded.loss_mask, encoded.label, dialogue)]
    return _Cutter(encoded, rule, dialogue).pieces()


def repeats_opening(encoded: EncodedDialogue, rule: CutRule) -> bool:
    """Whether the narrator's opening is short enough to be repeated, or there is none."""
    return _opening_tokens(encoded) <= rule.row_length // 2


def cut_all(encoded: EncodedDialogues, rule: CutRule, vocab_size: int) -> tuple[EncodedCorpus, list[int]]:
    """The documents of all dialogues in order; their `dialogue` is its number in `encoded`. Also the numbers of the
    split dialogues whose opening is too long to repeat."""
    sizes, dtype = np.diff(encoded.edges), token_dtype(vocab_size)
    whole = np.zeros(len(sizes), DOCUMENT)
    whole["length"], whole["dialogue"] = sizes, np.arange(len(sizes))
    parts: list[EncodedCorpus] = []
    without_opening: list[int] = []
    first = 0
    for number in [*np.flatnonzero(sizes > rule.row_length).tolist(), len(sizes)]:
        if number > first or not parts:  # dialogues that fit, up to the next one that does not
            span = slice(int(encoded.edges[first]), int(encoded.edges[number]))
            tokens = encoded.tokens[span].astype(dtype)
            parts.append(EncodedCorpus(tokens, encoded.loss_mask[span], encoded.label[span], whole[first:number]))
        if number < len(sizes):
            one = encoded.one(number)
            parts.append(EncodedCorpus.of(cut(one, rule, number), vocab_size))
            if not repeats_opening(one, rule):
                without_opening.append(number)
        first = number + 1
    return (parts[0] if len(parts) == 1 else EncodedCorpus.join(parts)), without_opening


def _opening_tokens(encoded: EncodedDialogue) -> int:
    """The number of tokens of the narrator's opening, without <bos>."""
    return int(np.append(encoded.message_starts, len(encoded.tokens))[encoded.n_opening]) - 1


class _Cutter:
    """Splits one dialogue. Positions are token positions; `edges` are the message starts and the end of the last
    message."""

    def __init__(self, encoded: EncodedDialogue, rule: CutRule, dialogue: int) -> None:
        self.encoded, self.rule, self.dialogue = encoded, rule, dialogue
        self.edges = np.append(encoded.message_starts, len(encoded.tokens))
        self.opening_end = 1 + _opening_tokens(encoded)

    def pieces(self) -> list[Document]:
        """All documents, in order."""
        documents, position, n = [], 1, len(self.encoded.tokens)
        while position < n:
            message = int(np.searchsorted(self.edges, position, "right")) - 1
            room = self.rule.row_length - 1
            size = int(self.edges[message + 1]) - int(self.edges[message])
            # a message that fits a row is not split; context gets the remaining room
            stays_whole = position == self.edges[message] and size <= room
            most = room - size if stays_whole else room - _LEAST_NEW
            repeated = self._context(position, message, most)
            end = self._end(position, position + room - sum(last - first for first, last in repeated))
            documents.append(self._document(repeated, position, end, message))
            position = end
        return documents

    def _end(self, position: int, furthest: int) -> int:
        """The end of a document that begins at `position`: the last edge up to `furthest`, or a position inside a
        message."""
        edge = int(self.edges[np.searchsorted(self.edges, furthest, "right") - 1])
        if edge > position:
            return edge
        while self.rule.inside_character_V[self.encoded.tokens[furthest]]:
            furthest -= 1
        return furthest

    def _context(self, position: int, message: int, most: int) -> list[tuple[int, int]]:
        """The spans of at most `most` tokens in total that a document repeats whose new tokens begin at `position`."""
        if position == 1:
            return []
        most = min(most, 3 * self.rule.row_length // 4)
        opening = self.opening_end - 1
        if 0 < opening <= most and repeats_opening(self.encoded, self.rule) and self.opening_end <= position:
            return [(1, self.opening_end), *self._tail(self.opening_end, position, message, most - opening)]
        return self._tail(1, position, message, most)

    def _tail(self, tail_from: int, position: int, message: int, most: int) -> list[tuple[int, int]]:
        """The newest whole messages between `tail_from` and `position` that fit; if not even the newest fits, its
        header and the end of its text. If the document continues a message, the beginning of that message gets half of
        the room and the messages that it answers the rest."""
        if position <= tail_from:
            return []
        budget, start = max(0, min(most, self.rule.context_tokens)), int(self.edges[message])
        is_inside = position > start
        first = int(self.edges[np.searchsorted(self.edges, max(tail_from, position - budget))])
        if first < (start if is_inside and start > tail_from else position):
            return [(first, position)]
        if not is_inside:
            message -= 1
            start = int(self.edges[message])
        text_start = int(self.encoded.text_starts[message])
        header = text_start - start
        if start < tail_from or text_start > position or header > (most if is_inside else budget // 2):
            return []  # nothing precedes, or the name leaves no room for text
        room = budget // 2 if is_inside and start > tail_from else budget
        text_from = max(text_start, position - max(0, room - header))
        while text_from < position and self.rule.inside_character_V[self.encoded.tokens[text_from]]:
            text_from += 1
        own = [(start, text_start), (text_from, position)]
        if not is_inside:
            return own if text_from < position else []
        return self._tail(tail_from, start, message, budget - header - (position - text_from)) + own

    def _document(self, repeated: list[tuple[int, int]], first: int, end: int, message: int) -> Document:
        spans = [slice(0, 1), *(slice(*span) for span in repeated), slice(first, end)]
        n_repeated = 1 + sum(last - start for start, last in repeated)
        tokens, loss_mask, label = (
            np.concatenate([of_all[span] for span in spans])
            for of_all in (self.encoded.tokens, self.encoded.loss_mask, self.encoded.label)
        )
        loss_mask[:n_repeated], label[:n_repeated] = 0, NO_LABEL
        return Document(tokens, loss_mask, label, self.dialogue, message, n_repeated if first > 1 else 0)
