"""The cases of eval.speed.generation in vLLM: python eval/speed/vllm_peer.py RECIPE... --json FILE

For vLLM's own environment: this file needs vllm, transformers and PyYAML, and nothing of this project. It writes a
model of the recipe's shape with random weights to a temporary directory: a Llama where all layers are global and own
their cache, which vLLM runs fastest, otherwise a Gemma 4 text model, as the export does.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

CASES = ((1, 512, 256), (64, 2048, 128), (256, 1024, 64))
"""(batch, prompt tokens, new tokens), as in eval/speed/generation.py."""


def write_model(shape: dict[str, Any], directory: str) -> None:
    """A model of a recipe's model section, in bfloat16."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

    n_layers, pattern = shape["n_layers"], shape["layers"]
    kinds = (pattern * n_layers)[:n_layers]
    sharing = shape.get("kv_sharing", {"kind": "none"})
    common = {
        "vocab_size": shape["vocab_size"], "hidden_size": shape["d_model"], "intermediate_size": shape["d_ff"],
        "num_hidden_layers": n_layers, "num_attention_heads": shape["n_heads"], "head_dim": shape["d_head"],
        "num_key_value_heads": shape.get("n_kv_heads", 1), "max_position_embeddings": shape["max_length"],
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if set(kinds) == {"G"} and sharing["kind"] == "none":
            model: Any = LlamaForCausalLM(LlamaConfig(**common))
        else:
            n_shared = sharing.get("n_layers", 0)
            ropes = {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 1.0, "rope_theta": 1e6},
            }
            text: dict[str, Any] = {
                **common, "global_head_dim": shape["d_head"], "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": shape.get("window", 1024), "rope_parameters": ropes, "final_logit_softcapping": None,
                "layer_types": ["sliding_attention" if kind == "S" else "full_attention" for kind in kinds],
                "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": shape["vocab_size"],
                "num_kv_shared_layers": n_shared,
            }  # fmt: skip
            model = Gemma4ForCausalLM(Gemma4TextConfig(**text))
    torch.set_default_dtype(torch.float32)
    model.config.architectures = [type(model).__name__]
    model.cpu().save_pretrained(directory)
    # vLLM before 0.32 asks for k_norm of layers that share a cache, though nothing reads it
    from safetensors.torch import load_file, save_file

    path = f"{directory}/model.safetensors"
    weights = load_file(path)
    if "model.layers.0.self_attn.k_norm.weight" in weights:
        for layer in range(n_layers):
            name = f"model.layers.{layer}.self_attn.k_norm.weight"
            weights.setdefault(name, torch.ones(shape["d_head"], dtype=torch.bfloat16))
        save_file(weights, path, metadata={"format": "pt"})
    del model
    gc.collect()
    torch.cuda.empty_cache()


def seconds(llm: Any, vocab_size: int, case: tuple[int, int, int], n_new: int, seed: int) -> float:
    """Seconds for exactly n_new greedy tokens of each of a batch of random prompts."""
    from vllm import SamplingParams

    batch, length, _ = case
    rng = random.Random(seed)
    prompts: Any = [{"prompt_token_ids": [rng.randrange(5, vocab_size) for _ in range(length)]} for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=n_new, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    taken = time.perf_counter() - began
    assert all(len(output.outputs[0].token_ids) == n_new for output in outputs)
    return taken


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="pre-training recipes whose model shapes are measured")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True, help="where to write the figures")
    arguments = parser.parse_args()
    from vllm import LLM

    figures: dict[str, list[dict[str, Any]]] = {}
    for path in arguments.recipes:
        shape = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["model"]
        with tempfile.TemporaryDirectory() as directory:
            write_model(shape, directory)
            began = time.perf_counter()
            llm = LLM(
                model=directory, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, seed=0,
                gpu_memory_utilization=0.85, enable_prefix_caching=False, disable_log_stats=True,
            )  # fmt: skip
            start_s = time.perf_counter() - began
        rows = figures[Path(path).stem] = []
        for case in CASES:
            batch, length, n_new = case
            for warm in (n_new, 1):
                seconds(llm, shape["vocab_size"], case, warm, seed=0)
            firsts, steps = [], []
            for seed in range(1, arguments.repeats + 1):
                first = seconds(llm, shape["vocab_size"], case, 1, seed)
                firsts.append(first)
                steps.append((seconds(llm, shape["vocab_size"], case, n_new, seed + 100) - first) / (n_new - 1))
            first, step = statistics.median(firsts), statistics.median(steps)
            row = {
                "batch": batch, "prompt": length, "new": n_new, "start_s": start_s, "first_token_s": first,
                "prefill_tokens_a_second": batch * length / first, "decode_tokens_a_second": batch / step,
            }  # fmt: skip
            print(json.dumps({"model": Path(path).stem, **row}), flush=True)
            rows.append(row)
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        del llm
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
