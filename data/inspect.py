"""Look at prepared data: its figures, and rows as text with the character's replies and the labels marked.

python -m data.inspect runs/demo/data --side heldout --rows 0 17
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.prepare_report import side_table
from data.shards import MANIFEST_FILE, PackedDataset, PackedRow, ShardError
from data.tokenizer import DialogueTokenizer, TokenizerError

_ANSWER, _OTHER, _CONTROL, _PADDING = "green", "default", "dim", "dim strike"
_LABELS = {0: (" [partner leaves]", "bold red"), 1: (" [partner continues]", "bold blue")}


def row_as_text(row: PackedRow, tokenizer: DialogueTokenizer) -> Text:
    """The row's documents one below the other: trained text green, control tokens dim, labels where they stand."""
    text = Text()
    start = 0
    for number, length in enumerate(row.document_lengths.tolist()):
        tokens = row.tokens_L[start : start + length]
        if tokens[0] == tokenizer.pad_id:
            text.append(f"{length} x <pad>\n", _PADDING)
            break
        text.append(f"document {number}: {length} tokens\n", "bold")
        _append_document(
            text, tokens, row.trained_L[start : start + length], row.label_L[start : start + length], tokenizer
        )
        start += length
    return text


def _append_document(
    text: Text, tokens: np.ndarray, trained: np.ndarray, label: np.ndarray, tokenizer: DialogueTokenizer
) -> None:
    is_control = tokens <= tokenizer.end_id
    changes = np.flatnonzero((np.diff(trained.astype(int)) != 0) | is_control[1:] | is_control[:-1]) + 1
    for first, last in zip([0, *changes], [*changes, len(tokens)], strict=True):
        style = _CONTROL if is_control[first] else _ANSWER if trained[first] else _OTHER
        text.append(tokenizer.decode(tokens[first:last].tolist(), show_control=True), style)
        if int(label[first]) in _LABELS:
            text.append(*_LABELS[int(label[first])])
        if tokens[first] == tokenizer.end_id:
            text.append("\n")


def figures(run_dir: Path) -> Table:
    """The manifest's figures of both sides. Raises ShardError when the directory is not finished."""
    path = run_dir / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return side_table({side: manifest[side] for side in ("train", "heldout")})
    except OSError:
        raise ShardError(f"{path}: missing; prepare the data with: python -m data.prepare <recipe>") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path}: damaged ({error!r}); run data.prepare again") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; the exit code is 0, or 2 for data that cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run_dir of a data recipe")
    parser.add_argument("--side", choices=("train", "heldout"), default="train")
    parser.add_argument("--rows", type=int, nargs="+", default=[0], help="numbers of the rows to show")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        console.print(figures(arguments.run_dir))
        dataset = PackedDataset(arguments.run_dir / arguments.side)
        tokenizer = DialogueTokenizer.load(arguments.run_dir)
        for number in arguments.rows:
            if not 0 <= number < len(dataset):
                raise ShardError(f"--rows {number}: {arguments.side} has the rows 0 to {len(dataset) - 1}")
            console.rule(f"{arguments.side} row {number}")
            console.print(row_as_text(dataset.row(number), tokenizer), soft_wrap=True)
        console.print("green: the character's reply, which SFT and DPO train", style="dim")
    except (ShardError, TokenizerError) as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
