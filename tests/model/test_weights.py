"""A model directory loads to the same outputs, and a damaged or incomplete one is named."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

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
    trunk, half_head = load_scorer(tmp_path / "m", dtype=torch.bfloat16)
    assert trunk.embed_tokens.weight.dtype == torch.bfloat16
    assert half_head(trunk(tokens_T, documents)).dtype == torch.float32, "scores in 16 bits would tie"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_one_tensor_at_a_time_into_their_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """No more than one tensor in the file's dtype is alive while the converted ones are made."""
    model = Transformer(CONFIG, seed=1).to(torch.float16)
    save_model(tmp_path / "m", CONFIG, model.state_dict())
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    @contextmanager
    def opened(path: Path, framework: str) -> Iterator[Any]:
        nonlocal most
        with safe_open(path, framework) as file:

            def get_tensor(name: str) -> torch.Tensor:
                nonlocal most
                tensor = file.get_tensor(name)
                alive.add(tensor)
                most = max(most, len(alive))
                return tensor

            yield SimpleNamespace(keys=file.keys, get_tensor=get_tensor)

    monkeypatch.setattr("model.weights.safe_open", opened)
    loaded = load_model(tmp_path / "m", dtype=dtype)
    assert 1 <= most <= 2  # the next one is read before the last reference to the one before is dropped
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert all(map(torch.equal, loaded.state_dict().values(), model.to(dtype).state_dict().values()))
