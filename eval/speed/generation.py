"""Speed of generation on a GPU: python -m eval.speed.generation recipes/bench/mqa_1b_global.yaml [--json FILE]

The models of the recipes with random weights, in bfloat16: first token and decoding of one sequence, prefill and
decoding of batches, through the scheduler and the graph runner. `--peer` takes the file that
`eval/speed/vllm_peer.py` writes, with the same cases in vLLM.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from eval.speed.decode_step import PAGE_SIZE, model_of, step_bytes
from model.config import ModelConfig
from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import Path as RunnerPath
from model.inference.runner import open_runner
from model.inference.sampling import Sampling
from model.inference.scheduler import Scheduler, Step
from model.transformer import Transformer

COPY_GB_A_SECOND = 3020
"""Bandwidth of a copy on an H100, for the floor of a decoding step."""


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` random tokens, and `new` greedy tokens each."""

    batch: int
    prompt: int
    new: int


CASES = (Case(1, 512, 256), Case(64, 2048, 128), Case(256, 1024, 64))


def decode_floor(config: ModelConfig, case: Case) -> float:
    """Tokens a second if a step only reads weights, keys and values, at the bandwidth of a copy."""
    n_bytes = step_bytes(config, case.batch, case.prompt + case.new // 2)
    return case.batch / (n_bytes / (COPY_GB_A_SECOND * 1e9))


def seconds(scheduler: Scheduler, case: Case, n_new: int, seed: int) -> float:
    """Seconds for `n_new` greedy tokens of each of a batch of random prompts, which no cache holds."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = scheduler.runner.model.config.vocab_size
    prompts_BL = torch.randint(5, vocab_size, (case.batch, case.prompt), generator=generator).tolist()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for prompt in prompts_BL:
        scheduler.add(Request(prompt, Sampling(n_new, (), temperature=0.0)))
    while scheduler.has_work:
        scheduler.step()
    return time.perf_counter() - began


def measured(scheduler: Scheduler, case: Case, seed: int) -> dict[str, float]:
    """Seconds to the first token of all prompts, prompt tokens a second until then, tokens a second behind it."""
    first = seconds(scheduler, case, 1, 2 * seed)
    step = (seconds(scheduler, case, case.new, 2 * seed + 1) - first) / (case.new - 1)
    return {
        "first_token_s": first,
        "prefill_tokens_a_second": case.batch * case.prompt / first,
        "decode_tokens_a_second": case.batch / step,
    }


LONG_PROMPT, GAP_BATCH, BUDGETS = 32768, 64, (128, 256, 512, 1024)
"""A prompt that arrives while replies are decoded, how many are, and prompt tokens a step beside them."""


def long_prompt_gaps(config: ModelConfig, budget: int, deterministic: bool) -> dict[str, float]:
    """Milliseconds between a reply's tokens: median without a long prompt, median and p99 while it is prefilled."""
    config = config.model_copy(update={"max_length": LONG_PROMPT + 1024})
    with torch.device("cuda"):
        model = Transformer(config, dtype=torch.bfloat16).eval()
    n_pages = (LONG_PROMPT + GAP_BATCH * 2048) // PAGE_SIZE + GAP_BATCH + 8
    cache = PagedKVCache(config, n_pages, PAGE_SIZE, torch.bfloat16, torch.device("cuda"))
    runner = open_runner(model, cache, GAP_BATCH + 1, LONG_PROMPT + 512, path="fused", deterministic=deterministic)
    moments: list[float] = []
    watched: list[Request] = []

    def deliver(step: Step) -> None:
        if step.request is watched[0]:
            moments.append(time.perf_counter())

    scheduler = Scheduler(runner, budget, deliver)
    generator = torch.Generator().manual_seed(0)

    def request(length: int, n_new: int) -> Request:
        prompt = torch.randint(5, config.vocab_size, (length,), generator=generator).tolist()
        return Request(prompt, Sampling(n_new, (), temperature=0.0))

    watched += [request(512, 900) for _ in range(GAP_BATCH)]
    for one in watched:
        scheduler.add(one)
    gaps: dict[str, list[float]] = {"alone": [], "beside": []}
    for warm in (True, False):  # captures graphs first
        while watched[0].n_generated < (300 if not warm else 20):
            scheduler.step()
        alone = [b - a for a, b in pairwise(moments[-100:])]
        long = request(LONG_PROMPT if not warm else 4 * budget, 2)
        scheduler.add(long)
        first = len(moments)
        while not long.n_generated:
            scheduler.step()
        gaps = {"alone": alone, "beside": [b - a for a, b in pairwise(moments[first:])]}
    beside = sorted(gaps["beside"])
    return {
        "budget": budget, "alone_median_ms": 1000 * statistics.median(gaps["alone"]),
        "beside_median_ms": 1000 * statistics.median(beside), "beside_p99_ms": 1000 * beside[int(0.99 * len(beside))],
    }  # fmt: skip


def print_gaps(name: str, rows: Sequence[dict[str, float]]) -> None:
    """What a long prompt does to the replies beside it, by the prompt tokens of a step."""
    title = f"{name}: ms between tokens of {GAP_BATCH} replies while {LONG_PROMPT:,} prompt tokens arrive"
    table = Table("tokens a step", "median without", "median with", "p99 with", "p99 / median without", title=title)
    for row in rows:
        alone, beside, p99 = row["alone_median_ms"], row["beside_median_ms"], row["beside_p99_ms"]
        table.add_row(f"{row['budget']:.0f}", f"{alone:.2f}", f"{beside:.2f}", f"{p99:.2f}", f"{p99 / alone:.2f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each recipe; the exit code is 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generation", description=__doc__)
    parser.add_argument("recipes", nargs="+", help="pre-training recipes whose models are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decoding", choices=("auto", "fused", "plain"), default="auto")
    parser.add_argument("--deterministic", action="store_true", help="replies do not depend on the batch")
    parser.add_argument(
        "--long-prompt", action="store_true", help="also what a long prompt does to the replies beside it"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--peer", type=Path, help="figures of eval/speed/vllm_peer.py, to print beside ours")
    parser.add_argument("--dry-run", action="store_true", help="print the cases and their floors; needs no GPU")
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("eval.speed.generation needs a CUDA device", file=sys.stderr)
        return 2
    peer: dict[str, list[dict[str, object]]] = {}
    if arguments.peer and not arguments.dry_run:
        try:
            peer = json.loads(arguments.peer.read_text())
        except (OSError, ValueError) as error:
            print(f"{arguments.peer} is not a file of eval/speed/vllm_peer.py: {error}", file=sys.stderr)
            return 2
    figures: dict[str, list[dict[str, object]]] = {}
    for path in arguments.recipes:
        name, config = Path(path).stem, model_of(path)
        if config is None:
            return 2
        if arguments.dry_run:
            print_floors(name, config)
            continue
        rows = figures[name] = measure_model(config, arguments.decoding, arguments.deterministic, arguments.repeats)
        print_table(name, rows, peer.get(name, []))
        if arguments.long_prompt:
            gaps = [long_prompt_gaps(config, budget, arguments.deterministic) for budget in BUDGETS]
            print_gaps(name, gaps)
            figures[name] += [dict(row) for row in gaps]
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


def measure_model(
    config: ModelConfig, path: RunnerPath, deterministic: bool, repeats: int, cases: Sequence[Case] = CASES
) -> list[dict[str, object]]:
    """All cases of one model: median, least and most of each figure."""
    with torch.device("cuda"):
        model = Transformer(config, dtype=torch.bfloat16).eval()
    rows: list[dict[str, object]] = []
    for case in cases:
        length = case.prompt + case.new
        cache = PagedKVCache(
            config, case.batch * (-(-length // PAGE_SIZE) + 2), PAGE_SIZE, torch.bfloat16, torch.device("cuda")
        )
        began = time.perf_counter()
        runner = open_runner(model, cache, case.batch, length, path=path, deterministic=deterministic)
        scheduler = Scheduler(runner, None, lambda step: None)
        for n_new in (case.new, 1):  # captures graphs
            seconds(scheduler, case, n_new, seed=0)
        start = time.perf_counter() - began
        passes = [measured(scheduler, case, seed) for seed in range(1, repeats + 1)]
        row: dict[str, object] = {**asdict(case), "floor": decode_floor(config, case), "start_s": start}
        for key in passes[0]:
            values = sorted(one[key] for one in passes)
            row[key] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
        rows.append(row)
        del scheduler, runner, cache
        torch.cuda.empty_cache()
    return rows


def print_floors(name: str, config: ModelConfig) -> None:
    """The cases, and what a decoding step takes at least."""
    table = Table("batch", "prompt", "new tokens", "floor, tokens/s", "floor, ms a step", title=name)
    for case in CASES:
        floor = decode_floor(config, case)
        numbers = str(case.batch), str(case.prompt), str(case.new)
        table.add_row(*numbers, f"{floor:,.0f}", f"{1000 * case.batch / floor:.3f}")
    Console().print(table)


def print_table(name: str, rows: Sequence[dict[str, object]], peer: Sequence[dict[str, object]]) -> None:
    """Medians with the range of the passes; the peer's figure and ours over it, where there is one."""
    table = Table("batch", "prompt", "figure", "ours", "floor", "vLLM", "ours / vLLM", title=name)
    others = {(row["batch"], row["prompt"]): row for row in peer}
    for row in rows:
        other = others.get((row["batch"], row["prompt"]), {})
        for key, label in (
            ("first_token_s", "s to the last first token"),
            ("prefill_tokens_a_second", "prefill, tokens/s"),
            ("decode_tokens_a_second", "decode, tokens/s"),
        ):
            ours = row[key]
            assert isinstance(ours, dict)
            shown = {k: f"{v:,.4f}" if key == "first_token_s" else f"{v:,.0f}" for k, v in ours.items()}
            theirs = other.get(key)
            spread = f"{shown['median']} ({shown['least']} to {shown['most']})"
            table.add_row(
                str(row["batch"]), str(row["prompt"]), label, spread,
                f"{row['floor']:,.0f}" if key == "decode_tokens_a_second" else "",
                f"{theirs:,.4g}" if isinstance(theirs, float) else "",
                f"{ours['median'] / theirs:.2f}" if isinstance(theirs, float) else "",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
