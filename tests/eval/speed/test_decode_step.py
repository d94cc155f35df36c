"""The benchmark of decoding steps: the bytes of its floor, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.speed.decode_step import main, step_bytes
from model.config import ModelConfig, TailSharing

RECIPES = Path(__file__).parents[3] / "recipes"


def test_layers_that_share_a_cache_read_it_again_and_windows_read_less() -> None:
    config = ModelConfig(
        vocab_size=10, d_model=8, n_layers=4, n_heads=2, d_head=4, d_ff=8, layers="SG", window=5, max_length=64,
        kv_sharing=TailSharing(kind="tail", n_layers=2),
    )  # fmt: skip
    seen = 2 * 5 + 2 * 20
    assert step_bytes(config, 3, 20) == 2 * config.n_parameters + 3 * seen * 2 * 4 * 2
    assert step_bytes(config, 3, 4) == 2 * config.n_parameters + 3 * 16 * 2 * 4 * 2


def test_contexts_must_fit_batches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["x.yaml", "--batches", "1", "2", "3", "--contexts", "5", "6"])
    assert error.value.code == 2 and "3 batches and 2 contexts" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECIPES / "bench" / "mqa_1b_global.yaml")]) == 2
    assert "sees none here" in capsys.readouterr().err
