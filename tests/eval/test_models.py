"""Tests of eval/models.py: one model in memory at a time, in the right dtype, for every part of an evaluation."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from eval.models import Models, stored_dtype
from eval.run import evaluate
from eval.workspace import EvalRecipe
from model.transformer import Transformer
from model.weights import load_model, load_scorer, save_model
from recipes.loader import load_recipe
from tests.eval.test_run import DEMO, overrides


def in_memory(module: nn.Module) -> bool:
    return any(not tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_a_model_is_released_before_the_next_is_loaded(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[nn.Module] = []

    def checked(load: object) -> object:
        def loading(*arguments: object) -> object:
            assert not any(in_memory(module) for module in loaded), "two models in memory"
            found = load(*arguments)  # type: ignore[operator]
            loaded.extend(found if isinstance(found, tuple) else [found])
            return found

        return loading

    monkeypatch.setattr("eval.models.load_model", checked(load_model))
    monkeypatch.setattr("eval.models.load_scorer", checked(load_scorer))
    evaluate(load_recipe(EvalRecipe, DEMO, overrides(pipeline)), Console(quiet=True))
    # perplexity, ranking, replies, drift and sensitivity; the scorer twice
    assert len(loaded) == 3 * 4 + 2 + 2 * 2
    assert not any(in_memory(module) for module in loaded), "the last one is released too"


def test_a_model_is_loaded_once_while_it_is_used(pipeline: Path) -> None:
    models = Models({name: str(pipeline / name) for name in ("pretrain", "sft")}, scorer=str(pipeline / "engagement"))
    assert (list(models), len(models)) == (["pretrain", "sft"], 2)
    first = models["sft"]
    assert models["sft"] is first and in_memory(first)
    trunk, head = models.scorer()
    assert not in_memory(first) and in_memory(trunk) and in_memory(head)
    assert models["sft"] is not first
    assert not in_memory(trunk) and not in_memory(head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_run_on_a_gpu_and_float32_on_the_cpu(
    tmp_path: Path, models: dict[str, Transformer], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in models["sft"].state_dict().items()}
    save_model(tmp_path / "run" / "model", models["sft"].config, state)
    assert stored_dtype(tmp_path / "run" / "model") == dtype
    held = Models({"run": str(tmp_path / "run")})
    held.device = torch.device("cpu")
    assert held["run"].embed_tokens.weight.dtype == torch.float32
    with monkeypatch.context() as patch:
        patch.setattr("eval.models.load_model", lambda directory, device, dtype: (device, dtype))
        on_gpu = Models({"run": str(tmp_path / "run")})
        on_gpu.device = torch.device("cuda")
        assert on_gpu["run"] == (torch.device("cuda"), dtype)
    asked = Models({"run": str(tmp_path / "run")}, dtype=torch.bfloat16)
    asked.device = torch.device("cpu")
    assert asked["run"].embed_tokens.weight.dtype == torch.bfloat16
