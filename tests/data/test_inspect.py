"""Looking at prepared rows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.dialogue import Dialogue, Message, encode_dialogue
from data.inspect import main, row_as_text
from data.packing import EncodedCorpus, cut
from data.shards import packed_rows
from data.tokenizer import DialogueTokenizer


def test_rows_show_replies_labels_and_padding(tokenizer: DialogueTokenizer) -> None:
    dialogue = Dialogue("d", (Message("Bob", "hi [red]"), Message("Ann", "hello you"), Message("Bob", "bye")), "Ann")
    corpus = EncodedCorpus.of(cut(encode_dialogue(tokenizer, dialogue), 64), tokenizer.vocab_size)
    (row,) = packed_rows(corpus, [[0]], 64)
    text = row_as_text(row, tokenizer)
    assert text.plain.splitlines() == [
        f"document 0: {np.count_nonzero(row.tokens_L)} tokens",
        "<bos><|message|>Bob: hi [red]<|end|>",
        "<|message|>Ann: hello you<|end|> [partner continues]",
        "<|message|>Bob: bye<|end|>",
        f"{np.count_nonzero(row.tokens_L == 0)} x <pad>",
    ]
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "green")
    assert green == " hello you"


def test_errors_are_one_line(
    tmp_path: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "python -m data.prepare" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "manifest.json: damaged" in capsys.readouterr().err
