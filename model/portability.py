"""Which engines can run an architecture unmodified, and why others cannot; printed before training."""

from __future__ import annotations

from model.config import AdjacentSharing, ModelConfig

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")


def obstacles(config: ModelConfig) -> dict[str, str | None]:
    """By engine: why its Gemma4ForCausalLM cannot express `config`, or None."""
    reasons: dict[str, str | None] = dict.fromkeys(ENGINES)
    if isinstance(config.kv_sharing, AdjacentSharing):
        reason = 'kv_sharing kind "adjacent" has no counterpart there; use kind "tail"'
        return {**dict.fromkeys(ENGINES, reason)}
    tail = config.n_tail_layers
    if tail:
        # llama.cpp finds the two source layers by their distance from the tail
        kinds, first = config.layer_kinds, config.n_layers - tail
        reads_local = "S" in kinds[first:]
        if first < 2 or kinds[first - 1] != "G" or (reads_local and kinds[first - 2] != "S"):
            reasons["llama.cpp"] = (
                "the layers before the shared tail must end in a local and then a global layer "
                f"(they are {''.join(kinds[:first])})"
            )
    return reasons


def describe(config: ModelConfig) -> list[tuple[str, str]]:
    """(name, value) lines about an architecture, for the dry run."""
    local = sum(kind == "S" for kind in config.layer_kinds)
    length = config.max_length
    engines = "; ".join(
        name if reason is None else f"not {name}: {reason}" for name, reason in obstacles(config).items()
    )
    return [
        ("parameters", f"{config.n_parameters:,}"),
        ("layers", f"{config.n_layers}: {local} local (window {config.window}), {config.n_layers - local} global"),
        ("heads", f"{config.n_heads} query, {config.n_kv_heads} key/value, width {config.d_head}"),
        ("cache", f"{config.kv_bytes_per_token():,} bytes/token at 16 bits, {len(config.kv_layers)} layers own one"),
        (f"cache at {length} tokens", f"{config.kv_bytes(length) / 2**20:.2f} MiB a conversation"),
        ("engines", engines),
    ]
