"""Cutting: every token is trained in one document, later documents begin with context, characters stay whole."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.encode import EncodedDialogue, encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.packed.cut import CutRule, cut, repeats_opening
from data.packed.packing import Document

END, CONTINUES = 4, 7
INSIDE_V = np.zeros(200, bool)
INSIDE_V[CONTINUES] = True


@st.composite
def encoded_dialogues(draw: st.DrawFn) -> EncodedDialogue:
    """Made of plain numbers: <bos>=2, then messages <|message|>=3, header 10.., text 100.. where 6 7 7 7 is a character
    of four tokens, <|end|>=4."""
    tokens, trained, label, starts, text_starts = [2], [0], [-1], [], []
    n_messages = draw(st.integers(1, 6))
    for _ in range(n_messages):
        header, character = draw(st.integers(1, 3)), draw(st.booleans())
        text = draw(st.lists(st.sampled_from([[100], [6, CONTINUES, CONTINUES, CONTINUES]]), min_size=1, max_size=40))
        ids = [token for piece in text for token in piece]
        starts.append(len(tokens))
        text_starts.append(len(tokens) + 1 + header)
        tokens += [3, *range(10, 10 + header), *ids, END]
        trained += [0] * (1 + header) + [int(character)] * (len(ids) + 1)
        label += [-1] * (1 + header + len(ids)) + [1 if character else -1]
    return EncodedDialogue(
        np.array(tokens),
        np.array(trained, np.uint8),
        np.array(label, np.int8),
        np.array(starts),
        np.array(text_starts),
        draw(st.integers(0, n_messages)),
    )


@st.composite
def rules(draw: st.DrawFn) -> CutRule:
    row_length = draw(st.integers(16, 96))
    return CutRule(row_length, draw(st.integers(0, row_length // 2)), INSIDE_V)


def own_of(pieces: list[Document], name: str) -> list[int]:
    """One field of the tokens that the documents do not repeat."""
    return [value for piece in pieces for value in getattr(piece, name)[piece.n_repeated :].tolist()]


@settings(max_examples=200, deadline=None)
@given(encoded=encoded_dialogues(), rule=rules())
def test_every_token_is_trained_once_and_in_order(encoded: EncodedDialogue, rule: CutRule) -> None:
    pieces = cut(encoded, rule, dialogue=5)
    if len(encoded.tokens) <= rule.row_length:
        assert len(pieces) == 1, "a dialogue that fits stays whole"
    assert pieces[0].n_repeated == 0
    for name in ("tokens", "loss_mask", "label"):
        assert own_of(pieces, name) == getattr(encoded, name).tolist()
    position = 0
    for piece in pieces:
        assert 2 <= len(piece.tokens) == len(piece.loss_mask) == len(piece.label) <= rule.row_length
        assert piece.tokens[0] == 2 and piece.dialogue == 5
        assert not piece.loss_mask[: piece.n_repeated].any()
        assert (piece.label[: piece.n_repeated] == -1).all()
        number = np.searchsorted(encoded.message_starts, max(position, 1), "right") - 1
        assert piece.first_message == number
        position += len(piece.tokens) - piece.n_repeated


@settings(max_examples=200, deadline=None)
@given(encoded=encoded_dialogues(), rule=rules())
def test_cuts_are_between_messages_or_else_between_characters(encoded: EncodedDialogue, rule: CutRule) -> None:
    edges = np.append(encoded.message_starts, len(encoded.tokens))
    position = 0
    for piece in cut(encoded, rule):
        position += len(piece.tokens) - piece.n_repeated
        if position not in edges:
            number = int(np.searchsorted(edges, position)) - 1
            assert edges[number + 1] - edges[number] > rule.row_length - 1, "a message that fits a row was cut"
        pairs = zip(piece.tokens[:-1].tolist(), piece.tokens[1:].tolist(), strict=True)
        assert all(before in (6, CONTINUES) for before, after in pairs if after == CONTINUES), "a character was cut"
        assert piece.tokens[-1] != 6 and (piece.tokens[-1] != CONTINUES or piece.tokens[-4] == 6)


def is_tail(context: list[int], encoded: EncodedDialogue, position: int) -> bool:
    """Whether it is whole messages that end at `position`, or a name and the end of that text, after such a tail."""
    tokens, edges = encoded.tokens.tolist(), encoded.message_starts.tolist()
    if not context or any(context == tokens[edge:position] for edge in edges):
        return True
    number = max(n for n, edge in enumerate(edges) if edge < position)
    header = tokens[edges[number] : encoded.text_starts[number]]
    for n_text in range(len(context) - len(header) + 1):
        own = header + tokens[position - n_text : position]
        if context[len(context) - len(own) :] == own and is_tail(context[: -len(own)], encoded, edges[number]):
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(encoded=encoded_dialogues(), rule=rules())
def test_context_is_the_opening_and_the_newest_before_the_cut(encoded: EncodedDialogue, rule: CutRule) -> None:
    tokens, edges = encoded.tokens.tolist(), [*encoded.message_starts.tolist(), len(encoded.tokens)]
    opening_end, position = edges[encoded.n_opening], 0
    for piece in cut(encoded, rule):
        context = piece.tokens[1 : piece.n_repeated].tolist()
        opening = tokens[1:opening_end]
        with_opening = opening and opening_end <= position and context[: len(opening)] == opening
        tails = [context, context[len(opening) :]] if with_opening else [context]
        tails = [tail for tail in tails if is_tail(tail, encoded, position)]
        assert tails
        assert min(map(len, tails)) <= max(rule.context_tokens, 4), "4: a name, which a message's later pieces repeat"
        assert len(context) <= 3 * rule.row_length // 4
        position += len(piece.tokens) - piece.n_repeated


def of_sizes(*sizes: tuple[int, int], n_opening: int = 0) -> EncodedDialogue:
    """A dialogue of plain numbers: for each message how many tokens stand before its text, and how many the text has,
    its <|end|> with it."""
    starts = np.cumsum([1, *(sum(size) for size in sizes)])
    headers = np.array([header for header, _ in sizes])
    n = int(starts[-1])
    zeros, none = np.zeros(n, np.uint8), np.full(n, -1, np.int8)
    return EncodedDialogue(np.arange(100, 100 + n) % 200, zeros, none, starts[:-1], starts[:-1] + headers, n_opening)


NOTHING_INSIDE_V = np.zeros(300, bool)


@pytest.mark.parametrize(("header", "n_repeated"), [(6, 6), (7, 7), (8, 0)])
def test_a_cut_message_repeats_its_name_where_eight_tokens_of_text_fit_beside_it(header: int, n_repeated: int) -> None:
    """Also without any context: 16 tokens of a row less <bos> and these 8 leave 7."""
    first, *later = cut(of_sizes((header, 60)), CutRule(16, 0, NOTHING_INSIDE_V))
    assert first.n_repeated == 0 and {piece.n_repeated - 1 for piece in later} == {n_repeated}


@pytest.mark.parametrize(("header", "n_repeated"), [(6, 12), (7, 0)])
def test_the_end_of_the_message_before_is_repeated_where_its_name_takes_half_at_most(
    header: int, n_repeated: int
) -> None:
    pieces = cut(of_sizes((header, 90), (2, 16)), CutRule(32, 12, NOTHING_INSIDE_V))
    (last,) = [piece for piece in pieces if piece.first_message == 1]
    assert last.n_repeated - 1 == n_repeated


@pytest.mark.parametrize(("opening", "n_repeated"), [(32, 48), (33, 32)])
def test_opening_and_context_take_three_quarters_of_a_row_at_most(opening: int, n_repeated: int) -> None:
    """And the opening half of one: a longer opening is not repeated, and the context is 32 tokens."""
    encoded, rule = of_sizes((2, opening - 2), (2, 31), (2, 300), n_opening=1), CutRule(64, 32, NOTHING_INSIDE_V)
    inside = [piece.n_repeated - 1 for piece in cut(encoded, rule) if piece.first_message == 2][1:]
    assert len(inside) > 3 and set(inside) == {n_repeated}
    assert repeats_opening(encoded, rule) == (opening == 32)


@pytest.mark.parametrize(("size", "n_repeated"), [(21, 10), (22, 0)])
def test_the_opening_is_repeated_where_it_just_fits_beside_a_whole_message(size: int, n_repeated: int) -> None:
    encoded = of_sizes((2, 8), (2, 30), (2, size - 2), n_opening=1)
    last = cut(encoded, CutRule(32, 0, NOTHING_INSIDE_V))[-1]
    assert (last.first_message, last.n_repeated - 1) == (2, n_repeated)


def shown(tokenizer: DialogueTokenizer, messages: list[Message], rule: CutRule) -> list[tuple[str, str]]:
    """Of each document the text that it repeats and its own."""
    pieces = cut(encode_dialogue(tokenizer, Dialogue("d", tuple(messages), "Ann")), rule)
    return [
        tuple(tokenizer.decode(part.tolist(), show_control=True) for part in np.split(p.tokens, [p.n_repeated]))
        for p in pieces
    ]  # type: ignore[misc]


def test_a_reply_follows_its_prompt_and_the_scene(tokenizer: DialogueTokenizer) -> None:
    size = len(tokenizer.encode(" so so so so"))
    scene, prompt, reply = Message(NARRATOR, "A nap."), Message("Bob", "so " * 60), Message("Ann", "so so so so")
    rule = CutRule(80, 24, tokenizer.inside_character())
    documents = shown(tokenizer, [scene, Message("Ann", "hi"), prompt, reply], rule)
    repeated, own = documents[-1]
    assert size < 24 and own.endswith("<|message|>Ann: so so so so<|end|>")
    assert repeated.startswith("<bos><|message|>narrator: A nap.<|end|>")
    assert "<|message|>Bob: so" in repeated
    without = shown(tokenizer, [scene, Message("Ann", "hi"), prompt, reply], CutRule(80, 0, rule.inside_character_V))
    assert without[1][0] == "<bos><|message|>narrator: A nap.<|end|>"


def test_the_rest_of_a_long_reply_follows_its_beginning_and_its_prompt(tokenizer: DialogueTokenizer) -> None:
    prompt, reply = Message("Bob", "hello how are you doing"), Message("Ann", "so " * 120)
    for repeated, _ in shown(tokenizer, [prompt, reply], CutRule(96, 32, tokenizer.inside_character()))[2:]:
        assert repeated.startswith("<bos><|message|>Bob:") and "<|end|><|message|>Ann: so" in repeated


def test_whole_messages_are_repeated_where_they_fit(tokenizer: DialogueTokenizer) -> None:
    messages = [Message(("Bob", "Ann")[n % 2], f"so {n}") for n in range(10, 30)]
    one = len(encode_dialogue(tokenizer, Dialogue("d", (messages[1],), "Ann")).tokens) - 1
    documents = shown(tokenizer, messages, CutRule(8 * one, 2 * one + 3, tokenizer.inside_character()))
    assert len(documents) > 2
    for (_, before), (repeated, _) in pairwise(documents):
        assert repeated.count("<|message|>") == 2
        assert before.endswith(repeated.removeprefix("<bos>"))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("🐱é漢a "), min_size=40, max_size=80), row_length=st.integers(16, 40))
def test_text_is_cut_between_characters(tokenizer: DialogueTokenizer, text: str, row_length: int) -> None:
    """The tokenizer of the tests knows none of these: each is two to four byte tokens."""
    rule = CutRule(row_length, row_length // 4, tokenizer.inside_character())
    messages = [Message("Bob", "hi"), Message("Ann", text)]
    pieces = cut(encode_dialogue(tokenizer, Dialogue("d", tuple(messages), "Ann")), rule)
    assert all("\ufffd" not in tokenizer.decode(piece.tokens.tolist()) for piece in pieces)
    answers = "".join(tokenizer.decode(piece.tokens[piece.loss_mask == 1].tolist()) for piece in pieces)
    assert answers == " " + text
