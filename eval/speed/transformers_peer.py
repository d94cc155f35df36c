"""The peer of recipes/bench/mqa_1b_global.yaml: transformers' Llama of the same shape, each block compiled.

python -m eval.speed.transformers_peer [--steps 14]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

BATCH, LENGTH, VOCABULARY = 4, 4096, 32768
PEAK_FLOPS = 989e12


def build() -> Any:
    """1.11 billion parameters: 24 layers, width 2048, 16 query heads, 1 key/value head, tied embeddings."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.configuration_llama import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=1,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.bfloat16()
    for block in model.model.layers:
        block.compile()
    return model


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14)
    steps = parser.parse_args().steps
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    flops_per_token = 6 * n_parameters + 6 * 24 * 16 * 128 * LENGTH
    generator = torch.Generator("cuda").manual_seed(1)
    seconds = []
    for _ in range(steps):
        tokens_BL = torch.randint(VOCABULARY, (BATCH, LENGTH), device="cuda", generator=generator)
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[4:])[len(seconds[4:]) // 2]
    rate = BATCH * LENGTH / median
    print(
        f"transformers, blocks compiled: {rate:,.0f} tokens/s, MFU {rate * flops_per_token / PEAK_FLOPS:.1%}, "
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {n_parameters:,} parameters"
    )


if __name__ == "__main__":
    main()
