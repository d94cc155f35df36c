"""Tokenising in processes gives what one process gives."""

import numpy as np

from data.dialogue import Dialogue, Message, encode_dialogue
from data.packing import Document, EncodedCorpus, cut
from data.tokenise import TokeniseSettings, tokenise
from data.tokenizer import DialogueTokenizer


def pieces(tokenizer: DialogueTokenizer, dialogue: Dialogue) -> list[Document]:
    return cut(encode_dialogue(tokenizer, dialogue, 3), 32)


def test_the_number_of_processes_does_not_matter(tokenizer: DialogueTokenizer) -> None:
    dialogues = [
        Dialogue(
            str(i), (Message("Ann", f"hello {i} " * (i % 9), i), Message("Bob", "\u2581<|end|>", i + i % 7)), "Ann"
        )
        for i in range(600)
    ]
    settings = TokeniseSettings(row_length=32, continue_within_seconds=3)
    expected = EncodedCorpus.of([piece for d in dialogues for piece in pieces(tokenizer, d)], tokenizer.vocab_size)
    done: list[int] = []
    for workers in (1, 2):
        parts = tokenise({"a": dialogues[:250], "b": dialogues[250:]}, tokenizer, settings, workers, done.append)
        assert parts["a"].lengths.sum() == sum(len(p.tokens) for d in dialogues[:250] for p in pieces(tokenizer, d))
        corpus = EncodedCorpus.join([parts["a"], parts["b"]])
        for name in ("tokens", "trained", "label", "lengths"):
            assert np.array_equal(getattr(corpus, name), getattr(expected, name))
            assert getattr(corpus, name).dtype == getattr(expected, name).dtype
    assert sum(done) == 2 * len(dialogues)
    assert tokenise({}, tokenizer, settings, workers=2) == {}
