"""The architecture's arithmetic: counts against built models, sharing maps, errors that say what to change."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_training_flops_of_a_model_counted_by_hand() -> None:
    """Two layers, one local with a window of 2: a document of 3 tokens has 1 + 2 + 2 and 1 + 2 + 3 pairs."""
    config = config_of(n_layers=2, layers="SG", window=2, vocab_size=320, d_model=16, n_heads=2, d_head=8, d_ff=24)
    query, key_value, output, feed_forward = 16 * 16, 2 * 16 * 8, 16 * 16, 3 * 16 * 24
    matrices = 320 * 16 + 2 * (query + key_value + output + feed_forward)
    pairs = (1 + 2 + 2) + (1 + 2 + 3)
    assert config.training_flops([3]) == 3 * 6 * matrices + 12 * 2 * 8 * pairs
    assert config.training_flops([3, 3]) == 2 * config.training_flops([3])
    assert config.training_flops([]) == 0


@given(st.lists(st.integers(1, 40), max_size=5), st.integers(1, 50))
def test_training_flops_count_what_each_query_sees(lengths: list[int], window: int) -> None:
    config = config_of(layers="SSG", n_layers=3, window=window)
    seen = sum(2 * min(place + 1, window) + place + 1 for n in lengths for place in range(n))
    per_token = config.training_flops([1]) - 12 * config.n_heads * config.d_head * 3
    assert config.training_flops(lengths) == per_token * sum(lengths) + 12 * config.n_heads * config.d_head * seen
