"""Conversion to and from Hugging Face: a Gemma4 text config and weights that stock engines load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.attention_ops import Backend
from model.config import ModelConfig, NoSharing, TailSharing
from model.portability import obstacles
from model.transformer import Transformer
from model.weights import CONFIG, WEIGHTS, model_of_state, read_tensors

ARCHITECTURE = "Gemma4ForCausalLM"

_WHOLE = {"embed_tokens.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight"}
_IN_BLOCK = {
    "attention_norm_in": "input_layernorm",
    "attention_norm_out": "post_attention_layernorm",
    "ff_norm_in": "pre_feedforward_layernorm",
    "ff_norm_out": "post_feedforward_layernorm",
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_in": "mlp.up_proj",
    "feed_forward.w_out": "mlp.down_proj",
}
_OURS_WHOLE = {theirs: ours for ours, theirs in _WHOLE.items()}
_OURS_IN_BLOCK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.weight")
_THEIR_BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_LAYER_SCALAR = re.compile(r"model\.layers\.(\d+)\.layer_scalar")


class NotPortableError(ValueError):
    """An architecture that cannot be exported, or a bundle that cannot be imported."""


def hf_config(config: ModelConfig, dtype: str, bos_id: int, end_id: int, pad_id: int) -> dict[str, Any]:
    """config.json of the exported model. Raises NotPortableError with the reason when Gemma4 cannot express `config`.

    `dtype` is "float32", "bfloat16" or "float16". Loads in transformers 5.16 to 5.22 and in vLLM 0.32 and later.
    """
    reason = obstacles(config)["transformers"]
    if reason is not None:
        raise NotPortableError(f"this model cannot be exported as {ARCHITECTURE}: {reason}")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "gemma4_text",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        # the default (512) would apply to global layers
        "global_head_dim": config.d_head,
        "num_global_key_value_heads": config.n_kv_heads,
        "layer_types": ["sliding_attention" if kind == "S" else "full_attention" for kind in config.layer_kinds],
        "sliding_window": config.window,
        "num_kv_shared_layers": config.n_tail_layers,
        # "proportional" over the whole width is plain rotary embedding; llama.cpp's converter accepts no other name.
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_local},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 1.0,
                "rope_theta": config.rope_theta_global,
            },
        },
        "final_logit_softcapping": config.final_logit_softcap,
        "rms_norm_eps": config.norm_eps,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": config.vocab_size,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
    }


def model_config(content: Mapping[str, Any]) -> ModelConfig:
    """The inverse of `hf_config`. Raises NotPortableError for a config that uses other features."""
    head = content["head_dim"]
    wanted = {
        "model_type": "gemma4_text",
        "global_head_dim": head,
        "num_global_key_value_heads": content["num_key_value_heads"],
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_k_eq_v": False,
        "attention_bias": False,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }
    for key, value in wanted.items():
        if content.get(key) != value:
            raise NotPortableError(f"config.json: {key} is {content.get(key)!r}, this architecture needs {value!r}")
    rope, n_shared = content["rope_parameters"], content["num_kv_shared_layers"]
    if rope["full_attention"].get("partial_rotary_factor", 1.0) != 1.0:
        raise NotPortableError("config.json: partial_rotary_factor of the global layers must be 1.0")
    return ModelConfig(
        vocab_size=content["vocab_size"],
        d_model=content["hidden_size"],
        n_layers=content["num_hidden_layers"],
        n_heads=content["num_attention_heads"],
        n_kv_heads=content["num_key_value_heads"],
        d_head=head,
        d_ff=content["intermediate_size"],
        layers="".join("S" if kind == "sliding_attention" else "G" for kind in content["layer_types"]),
        window=content["sliding_window"],
        kv_sharing=TailSharing(kind="tail", n_layers=n_shared) if n_shared else NoSharing(),
        rope_theta_local=rope["sliding_attention"]["rope_theta"],
        rope_theta_global=rope["full_attention"]["rope_theta"],
        final_logit_softcap=content["final_logit_softcapping"],
        norm_eps=content["rms_norm_eps"],
        max_length=content["max_position_embeddings"],
    )


def to_hf(name: str) -> str:
    """Hugging Face's name for one of our parameters."""
    if name in _WHOLE:
        return _WHOLE[name]
    match = _OUR_BLOCK.fullmatch(name)
    if match is None or match[2] not in _IN_BLOCK:
        raise NotPortableError(f"no Hugging Face name for the parameter {name!r}")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.weight"


def from_hf(name: str) -> str:
    """Our name for one of Hugging Face's parameters."""
    if name in _OURS_WHOLE:
        return _OURS_WHOLE[name]
    match = _THEIR_BLOCK.fullmatch(name)
    if match is None or match[2] not in _OURS_IN_BLOCK:
        raise NotPortableError(f"no parameter of ours for the Hugging Face name {name!r}")
    return f"blocks.{match[1]}.{_OURS_IN_BLOCK[match[2]]}.weight"


def state_to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exported state dict: our weights under Hugging Face's names, and layer scalars of one."""
    theirs = {to_hf(name): tensor for name, tensor in state.items()}
    ones_1 = torch.ones(1, dtype=state["embed_tokens.weight"].dtype)
    theirs |= {f"model.layers.{layer}.layer_scalar": ones_1.clone() for layer in range(config.n_layers)}
    return theirs


def state_from_hf(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our (name, tensor) pairs. Raises NotPortableError for an unknown name, or a layer scalar other than 1."""
    for name, tensor in tensors:
        if not _LAYER_SCALAR.fullmatch(name):
            yield from_hf(name), tensor
        elif not bool((tensor == 1).all()):
            raise NotPortableError(f"{name} is {tensor.tolist()}; this architecture has no layer scalar (it is 1)")


def load_exported_config(directory: str | Path) -> ModelConfig:
    """The architecture of a bundle. Raises NotPortableError naming config.json when it is not ours."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise NotPortableError(f"{path} does not exist: {directory} is not a bundle")
    try:
        return model_config(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise NotPortableError(f"{path} is no config of a {ARCHITECTURE}: {error!r}") from None


def load_exported_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Backend = "auto",
) -> Transformer:
    """The transformer of a bundle, in evaluation mode.

    Raises NotPortableError for another architecture, WeightsError when model.safetensors is missing, damaged, or does
    not fit config.json.
    """
    config = load_exported_config(directory)
    path = Path(directory) / WEIGHTS
    return model_of_state(config, state_from_hf(read_tensors(path)), path, device, dtype, attention)
