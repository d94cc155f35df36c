"""The architecture's arithmetic: counts against built models, sharing maps, errors that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from model.config import AdjacentSharing, ModelConfig, TailSharing
from model.transformer import Transformer


def config_of(**changes: Any) -> ModelConfig:
    base = ModelConfig(
        vocab_size=50, d_model=16, n_layers=6, n_heads=4, d_head=8, d_ff=24, layers="SSG", window=4, max_length=32
    )
    return ModelConfig(**{**dict(base), **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_sharing": TailSharing(kind="tail", n_layers=3)}, {"n_kv_heads": 4},
     {"kv_sharing": AdjacentSharing(kind="adjacent", group=2)}],
)  # fmt: skip
def test_parameter_count_is_the_built_models(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    assert config.n_parameters == sum(p.numel() for p in Transformer(config).parameters())


def test_tail_reads_the_last_unshared_layer_of_its_kind() -> None:
    config = config_of(kv_sharing=TailSharing(kind="tail", n_layers=3))
    assert [config.kv_source(layer) for layer in range(6)] == [0, 1, 2, 1, 1, 2]
    assert config.kv_bytes_per_token() == 2 * 3 * 8 * 2
    assert config.kv_bytes(10) == 2 * (4 + 4 + 10) * 8 * 2


def test_adjacent_groups_stay_within_a_kind() -> None:
    config = config_of(kv_sharing=AdjacentSharing(kind="adjacent", group=2))
    assert [config.kv_source(layer) for layer in range(6)] == [0, 0, 2, 3, 3, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "not a multiple"),
        ({"d_head": 7}, "odd"),
        ({"n_layers": 5}, "must be global"),
        ({"kv_sharing": TailSharing(kind="tail", n_layers=5)}, "share fewer layers"),
        ({"windw": 4}, "windw"),
    ],
)
def test_impossible_architectures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config_of(**changes)


def test_flops_count_the_window() -> None:
    local, wide = config_of(layers="SSSSSG", window=8), config_of(layers="G")
    assert local.flops_per_token(4096) < wide.flops_per_token(4096)
    assert config_of(layers="SSSSSG", window=4096).flops_per_token(4096) == wide.flops_per_token(4096)
