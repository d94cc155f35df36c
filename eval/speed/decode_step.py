"""Decoding steps on one GPU: microseconds, beside the time that reading weights, keys and values takes.

python -m eval.speed.decode_step RECIPE... [--batches 1 64 256] [--contexts 512 2048 1024] [--json decode_step.json]

Models of pre-training recipes with random weights in bfloat16; a step is a CUDA graph without sampling. There is a
context for each batch, or one for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from eval.speed.decode_attention import copy_bytes_per_second
from model.config import ModelConfig
from model.inference.decode_step import DecodeStep, DecodeWeights, unsupported
from model.inference.kv_cache import PagedKVCache
from model.transformer import Transformer
from recipes.loader import read_document

PAGE_SIZE = 16


def step_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """Bytes that a step in 16 bits reads: all weights once, and what each layer's queries see."""
    seen = sum(min(context, config.window) if kind == "S" else context for kind in config.layer_kinds)
    return 2 * config.n_parameters + 2 * 2 * batch * seen * config.n_kv_heads * config.d_head


def model_of(path: str) -> ModelConfig | None:
    """The model of a pre-training recipe; None, with a message, where it is that of init_from."""
    section = read_document(path).data.get("model")
    if section is None:
        print(f"{path} has no model section: its model is that of init_from", file=sys.stderr)
        return None
    return ModelConfig.model_validate_json(json.dumps(section))


def captured_step(
    model: Transformer, weights: DecodeWeights, batch: int, context: int, deterministic: bool
) -> tuple[torch.cuda.CUDAGraph, object]:
    """(graph, what it reads) of a step of `batch` sequences of `context` tokens, the new one included."""
    width = -(-context // PAGE_SIZE)
    cache = PagedKVCache(model.config, batch * width, PAGE_SIZE, torch.bfloat16, "cuda")
    for pool_SGK in (*cache.k_SGK.values(), *cache.v_SGK.values()):
        pool_SGK.normal_()
    step = DecodeStep(
        model, cache.k_SGK, cache.v_SGK, PAGE_SIZE, rows=batch, width=width, max_length=weights.max_length,
        deterministic=deterministic, weights=weights,
    )  # fmt: skip
    table_BP = torch.randperm(batch * width, device="cuda").view(batch, width).int()
    tokens_B = torch.randint(model.config.vocab_size, (batch,), device="cuda", dtype=torch.int32)
    lengths_B = torch.full_like(tokens_B, context)
    step(tokens_B, lengths_B, table_BP)  # compiles kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tokens_B, lengths_B, table_BP)
    return graph, (cache, step, table_BP, tokens_B, lengths_B)


def microseconds(graph: torch.cuda.CUDAGraph, replays: int = 20, repeats: int = 3) -> list[float]:
    """Of a replay: the mean of `replays`, `repeats` times, in ascending order."""
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / replays)
    return sorted(times)


def measure(
    config: ModelConfig, name: str, workloads: Sequence[tuple[int, int]], deterministic: bool, copy: float
) -> tuple[Table, list[dict[str, Any]]]:
    """A table of (batch, context) steps, and its figures. copy: bytes a second of a copy."""
    with torch.device("cuda"):
        model = Transformer(config, dtype=torch.bfloat16).eval()
    weights = DecodeWeights(model, max(context for _, context in workloads))
    columns = ("batch x context", "us", "least to most", "floor, us", "share", "tokens/s")
    table = Table(*columns, title=f"{name}, copy {copy / 1e9:,.0f} GB/s")
    rows = []
    for batch, context in workloads:
        graph, inputs = captured_step(model, weights, batch, context, deterministic)
        times = microseconds(graph)
        median, floor = statistics.median(times), 1e6 * step_bytes(config, batch, context) / copy
        rows.append({"model": name, "batch": batch, "context": context, "us": times, "floor_us": floor})
        table.add_row(
            f"{batch} x {context:,}", f"{median:,.0f}", f"{times[0]:,.0f} to {times[-1]:,.0f}", f"{floor:,.0f}",
            f"{floor / median:.0%}", f"{1e6 * batch / median:,.0f}",
        )  # fmt: skip
        del graph, inputs
        torch.cuda.empty_cache()
    return table, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 if there is nothing to measure or no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="pre-training recipes whose models are measured")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 1024], help="one, or one a batch")
    parser.add_argument("--deterministic", action="store_true", help="logits of a row do not depend on the batch")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args(argv)
    contexts = arguments.contexts * (len(arguments.batches) if len(arguments.contexts) == 1 else 1)
    if len(contexts) != len(arguments.batches):
        parser.error(f"{len(arguments.batches)} batches and {len(contexts)} contexts: give one context, or one a batch")
    if not torch.cuda.is_available():
        print("eval.speed.decode_step measures a GPU, and PyTorch sees none here", file=sys.stderr)
        return 2
    copy = copy_bytes_per_second()
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy / 1e9, "rows": [],
    }  # fmt: skip
    for path in arguments.recipes:
        config = model_of(path)
        if config is None:
            return 2
        obstacle = unsupported(config, torch.bfloat16, torch.device("cuda"))
        if obstacle:
            print(f"{path}: {obstacle}", file=sys.stderr)
            return 2
        workloads = list(zip(arguments.batches, contexts, strict=True))
        table, rows = measure(config, Path(path).stem, workloads, arguments.deterministic, copy)
        Console(width=120).print(table)
        figures["rows"] += rows
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
