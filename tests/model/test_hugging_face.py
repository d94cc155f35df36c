"""The exported config and weights: they load in transformers, give our logits, and come back as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.attention_ops import Documents
from model.config import AdjacentSharing, ModelConfig, NoSharing, TailSharing
from model.hugging_face import (
    NotPortableError,
    from_hf,
    hf_config,
    load_exported_model,
    model_config,
    state_from_hf,
    state_to_hf,
    to_hf,
)
from model.transformer import Transformer
from model.weights import WeightsError


def small(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = dict(  # noqa: C408
        vocab_size=61, d_model=32, n_layers=6, n_heads=4, d_head=16, d_ff=48, layers="SSG", window=5,
        kv_sharing=TailSharing(kind="tail", n_layers=3), final_logit_softcap=30.0, max_length=64,
    )  # fmt: skip
    return ModelConfig.model_validate({**values, **changes})


def exported(config: ModelConfig) -> dict[str, Any]:
    return hf_config(config, "float32", bos_id=2, end_id=4, pad_id=0)


CONFIGS = [
    small(),
    small(layers="G", n_layers=2, kv_sharing=NoSharing(), final_logit_softcap=None),
    small(n_kv_heads=2, rope_theta_local=5000.0, rope_theta_global=20000.0, norm_eps=1e-5),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_loads_from_disk_with_equal_logits(config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = Transformer(config, attention="reference", seed=3).eval()
    (tmp_path / "config.json").write_text(json.dumps(exported(config)))
    save_file(state_to_hf(config, model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    peer, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens_T = torch.randint(1, config.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_TV = model.logits(model(tokens_T, Documents.from_lengths([40])))
        reloaded = load_exported_model(tmp_path, attention="reference")
        assert torch.equal(reloaded.logits(reloaded(tokens_T, Documents.from_lengths([40]))), ours_TV)
        torch.testing.assert_close(peer.eval()(tokens_T[None]).logits[0], ours_TV, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_and_weights_come_back(config: ModelConfig) -> None:
    back = model_config(json.loads(json.dumps(exported(config))))
    assert back.model_dump(exclude={"layers"}) == config.model_dump(exclude={"layers"})
    assert back.layer_kinds == config.layer_kinds
    state = Transformer(config, seed=1).state_dict()
    returned = dict(state_from_hf(state_to_hf(config, state).items()))
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name], state[name]) for name in state)


def test_names_are_a_bijection() -> None:
    names = list(Transformer(small()).state_dict())
    assert [from_hf(to_hf(name)) for name in names] == names
    for convert, foreign in ((to_hf, "blocks.0.attention.w_z.weight"), (from_hf, "model.layers.0.mlp.up.weight")):
        with pytest.raises(NotPortableError, match=r"0\."):
            convert(foreign)


def test_what_gemma4_cannot_express_is_refused() -> None:
    with pytest.raises(NotPortableError, match=r"adjacent.*tail"):
        exported(small(kv_sharing=AdjacentSharing(kind="adjacent", group=2)))
    with pytest.raises(NotPortableError, match="enable_moe_block"):
        model_config({**exported(small()), "enable_moe_block": True})
    state = state_to_hf(small(), Transformer(small()).state_dict())
    state["model.layers.2.layer_scalar"] = torch.tensor([0.5])
    with pytest.raises(NotPortableError, match=r"layers\.2\.layer_scalar"):
        list(state_from_hf(state.items()))


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "shape", "gone"])
def test_a_damaged_bundle_is_named(damage: str, tmp_path: Path) -> None:
    config = small()
    (tmp_path / "config.json").write_text(json.dumps(exported(config)))
    save_file(state_to_hf(config, Transformer(config).state_dict()), tmp_path / "model.safetensors")
    name = damage if "." in damage else "model.safetensors"
    if damage == "gone":
        (tmp_path / name).unlink()
    elif damage == "shape":
        other = small(d_ff=32)
        save_file(state_to_hf(other, Transformer(other).state_dict()), tmp_path / name)
    else:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises((NotPortableError, WeightsError), match=name):
        load_exported_model(tmp_path)
