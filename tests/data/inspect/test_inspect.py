"""Looking at prepared data: rows with their masks and labels, the figures, and one line for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.format.dialogue import Dialogue, Message
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.inspect.__main__ import HISTOGRAM_FILE, main, pick_rows, row_as_text
from data.packed.cut import CutRule, cut
from data.packed.packing import EncodedCorpus
from data.packed.shards import ShardError, packed_rows
from data.prepare import main as prepare


def test_rows_show_replies_labels_and_padding(tokenizer: DialogueTokenizer) -> None:
    unwanted = Message("Ann", "bah\x1b[2J", metadata={"engagement_label": 0, "trained": False})
    dialogue = Dialogue("d", (Message("Bob", "hi [red]"), Message("Ann", "hello you"), Message("Bob", "bye")), "Ann")
    thrown_away = Dialogue("e", (Message("Bob", "so?"), unwanted), "Ann")
    rule = CutRule(90, 20, tokenizer.inside_character())
    pieces = [
        piece for n, d in enumerate((dialogue, thrown_away)) for piece in cut(encode_dialogue(tokenizer, d), rule, n)
    ]
    (row,) = packed_rows(EncodedCorpus.of(pieces, tokenizer.vocab_size), [[0, 1]], 90)
    text = row_as_text(row, tokenizer)
    first, second = (len(piece.tokens) for piece in pieces)
    n_trained = np.count_nonzero(pieces[0].loss_mask)
    assert text.plain.splitlines() == [
        f"-- document 0: dialogue 0, {first} tokens from 0, {n_trained} of them the character's",
        "<bos><|message|>Bob: hi [red]<|end|>",
        "<|message|>Ann: hello you<|end|> [label 1]",
        "<|message|>Bob: bye<|end|>",
        f"-- document 1: dialogue 1, {second} tokens from {first}, 0 of them the character's",
        "<bos><|message|>Bob: so?<|end|>",
        "<|message|>Ann: bah\u241b[2J<|end|> [label 0]",
        f"{90 - first - second} x <pad>",
    ]
    green = [text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style)]
    assert green == [" hello you", "<|end|>"]


def test_random_rows_follow_the_seed() -> None:
    drawn = pick_rows(None, 10, 0, 500, "train")
    assert drawn == pick_rows(None, 10, 0, 500, "train") == sorted(set(drawn))
    assert len(drawn) == 10 and drawn[0] >= 0 and drawn[-1] < 500
    assert drawn != pick_rows(None, 10, 1, 500, "train")
    assert pick_rows(None, 10, 0, 3, "train") == [0, 1, 2]
    assert pick_rows([2, 0, 2], 10, 0, 3, "train") == [2, 0, 2]
    with pytest.raises(ShardError, match="--rows 3: train has the rows 0 to 2"):
        pick_rows([3], 10, 0, 3, "train")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: DialogueTokenizer) -> Path:
    """The run directory of a small data.prepare with one bad record."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    lines = ['{"id": 3}']
    for number in range(40):
        messages = [
            {"speaker": ("Ann", "Bob")[turn % 2], "text": f"hi {number} {turn}"} for turn in range(number % 9 + 2)
        ]
        lines.append(json.dumps({"id": f"c{number}", "messages": messages, "character": "Bob"}))
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "stage": "data", "run_dir": str(folder / "run"), "seed": 0, "row_length": 64, "continue_within_seconds": None,
        "sources": [{"kind": "chat_jsonl", "path": str(folder / "chats.jsonl")}], "max_bad_fraction": 0.1,
        "split": {"kind": "fraction", "heldout": 0.2}, "tokenizer": {"kind": "file", "path": str(folder)},
    }  # fmt: skip
    (folder / "data.yaml").write_text(json.dumps(recipe))
    assert prepare([str(folder / "data.yaml")]) == 0
    return folder / "run"


def test_it_shows_rows_figures_lengths_and_quarantine(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(prepared)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("train row") == 10
    for expected in ("partner continues", "kept", "density", "median", "quarantined: 1 records", "chats.jsonl:1: "):
        assert expected in printed
    assert str(prepared / HISTOGRAM_FILE) in printed
    assert (prepared / HISTOGRAM_FILE).read_bytes().startswith(b"\x89PNG")
    plot = tmp_path / "deep" / "plot.png"
    assert main([str(prepared), "--side", "heldout", "--rows", "1", "0", "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("heldout row 1") < printed.index("heldout row 0")
    assert "train row" not in printed and plot.exists()
    assert main([str(prepared), "--count", "0"]) == 0
    assert " row " not in capsys.readouterr().out.split("the whole data")[0]


def test_prepare_still_knows_a_directory_that_was_looked_at(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(prepared)]) == 0
    assert prepare([str(prepared.parent / "data.yaml")]) == 0
    assert "is finished: " in capsys.readouterr().out


def test_errors_are_one_line(
    tmp_path: Path, prepared: Path, write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "python -m data.prepare" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "manifest.json: damaged" in capsys.readouterr().err
    assert main([str(prepared)[:-1]]) == 2
    assert f"no such directory; did you mean {prepared}?" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "expected the run_dir of a data recipe" in capsys.readouterr().err
    assert main([str(prepared), "--rows", "99999"]) == 2
    assert "--rows 99999: train has the rows 0 to" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([str(prepared), "--rows", "0", "--plot", str(tmp_path / "file" / "x.png")]) == 2
    assert "file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main([str(prepared), "--count", "-1"])
    assert left.value.code == 2
