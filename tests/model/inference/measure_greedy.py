"""Greedy tokens of the fused path in 16 bits against float32, on real conversations, on a GPU:

    python tests/model/inference/measure_greedy.py runs/demo/export runs/demo/data/dialogues/heldout.jsonl

The reference computes every reply again in float32 without a cache, from the same weights rounded to 16 bits. Where its
best token is another one, the difference of the two logits is shown beside the rounding of a logit of that size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from data.format.dialogue_json import read_dialogues
from eval.context import select_contexts
from model.attention_ops import Documents
from model.inference.generate import Generator
from model.inference.sampling import Sampling
from serving_export.bundle import open_bundle

MAX_PROMPT_TOKENS, NEW_TOKENS = 400, 64


def main() -> int:
    """Entry point: 1 if a token differs by more than rounding, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--contexts", type=int, default=500)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("measure_greedy compares a GPU with itself, and PyTorch sees none here", file=sys.stderr)
        return 2
    bundle = open_bundle(arguments.bundle, "cuda")
    dialogues = list(read_dialogues(arguments.dialogues))
    contexts = select_contexts(dialogues, bundle.tokenizer, arguments.contexts, 1, MAX_PROMPT_TOKENS)
    model = bundle.model.to(torch.bfloat16)
    exact = open_bundle(arguments.bundle, "cuda").model.to(torch.bfloat16).float()
    prompts = [context.prompt for context in contexts]
    sampling = Sampling(NEW_TOKENS, (bundle.tokenizer.end_id,), temperature=0.0)
    generator = Generator(model, 256, MAX_PROMPT_TOKENS + NEW_TOKENS, path="fused")
    replies = [completions[0].tokens for completions in generator.generate(prompts, sampling)]
    n_tokens, differing = 0, []
    for prompt, reply in zip(prompts, replies, strict=True):
        text = [*prompt, *reply]
        with torch.no_grad():
            hidden_TD = exact(torch.tensor(text, device="cuda"), Documents.from_lengths([len(text)], device="cuda"))
            logits_TV = exact.logits(hidden_TD)[len(prompt) - 1 : -1]
        best_T, found_T = (
            logits_TV.max(-1).values,
            logits_TV.gather(1, torch.tensor(reply, device="cuda")[:, None])[:, 0],
        )
        n_tokens += len(reply)
        differing += [(b - f, abs(b) * 2.0**-8) for b, f in zip(best_T.tolist(), found_T.tolist()) if f < b]
    table = Table(title=f"{len(prompts)} conversations, {n_tokens} greedy tokens in bfloat16 against float32")
    for column in ("difference of the logits", "tokens", "of them below bfloat16's rounding"):
        table.add_column(column, justify="right")
    table.add_row("0: the same token", str(n_tokens - len(differing)), "")
    for low, high in ((0, 0.01), (0.01, 0.03), (0.03, 0.1), (0.1, 0.3), (0.3, float("inf"))):
        inside = [rounding for gap, rounding in differing if low < gap <= high]
        below = sum(gap <= rounding for gap, rounding in differing if low < gap <= high)
        table.add_row(f"to {high}", str(len(inside)), str(below))
    Console().print(table)
    return int(any(gap > 2 * rounding for gap, rounding in differing))


if __name__ == "__main__":
    sys.exit(main())
