"""DeepSpeed runs with the values that we write, not with its defaults; what it cannot run right is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.loader import RecipeError, load_recipe
from train.deepspeed.engine import EngineConfig, deepspeed_config
from train.optim import AdamW, Muon
from train.pretrain import PretrainRecipe

MUON = {"kind": "muon", "lr": 0.02, "adamw_lr": 3e-3, "gradient_clipping": 0.7}
ADAMW = {"kind": "adamw", "lr": 3e-3, "gradient_clipping": 0.7}
WRAPPERS = {  # optimizer, precision, stage: the class that DeepSpeed must choose
    ("muon", "bfloat16", 1): "BF16_Optimizer",
    ("adamw", "bfloat16", 1): "BF16_Optimizer",
    ("adamw", "bfloat16", 2): "DeepSpeedZeroOptimizer",
    ("adamw", "float32", 1): "DeepSpeedZeroOptimizer",
    ("adamw", "float32", 3): "DeepSpeedZeroOptimizer_Stage3",
}
EVERY_WAY = [*WRAPPERS, ("adamw", "bfloat16", 3), ("adamw", "float32", 2)]


@pytest.fixture(scope="module")
def in_use(steps_on_ranks: Callable[[int, dict[str, Any]], list[dict[str, Any]]]) -> dict[str, Any]:
    """By "kind precision stage": the settings DeepSpeed reports after a step."""
    cases = {
        f"{kind} {precision} {stage}": {
            "optimizer": MUON if kind == "muon" else ADAMW,
            "engine": {"precision": precision, "zero_stage": stage},
            "micro_batches": [[[0]]],
        }
        for kind, precision, stage in WRAPPERS
    }
    (results,) = steps_on_ranks(1, cases)
    return {name: result["settings"] for name, result in results.items()}


@pytest.mark.parametrize(("kind", "precision", "stage"), WRAPPERS)
def test_deepspeed_runs_with_what_is_written(in_use: dict[str, Any], kind: str, precision: str, stage: Any) -> None:
    found = in_use[f"{kind} {precision} {stage}"]
    assert found["optimizer"] == WRAPPERS[kind, precision, stage]
    assert found["wrapped"] == {"muon": "MuonWithAuxAdam", "adamw": "AdamW"}[kind]
    assert found["clip"] == [0.7, 0.7]
    dtype = {"bfloat16": "torch.bfloat16", "float32": "torch.float32"}[precision]
    assert found["dtypes"] == [dtype, "torch.float32", "torch.float32"]
    assert found["gradient_average"] is True  # TrainingEngine.accumulate multiplies by the number of ranks
    assert (found["prescale_gradients"], found["gradient_predivide_factor"]) == (False, 1.0)
    assert found["managed_gradient_accumulation"] is False
    assert found["zero_allow_untested_optimizer"] is False
    assert (found["fp16"], found["torch_autocast"]) == (False, False)
    assert set(found["main_grads"]) == {found["adds_to_main_grads"]} == {found["optimizer"] == "BF16_Optimizer"}
    optimizer = Muon(**MUON) if kind == "muon" else AdamW(**ADAMW)  # type: ignore[arg-type]
    written = deepspeed_config(EngineConfig(precision=precision, zero_stage=stage), optimizer, 1)  # type: ignore[arg-type]
    for section in ("bf16", "zero_optimization"):
        values = {key.removeprefix("stage3_"): value for key, value in written[section].items()}
        assert {key: found[section][key] for key in values} == values
    # these have changed silently between releases, so they are written whatever they are
    assert {"check_grad_overflow", "immediate_grad_update"} <= written["bf16"].keys()
    assert {"stage", "overlap_comm", "reduce_scatter", "contiguous_gradients"} <= written["zero_optimization"].keys()
    assert {"gradient_clipping", "communication_data_type", "data_types"} <= written.keys()


@pytest.fixture(scope="module")
def refusals(steps_on_ranks: Callable[[int, dict[str, Any]], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each rank, by "kind precision stage how": two steps, and between them none or one that is not to be taken."""
    between = {
        "none": {"steps": 2},
        "nan": {"steps": 3, "spoilt": {"1": [0.0, math.nan]}},
        "infinite": {"steps": 3, "spoilt": {"1": [math.inf, 0.0]}},
        "refused": {"steps": 3, "refused": [1]},
    }
    cases = {
        f"{kind} {precision} {stage} {how}": {
            "optimizer": MUON if kind == "muon" else ADAMW,
            "engine": {"precision": precision, "zero_stage": stage},
            "micro_batches": [[[0], [1]], [[2], [3]]],
            **steps,
        }
        for kind, precision, stage in EVERY_WAY
        for how, steps in between.items()
    }
    return steps_on_ranks(2, cases)


@pytest.mark.parametrize("how", ["nan", "infinite", "refused"])
@pytest.mark.parametrize(("kind", "precision", "stage"), EVERY_WAY)
def test_a_step_that_is_not_taken_leaves_all_as_it_was(
    refusals: list[dict[str, Any]], kind: str, precision: str, stage: int, how: str
) -> None:
    """The gradient itself is finite: what is added to one rank's loss is a constant."""
    for of_rank in refusals:
        expected, found = (of_rank[f"{kind} {precision} {stage} {name}"] for name in ("none", how))
        assert found["taken"] == [True, False, True]
        before, after = found["masters"][1:3]
        assert all(torch.equal(before[name], after[name]) for name in before)
        # the step after it finds weights, optimizer state and gradients as if it had not been
        assert all(torch.equal(found["weights"][name], expected["weights"][name]) for name in expected["weights"])
        assert all(torch.equal(found["masters"][3][name], expected["masters"][2][name]) for name in before)
        assert [found["norms"][0], found["norms"][2]] == expected["norms"]
        assert math.isfinite(found["norms"][1]) == (how == "refused")


@pytest.mark.parametrize("engine", ["{precision: float32}", "{zero_stage: 2}", "{zero_stage: 3}"])
def test_muon_where_deepspeed_clips_the_update_is_refused(pretrain_recipe: Path, engine: str) -> None:
    overrides = [f"engine={engine}", "optimizer={kind: muon, lr: 0.02, adamw_lr: 3e-3}"]
    with pytest.raises(RecipeError, match=r"engine: .*muon needs precision bfloat16 and zero_stage 1, found"):
        load_recipe(PretrainRecipe, pretrain_recipe, overrides)
    load_recipe(PretrainRecipe, pretrain_recipe, ["engine={}", overrides[1]])
    load_recipe(PretrainRecipe, pretrain_recipe, [overrides[0]])
