"""How many trained tokens stand in a document's first message, where a reply has no prompt, and what repeating context
costs: python tests/data/measure_context.py runs/demo/data --row-length 1024 --fractions 0 0.125 0.25 0.5"""

import argparse
from pathlib import Path

import numpy as np

from data.format.dialogue_json import read_dialogues
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.packed.cut import CutRule, cut


def main() -> None:
    """Print one line for each fraction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run_dir of a data recipe")
    parser.add_argument("--row-length", type=int, required=True)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5])
    arguments = parser.parse_args()
    tokenizer = DialogueTokenizer.load(arguments.run_dir)
    inside_V = tokenizer.inside_character()
    dialogues = read_dialogues(arguments.run_dir / "dialogues" / "train.jsonl")
    encoded = [encode_dialogue(tokenizer, dialogue) for dialogue in dialogues]
    opening = sum(int(one.loss_mask[: one.message_starts[1]].sum()) for one in encoded if len(one.message_starts) > 1)
    trained = sum(int(one.loss_mask.sum()) for one in encoded)
    print(f"{len(encoded):,} dialogues, {trained:,} trained tokens, {opening / trained:.1%} of them open a dialogue")
    for fraction in arguments.fractions:
        rule = CutRule(arguments.row_length, int(fraction * arguments.row_length), inside_V)
        pieces = [piece for one in encoded for piece in cut(one, rule)]
        first = sum(
            int(np.count_nonzero(piece.loss_mask & (np.cumsum(piece.tokens == tokenizer.message_id) <= 1)))
            for piece in pieces
        )
        repeated, tokens = sum(piece.n_repeated for piece in pieces), sum(len(piece.tokens) for piece in pieces)
        print(
            f"context_fraction {fraction:g}: {first / trained:.1%} of trained tokens in a document's first message, "
            f"{repeated / tokens:.1%} of all tokens repeated, {len(pieces):,} documents"
        )


if __name__ == "__main__":
    main()
