"""Dialogues in columns give the documents of a plain loop over messages; every encoder follows one definition."""

from dataclasses import fields
from itertools import takewhile

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import NARRATOR, NO_LABEL, Dialogue, Message, continuation_labels
from data.format.encode import (
    EncodedDialogue,
    add_control_tokens,
    encode_dialogue,
    encode_header,
    encode_message,
    encode_prompt,
    escape,
    render,
)
from data.format.tokenize import BulkEncoder
from data.format.tokenizer import DialogueTokenizer
from data.packed.cut import CutRule, cut, cut_all
from data.packed.packing import Document, EncodedCorpus


@st.composite
def dialogues(draw: st.DrawFn) -> Dialogue:
    speakers = draw(st.lists(st.sampled_from(["Ann", "Bob", NARRATOR, "<|end|>", "Zoë"]), min_size=1, max_size=9))
    text = st.one_of(st.text(max_size=20), st.sampled_from(["so " * 30, "hi", "<|message|>"]))
    texts = [draw(text) for _ in speakers]
    times = [draw(st.sampled_from([None, 10.0 * number, 3.0 * number])) for number, _ in enumerate(speakers)]
    messages = tuple(Message(*given) for given in zip(speakers, texts, times, strict=True))
    return Dialogue("d", messages, draw(st.sampled_from(speakers)))


def plainly(tokenizer: DialogueTokenizer, dialogue: Dialogue, within: float | None) -> EncodedDialogue:
    """The token form as documented, message by message."""
    tokens, mask, label, starts, text_starts = [tokenizer.bos_id], [0], [NO_LABEL], [], []
    for message, continues in zip(dialogue.messages, continuation_labels(dialogue, within), strict=True):
        starts.append(len(tokens))
        header = [tokenizer.message_id, *tokenizer.encode(escape(message.speaker) + ":")]
        reply = [*tokenizer.encode(" " + escape(message.text)), tokenizer.end_id]
        tokens += header + reply
        mask += [0] * len(header) + [int(message.speaker == dialogue.character)] * len(reply)
        label += [NO_LABEL] * (len(header) + len(reply) - 1) + [continues]
        text_starts.append(starts[-1] + len(header))
    n_opening = len(list(takewhile(lambda message: message.speaker == NARRATOR, dialogue.messages)))
    arrays = (np.array(tokens), np.array(mask, np.uint8), np.array(label, np.int8))
    return EncodedDialogue(*arrays, np.array(starts), np.array(text_starts), n_opening)


@settings(max_examples=100)
@given(dialogue=dialogues(), within=st.sampled_from([None, 5.0]))
def test_one_dialogue_is_encoded_as_documented(
    tokenizer: DialogueTokenizer, dialogue: Dialogue, within: float | None
) -> None:
    encoded, expected = encode_dialogue(tokenizer, dialogue, within), plainly(tokenizer, dialogue, within)
    for field in fields(EncodedDialogue):
        assert np.array_equal(getattr(encoded, field.name), getattr(expected, field.name)), field.name
    prompt = encode_prompt(tokenizer, dialogue.messages, dialogue.character)
    header = encode_header(tokenizer, dialogue.character)
    assert prompt == [*expected.tokens.tolist(), *header]


def one_by_one(
    tokenizer: DialogueTokenizer, given_dialogues: list[Dialogue], within: float | None, rule: CutRule
) -> list[Document]:
    encoded = (plainly(tokenizer, dialogue, within) for dialogue in given_dialogues)
    return [piece for number, one in enumerate(encoded) for piece in cut(one, rule, number)]


def loses_its_opening(tokenizer: DialogueTokenizer, dialogue: Dialogue, row_length: int) -> bool:
    """Whether a dialogue is cut, and the narrator's messages at its beginning take more than half a row."""
    opening = list(takewhile(lambda message: message.speaker == NARRATOR, dialogue.messages))
    size = sum(len(encode_message(tokenizer, message)) for message in opening)
    return len(encode_dialogue(tokenizer, dialogue).tokens) > row_length and size > row_length // 2


@settings(max_examples=200)
@given(
    given_dialogues=st.lists(dialogues(), max_size=6),
    row_length=st.sampled_from([16, 40, 4096]),
    within=st.sampled_from([None, 5.0]),
    keep=st.integers(0, 63),
    context=st.integers(0, 8),
)
def test_columns_give_the_same_documents(
    tokenizer: DialogueTokenizer,
    given_dialogues: list[Dialogue],
    row_length: int,
    within: float | None,
    keep: int,
    context: int,
) -> None:
    columns = render(given_dialogues, within)
    is_kept = np.array([keep >> number & 1 for number in range(len(given_dialogues))], bool)
    kept = [dialogue for dialogue, is_in in zip(given_dialogues, is_kept, strict=True) if is_in]
    encoder, inside_character_V = BulkEncoder(tokenizer), tokenizer.inside_character()
    for rendered, expected in ((columns, given_dialogues), (columns.of(is_kept), kept)):
        rule = CutRule(row_length, context, inside_character_V)
        ids, n_ids = encoder.encode(rendered.texts_B, rendered.n_bytes)
        encoded = add_control_tokens(tokenizer, rendered, ids, n_ids)
        corpus, without_opening = cut_all(encoded, rule, tokenizer.vocab_size)
        assert without_opening == [n for n, one in enumerate(expected) if loses_its_opening(tokenizer, one, row_length)]
        documents = one_by_one(tokenizer, expected, within, rule)
        joined = EncodedCorpus.of(documents, tokenizer.vocab_size)
        for field in fields(EncodedCorpus):
            found, wanted = getattr(corpus, field.name), getattr(joined, field.name)
            assert np.array_equal(found, wanted)
            assert found.dtype == wanted.dtype
