"""Our decoder against transformers' Gemma4ForCausalLM: the same weights must give the same logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.attention_ops import Documents
from model.config import ModelConfig, NoSharing, TailSharing
from model.transformer import Transformer

PAIRS = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
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


def peer_name(name: str) -> str:
    if name in PAIRS:
        return PAIRS[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{PAIRS[rest.removesuffix('.weight')]}.weight"


def peer_of(model: Transformer) -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = model.config
    peer = Gemma4ForCausalLM(
        Gemma4TextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.d_head,
            global_head_dim=config.d_head,
            num_global_key_value_heads=config.n_kv_heads,
            layer_types=["sliding_attention" if k == "S" else "full_attention" for k in config.layer_kinds],
            sliding_window=config.window,
            num_kv_shared_layers=config.n_tail_layers,
            hidden_size_per_layer_input=0,
            enable_moe_block=False,
            use_double_wide_mlp=False,
            attention_k_eq_v=False,
            final_logit_softcapping=config.final_logit_softcap,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_local},
                "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta_global},
            },
            rms_norm_eps=config.norm_eps,
            max_position_embeddings=config.max_length,
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
    ).eval()
    weights = dict(peer.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weights[peer_name(name)].copy_(parameter)
    return peer


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("layers", "sharing", "softcap"),
    [("G", NoSharing(), None), ("SSG", NoSharing(), 30.0), ("SSG", TailSharing(kind="tail", n_layers=3), 30.0)],
)
def test_logits_and_gradients_equal(n_kv_heads: int, layers: str, sharing: Any, softcap: float | None) -> None:
    config = ModelConfig(
        vocab_size=67, d_model=32, n_layers=6, n_heads=4, n_kv_heads=n_kv_heads, d_head=16, d_ff=48, layers=layers,
        window=5, kv_sharing=sharing, final_logit_softcap=softcap, max_length=64,
    )  # fmt: skip
    model = Transformer(config, attention="reference", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    peer = peer_of(model)
    tokens_T = torch.randint(1, config.vocab_size, (23,))  # 0 is the peer's padding: no gradient there
    logits_TV = model.logits(model(tokens_T, Documents.from_lengths([23])))
    peer_logits_TV = peer(tokens_T[None]).logits[0]
    torch.testing.assert_close(logits_TV, peer_logits_TV, rtol=1e-4, atol=1e-5)

    direction_TV = torch.randn_like(logits_TV)
    (logits_TV * direction_TV).sum().backward()
    (peer_logits_TV * direction_TV).sum().backward()
    peer_gradients = {name: p.grad for name, p in peer.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = peer_gradients[peer_name(name)]
        assert expected is not None and parameter.grad is not None
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error <= 1e-4, f"{name}: gradients differ by {error:.2e} of their norm"
