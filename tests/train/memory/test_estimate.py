"""The estimate of a rank's memory against measured runs, and its states against what DeepSpeed's objects hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from rich.console import Console

from data.packed.synthetic import SyntheticData
from model.config import ModelConfig
from model.portability import obstacles
from recipes.loader import load_recipe
from train.deepspeed.engine import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS, EngineConfig
from train.memory.estimate import GIB, Load, ParameterCounts
from train.memory.report import Summary, warning
from train.pretrain import PretrainRecipe
from train.summary import summarize

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "recipes" / "bench"
MEASURED = [  # BENCHMARKS.md, "Pre-training on one GPU": torch.cuda.max_memory_allocated in GiB
    ("mqa_1b_global", [], 44.4),
    ("mqa_1b_global", ["engine.recompute=elementwise"], 35.8),
    ("mqa_1b_global", ["engine.recompute=elementwise", "engine.recompute_blocks=6"], 32.2),
]
TINY = ModelConfig(  # tests/train/steps_on_ranks.py
    vocab_size=61, d_model=32, n_layers=3, n_heads=2, d_head=16, d_ff=48, layers="SSG", window=4, max_length=64
)
ADAMW = {"kind": "adamw", "lr": 3e-3}
MUON = {"kind": "muon", "lr": 0.02, "adamw_lr": 3e-3}
STATES = [
    ("bfloat16", 1, ADAMW),
    ("bfloat16", 2, ADAMW),
    ("bfloat16", 3, ADAMW),
    ("bfloat16", 1, MUON),
    ("float32", 1, ADAMW),
    ("float32", 3, ADAMW),
]


def load_of(path: Path, overrides: list[str]) -> Load:
    recipe = load_recipe(PretrainRecipe, path, overrides)
    load = summarize(recipe, recipe.data, recipe.model).load
    assert load
    return load


@pytest.mark.parametrize(("recipe", "overrides", "measured"), MEASURED)
def test_the_estimate_is_within_a_tenth_of_the_measured(recipe: str, overrides: list[str], measured: float) -> None:
    estimate = load_of(BENCH / f"{recipe}.yaml", overrides).estimate(1)
    assert estimate.total / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_states_are_what_deepspeed_holds_and_a_checkpoint_copies(
    steps_on_ranks: Callable[[int, dict[str, Any]], list[dict[str, Any]]], ranks: int
) -> None:
    """Between the last backward and the update of the second step, when moments and gradients are all there."""
    cases = {
        f"{precision} {stage} {optimizer['kind']}": {
            "optimizer": optimizer,
            "engine": {"precision": precision, "zero_stage": stage},
            "micro_batches": [[[rank]] for rank in range(ranks)],
            "steps": 2,
            "measures_memory": True,
        }
        for precision, stage, optimizer in STATES
    }
    results = steps_on_ranks(ranks, cases)
    for (precision, stage, optimizer), name in zip(STATES, cases, strict=True):
        engine = TypeAdapter(EngineConfig).validate_python({"precision": precision, "zero_stage": stage})
        kind: Any = optimizer["kind"]
        load = Load(TINY, engine, kind, 64, persistent_elements=PERSISTENT_ELEMENTS["cpu"])
        expected = sum(load.states(ranks).values())
        if stage == 3 or precision == "float32":  # in float32 ZeRO-1's bucket waits for the step
            expected += 4 * BUCKET_ELEMENTS["cpu"]
        for result in results:
            # the scorer's head, alignment, step counters and ZeRO-2's flags: less than the smallest part of it all
            held = result[name]["held_bytes"]
            assert abs(held - expected) < 8192, (name, held, expected)
        for rank, result in enumerate(results):
            copied, expected = result[name]["host_bytes"], load.host_bytes(ranks, is_main=rank == 0)
            assert abs(copied - expected) < 8192, (name, rank, copied, expected)


def test_parameters_are_those_of_the_architecture() -> None:
    for name in ("mqa_1b_windows_8k", "mqa_1b_global"):
        config = load_recipe(PretrainRecipe, BENCH / f"{name}.yaml").model
        assert ParameterCounts.of(config).total == config.n_parameters


def test_more_ranks_recomputation_and_shorter_micro_batches_need_no_more() -> None:
    load = load_of(BENCH / "mqa_1b_windows_8k.yaml", [])
    totals = {
        (stage, recompute): [
            replace(load, engine=EngineConfig(zero_stage=stage, recompute=recompute)).estimate(ranks).total  # type: ignore[arg-type]
            for ranks in (2, 8, 64)
        ]
        for stage in (1, 2, 3)
        for recompute in ("none", "elementwise", "block")
    }
    assert all(values == sorted(values, reverse=True) for values in totals.values())
    for stage in (1, 2, 3):
        assert totals[stage, "none"] > totals[stage, "elementwise"] > totals[stage, "block"]
    assert replace(load, tokens=load.tokens // 2).estimate(1).total < load.estimate(1).total
    assert replace(load, optimizer="muon").estimate(1).total < load.estimate(1).total


def test_a_checkpoint_on_the_host_is_moments_master_and_weights() -> None:
    load = load_of(BENCH / "mqa_1b_global.yaml", [])
    n = load.counts.total
    assert load.host_bytes(1, is_main=True) == 12 * n + 2 * n
    assert load.host_bytes(8, is_main=False) == pytest.approx(12 * n / 8, rel=1e-6)


def test_a_recipe_that_does_not_fit_is_told_what_to_change() -> None:
    load = load_of(BENCH / "mqa_1b_global.yaml", [])
    assert warning(load, 4, 1, 80 * 10**9) is None
    text = warning(load, 4, 1, 40 * GIB) or ""
    assert "44.4 GiB" in text and "engine.recompute=elementwise" in text and "loop.rows_per_micro_batch=1" in text
    assert "zero_stage" not in text, "on one rank it saves nothing"
    assert "combine" in (warning(load, 4, 1, 8 * GIB) or "")
    assert "engine.zero_stage=3" in (warning(load, 4, 8, 33 * GIB) or "")


def test_the_dry_run_shows_the_recipes_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    recipe = load_recipe(PretrainRecipe, BENCH / "mqa_1b_global.yaml", ["engine.zero_stage=2"])
    assert isinstance(recipe.data, SyntheticData)
    console = Console(record=True, width=120)
    summary = summarize(recipe, recipe.data, recipe.model)
    summary.print(console)
    summary.print_memory(console)
    text = console.export_text()
    own = f"{load_of(BENCH / 'mqa_1b_global.yaml', ['engine.zero_stage=2']).estimate(16).total / GIB:.1f}"
    (row,) = [line for line in text.splitlines() if "ZeRO-2" in line]
    assert f"{own} *" in row
    for part in ("weights", "master", "gradients", "moments", "activations", "logits", "buffers"):
        assert part in text
    Summary([], None).print_memory(console)  # nothing is known: nothing is printed


@pytest.mark.parametrize(("model", "ranks"), [("mqa_13b", 64), ("mqa_1b", 1)])
def test_the_large_recipes_fit_80_gb_and_run_on_all_engines(model: str, ranks: int) -> None:
    load = load_of(ROOT / "recipes" / model / "pretrain.yaml", [])
    assert load.estimate(ranks).total < 0.9 * 80e9
    assert not any(obstacles(load.config).values())
