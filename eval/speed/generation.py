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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from model.config import ModelConfig
from model.inference.kv_cache import PagedKVCache
from model.inference.request import Request
from model.inference.runner import Path as RunnerPath
from model.inference.runner import open_runner
from model.inference.sampling import Sampling
from model.inference.scheduler import Scheduler, Step
from model.transformer import Transformer
from recipes.loader import read_document

COPY_GB_A_SECOND, PAGE_SIZE = 3020, 16
"""Bandwidth of a copy on an H100, for the floor of a decoding step."""


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `prompt` random tokens, and `new` greedy tokens each."""

    batch: int
    prompt: int
    new: int


CASES = (Case(1, 512, 256), Case(64, 2048, 128), Case(256, 1024, 64))


@dataclass(frozen=True)
class Speed:
    """Of one pass: seconds to the last first token, prompt tokens a second until then, tokens a second after it."""

    first_token_s: float
    prefill_tokens_a_second: float
    decode_tokens_a_second: float


def decode_floor(config: ModelConfig, case: Case) -> float:
    """Tokens a second if a step only reads weights, keys and values, at the bandwidth of a copy."""
    held = case.prompt + case.new // 2
    local = sum(config.layer_kinds[layer] == "S" for layer in range(config.n_layers))
    read = local * min(held, config.window) + (config.n_layers - local) * held
    n_bytes = 2 * config.n_parameters + case.batch * read * 4 * config.n_kv_heads * config.d_head
    return case.batch / (n_bytes / (COPY_GB_A_SECOND * 1e9))


def measure(scheduler: Scheduler, moments: dict[Request, list[float]], case: Case, seed: int) -> Speed:
    """One pass over prompts that no cache holds."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = scheduler.runner.model.config.vocab_size
    prompts_BL = torch.randint(5, vocab_size, (case.batch, case.prompt), generator=generator).tolist()
    moments.clear()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for prompt in prompts_BL:
        scheduler.add(Request(prompt, Sampling(case.new, (), temperature=0.0)))
    while scheduler.has_work:
        scheduler.step()
    last_first = max(times[0] for times in moments.values())
    # while all decode: until the first reply ends
    first_end = min(times[-1] for times in moments.values())
    n_tokens = sum(last_first < moment <= first_end for times in moments.values() for moment in times)
    return Speed(
        last_first - began, case.batch * case.prompt / (last_first - began), n_tokens / (first_end - last_first)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each recipe; the exit code is 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.generation", description=__doc__)
    parser.add_argument("recipes", nargs="+", help="pre-training recipes whose models are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decoding", choices=("auto", "fused", "plain"), default="auto")
    parser.add_argument("--deterministic", action="store_true", help="replies do not depend on the batch")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--peer", type=Path, help="figures of eval/speed/vllm_peer.py, to print beside ours")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("eval.speed.generation needs a CUDA device", file=sys.stderr)
        return 2
    peer = json.loads(arguments.peer.read_text()) if arguments.peer else {}
    figures: dict[str, list[dict[str, object]]] = {}
    for path in arguments.recipes:
        name, section = Path(path).stem, read_document(path).data.get("model")
        if section is None:
            print(f"{path} has no model section: its model is that of init_from", file=sys.stderr)
            return 2
        config = ModelConfig.model_validate_json(json.dumps(section))
        rows = figures[name] = measure_model(config, arguments.decoding, arguments.deterministic, arguments.repeats)
        print_table(name, rows, peer.get(name, []))
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
        moments: dict[Request, list[float]] = {}

        def deliver(step: Step, moments: dict[Request, list[float]] = moments) -> None:
            moments.setdefault(step.request, []).append(time.perf_counter())

        began = time.perf_counter()
        runner = open_runner(model, cache, case.batch, length, path=path, deterministic=deterministic)
        scheduler = Scheduler(runner, runner.max_prefill_tokens, deliver)
        measure(scheduler, moments, replace(case, new=8), seed=0)  # captures graphs
        start = time.perf_counter() - began
        passes = [measure(scheduler, moments, case, seed) for seed in range(1, repeats + 1)]
        row: dict[str, object] = {**asdict(case), "floor": decode_floor(config, case), "start_s": start}
        for key in asdict(passes[0]):
            values = sorted(getattr(one, key) for one in passes)
            row[key] = {"median": statistics.median(values), "least": values[0], "most": values[-1]}
        rows.append(row)
        del scheduler, runner, cache
        torch.cuda.empty_cache()
    return rows


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
