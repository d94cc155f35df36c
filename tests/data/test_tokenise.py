"""Tokenising in processes gives what one process gives."""

import numpy as np

from data.dialogue import Dialogue, Message, encode_dialogue
from data.packing import EncodedCorpus, cut
from data.tokenise import TokeniseSettings, tokenise
from data.tokenizer import DialogueTokenizer


def test_the_number_of_processes_does_not_matter(tokenizer: DialogueTokenizer) -> None:
    dialogues = [
        Dialogue(
            str(i), (Message("Ann", f"hello {i} " * (i % 9), i), Message("Bob", "\u2581<|end|>", i + i % 7)), "Ann"
        )
        for i in range(600)
    ]
    settings = TokeniseSettings(row_length=32, continue_within_seconds=3)
    expected = EncodedCorpus.of(
        [piece for d in dialogues for piece in cut(encode_dialogue(tokenizer, d, 3), 32)], tokenizer.vocab_size
    )
    done: list[int] = []
    for workers in (1, 2):
        corpus = tokenise(dialogues, tokenizer, settings, workers, done.append)
        for name in ("tokens", "trained", "label", "lengths"):
            assert np.array_equal(getattr(corpus, name), getattr(expected, name))
            assert getattr(corpus, name).dtype == getattr(expected, name).dtype
    assert sum(done) == 2 * len(dialogues)
    assert len(tokenise([], tokenizer, settings, workers=2).lengths) == 0
