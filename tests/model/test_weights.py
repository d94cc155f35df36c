"""A model directory loads to the same outputs, and a damaged or incomplete one is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.attention_ops import Documents
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import WeightsError, load_model, load_scorer, save_model

CONFIG = ModelConfig(
    vocab_size=30, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=24, layers="SG", window=4, max_length=32
)


def test_round_trip(tmp_path: Path) -> None:
    model, head = Transformer(CONFIG, seed=1), ScalarHead(CONFIG.d_model)
    torch.nn.init.normal_(head.score.weight)
    save_model(tmp_path / "m", CONFIG, model.state_dict(), head.state_dict())
    save_model(tmp_path / "m", CONFIG, model.state_dict(), head.state_dict())
    loaded, loaded_head = load_scorer(tmp_path / "m")
    tokens_T, documents = torch.arange(9), Documents.from_lengths([4, 5])
    assert torch.equal(loaded(tokens_T, documents), model(tokens_T, documents))
    assert torch.equal(loaded_head.score.weight, head.score.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_damage_is_named(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    with pytest.raises(WeightsError, match=r"config\.json does not exist"):
        load_model(tmp_path / "nothing")
    save_model(tmp_path / "m", CONFIG, model.state_dict())
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path / "m")
    weights.unlink()
    with pytest.raises(WeightsError, match=r"model\.safetensors does not exist"):
        load_model(tmp_path / "m")
    save_model(tmp_path / "m", CONFIG.model_copy(update={"d_ff": 32}), model.state_dict())
    with pytest.raises(WeightsError, match="has shape"):
        load_model(tmp_path / "m")
