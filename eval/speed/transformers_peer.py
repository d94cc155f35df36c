"""The peer of recipes/bench/mqa_1b_global.yaml: transformers' Llama of the same shape, each block compiled.

python -m eval.speed.transformers_peer [--accumulate 8] [--deepspeed]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PEAK_FLOPS = 989e12


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a micro-batch; the defaults give 1.11 billion parameters with tied embeddings."""

    n_layers: int = 24
    d_model: int = 2048
    n_heads: int = 16
    d_head: int = 128
    d_ff: int = 5632
    vocab_size: int = 32768
    batch: int = 4
    length: int = 4096


def build(shape: Shape, device: torch.device) -> Any:
    """The model in bfloat16 with one key/value head; on a GPU its blocks are compiled."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.configuration_llama import LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=1,
        head_dim=shape.d_head,
        tie_word_embeddings=True,
        max_position_embeddings=shape.length,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with device:
        model = LlamaForCausalLM(config)
    model.bfloat16()
    if device.type == "cuda":
        for block in model.model.layers:
            block.compile()
    return model


def bare_step(model: Any, accumulate: int) -> Callable[[list[Tensor]], None]:
    """A step of fused AdamW; weights, and gradients summed over `accumulate` micro-batches, are in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step(batches: list[Tensor]) -> None:
        for tokens_BL in batches:
            (model(input_ids=tokens_BL, labels=tokens_BL).loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_step(model: Any, accumulate: int, batch: int) -> Callable[[list[Tensor]], None]:
    """A step under ZeRO-1 with float32 master weights and gradients, as ours; other settings are defaults."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1_000_000,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(batches: list[Tensor]) -> None:
        for tokens_BL in batches:
            engine.backward(engine(input_ids=tokens_BL, labels=tokens_BL).loss)
            engine.step()

    return step


def measure(shape: Shape, device: torch.device, steps: int, accumulate: int, deepspeed: bool) -> tuple[float, int]:
    """(tokens a second, the median after four steps; number of parameters)."""
    model = build(shape, device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    step = deepspeed_step(model, accumulate, shape.batch) if deepspeed else bare_step(model, accumulate)
    generator = torch.Generator(device).manual_seed(1)
    seconds = []
    for _ in range(steps):
        size = (accumulate, shape.batch, shape.length)
        batches = list(torch.randint(shape.vocab_size, size, device=device, generator=generator))
        _wait(device)
        began = time.perf_counter()
        step(batches)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[4:])[len(seconds[4:]) // 2]
    return accumulate * shape.batch * shape.length / median, n_parameters


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14, help="the first four are not counted")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--deepspeed", action="store_true", help="under ZeRO-1, float32 gradients and master weights")
    arguments = parser.parse_args()
    shape = Shape()
    rate, n_parameters = measure(
        shape, torch.device("cuda"), arguments.steps, arguments.accumulate, arguments.deepspeed
    )
    attended = 6 * shape.n_layers * shape.n_heads * shape.d_head * (shape.length + 1)  # one document a row, causal
    flops_per_token = 6 * n_parameters + attended
    print(
        f"transformers, blocks compiled{', DeepSpeed ZeRO-1' * arguments.deepspeed}, {arguments.accumulate} "
        f"micro-batch(es) a step: {rate:,.0f} tokens/s, MFU {rate * flops_per_token / PEAK_FLOPS:.1%}, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {n_parameters:,} parameters"
    )


if __name__ == "__main__":
    main()
