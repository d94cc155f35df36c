"""Show prepared data: figures, document lengths, rows as text with boundaries, loss masks and labels, and the reasons
of quarantined records.

python -m data.inspect runs/demo/data                                  # ten random rows of the training side
python -m data.inspect runs/demo/data --side heldout --rows 0 17
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from data.clean.ledger import Ledger
from data.format.tokenizer import DialogueTokenizer, TokenizerError
from data.inspect.lengths import length_table, write_histogram
from data.inspect.quarantine import print_quarantine
from data.inspect.terminal_text import visible
from data.packed.packing import NO_DIALOGUE
from data.packed.shards import MANIFEST_FILE, PackedDataset, PackedRow, ShardError
from data.pipeline.report import record_table, side_table
from recipes.stage_errors import run_entry

SIDES = ("train", "heldout")
HISTOGRAM_FILE = Path("plots") / "document_lengths.png"
_QUARANTINE_FILE = "quarantine.jsonl"
_ANSWER, _OTHER, _CONTROL, _PADDING, _BOUNDARY = "green", "default", "dim", "dim strike", "bold magenta"
_REPEATED = "dim italic"
_LABELS = {0: (" [label 0]", "bold red"), 1: (" [label 1]", "bold blue")}


def row_as_text(row: PackedRow, tokenizer: DialogueTokenizer) -> Text:
    """The documents of a row, with trained text in green, dim control tokens, and labels."""
    text = Text()
    start = 0
    for number, (length, dialogue, first_message, n_repeated) in enumerate(row.documents.tolist()):
        tokens, loss_mask = row.tokens_L[start : start + length], row.loss_mask_L[start : start + length]
        if dialogue == NO_DIALOGUE:
            text.append(f"{length} x <pad>\n", _PADDING)
            break
        origin = f"dialogue {dialogue}" + (f" from message {first_message}" if n_repeated else "")
        counts = f"{length} tokens from {start}, {np.count_nonzero(loss_mask)} of them the character's"
        text.append(f"-- document {number}: {origin}, {counts}\n", _BOUNDARY)
        label = row.label_L[start : start + length]
        if n_repeated:
            shown = visible(tokenizer.decode(tokens[:n_repeated].tolist(), show_control=True))
            text.append(f"{shown}\n-- the above is repeated as context, not trained\n", _REPEATED)
        own = slice(n_repeated, length)
        _append_document(text, tokens[own], loss_mask[own], label[own], tokenizer)
        start += length
    return text


def _append_document(
    text: Text, tokens: np.ndarray, loss_mask: np.ndarray, label: np.ndarray, tokenizer: DialogueTokenizer
) -> None:
    is_control = tokens <= tokenizer.end_id
    changes = np.flatnonzero((np.diff(loss_mask.astype(int)) != 0) | is_control[1:] | is_control[:-1]) + 1
    for first, last in zip([0, *changes], [*changes, len(tokens)], strict=True):
        is_trained = bool(loss_mask[first])
        # trained control tokens are targets too: the <|end|> of the character's messages
        style = (f"{_CONTROL} {_ANSWER}" if is_trained else _CONTROL) if is_control[first] else ""
        style = style or (_ANSWER if is_trained else _OTHER)
        text.append(visible(tokenizer.decode(tokens[first:last].tolist(), show_control=True)), style)
        if int(label[first]) in _LABELS:
            text.append(*_LABELS[int(label[first])])
        if tokens[first] == tokenizer.end_id:
            text.append("\n")


def read_figures(run_dir: Path) -> dict[str, Any]:
    """The manifest of prepared data. Raises ShardError if the directory is not finished."""
    path = run_dir / MANIFEST_FILE
    if not run_dir.is_dir():
        beside = [str(found.parent) for found in run_dir.parent.glob(f"*/{MANIFEST_FILE}")]
        close = difflib.get_close_matches(str(run_dir), beside, n=1)
        hint = f"did you mean {close[0]}?" if close else "expected the run_dir of a data recipe"
        raise ShardError(f"{run_dir}: no such directory; {hint}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        side_table({side: manifest[side] for side in SIDES})
        record_table(Ledger.from_dict(manifest["records"]))
    except OSError:
        raise ShardError(f"{path}: missing; prepare the data with: python -m data.prepare <recipe>") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path}: damaged ({error!r}); run data.prepare again") from None
    return manifest


def pick_rows(asked: Sequence[int] | None, count: int, seed: int, n_rows: int, side: str) -> list[int]:
    """The requested rows, or `count` random ones by the seed, sorted. Raises ShardError for a row that does not
    exist."""
    if asked is None:
        return sorted(np.random.default_rng(seed).choice(n_rows, min(count, n_rows), replace=False).tolist())
    for number in asked:
        if not 0 <= number < n_rows:
            raise ShardError(f"--rows {number}: {side} has the rows 0 to {n_rows - 1}")
    return list(asked)


def show(arguments: argparse.Namespace, console: Console) -> None:
    """Print everything. Raises ShardError or TokenizerError for unreadable data, OSError for the plot."""
    run_dir: Path = arguments.run_dir
    manifest = read_figures(run_dir)
    sides = {side: PackedDataset(run_dir / side, verify="sizes") for side in SIDES}
    tokenizer = DialogueTokenizer.load(run_dir)
    dataset = sides[arguments.side]
    rows = pick_rows(arguments.rows, arguments.count, arguments.seed, len(dataset), arguments.side)
    for number in rows:
        console.rule(f"{arguments.side} row {number}")
        console.print(row_as_text(dataset.row(number), tokenizer), soft_wrap=True)
    if rows:
        legend = Text("green", _ANSWER).append(": the character's text, which SFT and DPO train; ", "dim")
        legend.append("-- document", _BOUNDARY).append(": attention and targets do not cross; ", "dim")
        legend.append("[label 1]", "bold blue").append(": the partner writes again, ", "dim")
        legend.append("[label 0]", "bold red").append(": does not (labels of the scorer)", "dim")
        console.print(legend, soft_wrap=True)
    console.rule("the whole data")
    console.print(record_table(Ledger.from_dict(manifest["records"])))
    console.print(side_table({side: manifest[side] for side in SIDES}))
    lengths = {side: data.documents()["length"] for side, data in sides.items()}
    console.print(length_table(lengths, dataset.row_length))
    plot = arguments.plot or run_dir / HISTOGRAM_FILE
    write_histogram(plot, lengths, dataset.row_length)
    console.print(f"histogram of the document lengths: {plot.resolve()}", highlight=False, soft_wrap=True)
    print_quarantine(run_dir / _QUARANTINE_FILE, console)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; the exit code is 0, 2 for a user error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the run_dir of a data recipe")
    parser.add_argument("--side", choices=SIDES, default="train")
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of the rows to show, instead of random ones")
    parser.add_argument("--count", type=int, default=10, help="how many random rows (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="which random rows (default 0)")
    parser.add_argument("--plot", type=Path, help=f"file of the histogram (default RUN_DIR/{HISTOGRAM_FILE})")
    arguments = parser.parse_args(argv)
    if arguments.count < 0 or arguments.seed < 0:
        parser.error("--count and --seed: expected numbers of at least 0")
    return run_entry(lambda: show(arguments, Console()), arguments.run_dir, (ShardError, TokenizerError))


if __name__ == "__main__":
    sys.exit(main())
