"""Tests of eval/ablation/__main__.py and its readers: the whole evaluation on arms in miniature, and what it
refuses."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data.format.tokenizer import DialogueTokenizer
from data.packed.shards import PackedDataset
from eval.ablation.__main__ import CONTEXT_BINS, main
from eval.ablation.plots import DRAWINGS
from eval.ablation.runs import AblationRecipe, read_arms, training_spread, unseen_rows
from eval.ablation.table import is_decided
from eval.parts.training_curve import MetricsError
from eval.scoring import spread_rows
from eval.workspace import EvalError
from model.config import ModelConfig
from model.transformer import Transformer
from model.weights import load_config, save_model
from recipes.json_text import finite_figures
from recipes.loader import RecipeError, load_recipe
from recipes.run_inputs import digest_inputs

RECIPE = Path(__file__).parents[3] / "recipes" / "ablation" / "eval.yaml"
ARMS = {"full": ("G", 2), "shared": ("G", 1), "windows": ("SSG", 1)}
EVALUATION_ROWS = 2


def make_run(root: Path, name: str, model: Transformer, lr: float, heldout_loss: float) -> str:
    """What a finished pre-training run leaves, as far as the evaluation reads it."""
    run_dir = root / f"{name}_lr_{lr:g}"
    save_model(
        run_dir / "model", model.config, model.state_dict(), files={"tokenizer.model": root / "data/tokenizer.model"}
    )
    inputs = digest_inputs({"data": root / "data"})
    done = {"key_figure": "done", "inputs": inputs, "figures": finite_figures({"heldout_loss": heldout_loss})}
    (run_dir / "done.json").write_text(json.dumps(done))
    (run_dir / "recipe.yaml").write_text(f"optimizer: {{kind: adamw, lr: {lr}}}\nevaluation_rows: {EVALUATION_ROWS}\n")
    losses = np.random.default_rng(0).normal(3.0, 0.01, 40)
    losses[30] = 9.0
    lines = [{"step": i + 1, "loss": loss, "gradient_norm": 1.0 + 0.01 * (i % 2)} for i, loss in enumerate(losses)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(run_dir)


@pytest.fixture
def arms(pipeline: Path, tokenizer: DialogueTokenizer) -> dict[str, list[str]]:
    """Three untrained arms beside finished data; the second learning rate of three is each one's best."""
    found: dict[str, list[str]] = {}
    for name, (layers, n_kv_heads) in ARMS.items():
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, d_model=16, n_layers=3, n_heads=2, n_kv_heads=n_kv_heads, d_head=8,
            d_ff=32, layers=layers, window=8, max_length=256,
        )  # fmt: skip
        losses = {1e-3: 5.5, 2e-3: 5.0, 4e-3: float("nan")}
        found[name] = [
            make_run(pipeline, name, Transformer(config, seed=number), lr, loss)
            for number, (lr, loss) in enumerate(losses.items())
        ]
    return found


def overrides(root: Path, arms: dict[str, list[str]]) -> list[str]:
    return [
        f"run_dir={root / 'ablation'}", f"data={root / 'data'}", f"arms={json.dumps(arms)}", "batch_tokens=2048",
        "bootstrap.n_resamples=40", "contexts.max_prompt_tokens=60", "contexts.min_messages=2", "ranking.n_contexts=6",
        "ranking.n_distractors=3", "recall.n_items=3", "recall.n_candidates=2", "recall.distances=[96, 120]",
        "spikes.window=16", "speed.prompt_tokens=12", "speed.new_tokens=4", "speed.batches=[1, 3]", "speed.repeats=2",
    ]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, root: Path, arms: dict[str, list[str]], *extra: str) -> int:
    monkeypatch.setattr("sys.argv", ["eval.ablation", str(RECIPE), *overrides(root, arms), *extra])
    return main()


def test_whole_ablation(
    pipeline: Path, arms: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, pipeline, arms) == 0, capsys.readouterr().err
    out = pipeline / "ablation"
    report = json.loads((out / "report.json").read_text())
    assert list(report["arms"]) == list(ARMS) and report["against"] == "full"
    for name, arm in report["arms"].items():
        assert (arm["lr"], arm["run_dir"]) == (2e-3, arms[name][1]) and not arm["best_is_at_the_edge"]
        assert [run["heldout_loss"] for run in arm["runs"]] == [5.5, 5.0, None]
        assert arm["runs"][0]["spikes"]["loss"]["count"] == 1
    assert report["arms"]["full"]["kv_bytes_per_token"] == 2 * report["arms"]["shared"]["kv_bytes_per_token"]
    assert report["arms"]["windows"]["kv_bytes"]["1024"] < report["arms"]["shared"]["kv_bytes"]["1024"]

    losses = report["loss"]["arms"]
    assert losses["full"]["difference"] is None
    for name in ("shared", "windows"):
        gap = losses[name]["loss"]["value"] - losses["full"]["loss"]["value"]
        assert losses[name]["difference"]["value"] == pytest.approx(gap)
        assert losses[name]["difference"]["low"] < losses[name]["difference"]["high"]
    # every target is in one bin of context
    assert sum(b["loss"]["n"] for b in losses["full"]["by_context"]) == report["loss"]["n_targets"]
    assert [len(at["models"]) for at in report["recall"]["distances"]] == [3, 3]
    assert [at["batch"] for at in report["speed"]["arms"]["windows"]] == [1, 3]

    table = (out / "table.md").read_text()
    assert all(f"| **{name}** |" in table for name in ARMS) and "**5.0000**" in table and "nan" not in table
    assert "no difference between arms is decided" in table and table.count(", not decided") == 2
    assert sorted(path.stem for path in (out / "plots").iterdir()) == sorted(DRAWINGS)
    capsys.readouterr()
    assert call(monkeypatch, pipeline, arms) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_dry_run_says_what_is_missing(
    pipeline: Path, arms: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(arms["shared"][1]) / "done.json").unlink()
    assert call(monkeypatch, pipeline, arms, "--dry-run") == 0
    assert "not finished" in " ".join(capsys.readouterr().out.split())
    assert not (pipeline / "ablation").exists()


def refusal(pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer, longest: int = 192) -> str:
    recipe = load_recipe(AblationRecipe, RECIPE, overrides(pipeline, arms))
    with pytest.raises((EvalError, MetricsError)) as caught:
        read_arms(recipe, tokenizer, longest)
    return str(caught.value)


def test_what_does_not_fit_is_refused(pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer) -> None:
    assert "arms.full.0: max_length" in refusal(pipeline, arms, tokenizer, longest=300)
    mixed = {**arms, "shared": [arms["shared"][0], arms["windows"][0]], "windows": arms["windows"][1:]}
    assert "arms.shared: its runs have different architectures" in refusal(pipeline, mixed, tokenizer)
    first = Path(arms["shared"][0])
    metrics = (first / "metrics.jsonl").read_text()
    (first / "metrics.jsonl").write_text("".join(metrics.splitlines(keepends=True)[::2]))
    assert "log_every=1" in refusal(pipeline, arms, tokenizer)
    (pipeline / "data" / "done.json").write_text('{"key_figure": "prepared again"}')
    assert "was trained on other data" in refusal(pipeline, arms, tokenizer)
    (first / "model" / "tokenizer.model").write_bytes(b"another")
    only = {"shared": [arms["shared"][0]], "full": arms["full"]}
    assert "another tokenizer" in refusal(pipeline, only, tokenizer)


def test_diverged_runs_alone_are_no_arm(
    pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer
) -> None:
    assert "no run has a finite" in refusal(pipeline, {**arms, "shared": arms["shared"][2:]}, tokenizer)


def test_the_best_at_the_edge_is_marked(
    pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer
) -> None:
    recipe = load_recipe(AblationRecipe, RECIPE, overrides(pipeline, {**arms, "shared": arms["shared"][:2]}))
    found = read_arms(recipe, tokenizer, 192)
    assert found["shared"].best_is_at_the_edge and not found["full"].best_is_at_the_edge


def test_a_difference_between_arms_is_decided_by_dialogues_and_seeds(
    pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer
) -> None:
    """Its interval must exclude 0, and it must exceed what another training of one arm changes."""
    model = Transformer(load_config(Path(arms["full"][0]) / "model"), seed=9)
    once = load_recipe(AblationRecipe, RECIPE, overrides(pipeline, arms))
    assert training_spread(read_arms(once, tokenizer, 192).values()) is None
    again = make_run(pipeline, "full_again", model, 2e-3, 5.25)
    other = make_run(pipeline, "full_diverged", model, 4e-3, float("nan"))
    twice = load_recipe(AblationRecipe, RECIPE, overrides(pipeline, {**arms, "full": [*arms["full"], again, other]}))
    spread = training_spread(read_arms(twice, tokenizer, 192).values())
    assert spread == pytest.approx(0.25)

    def found(value: float, half: float, spread: float | None) -> bool:
        return is_decided({"value": value, "low": value - half, "high": value + half}, spread)

    assert found(0.3, 0.1, spread) and found(-0.3, 0.1, spread)
    assert not found(0.2, 0.1, spread), "smaller than the difference between seeds"
    assert not found(0.3, 0.4, spread), "the interval includes 0"
    assert not found(0.3, 0.1, None), "no second seed"
    assert not is_decided({"value": 0.3, "low": None, "high": None}, spread)


def test_rows_that_chose_a_learning_rate_are_not_reported_on(
    pipeline: Path, arms: dict[str, list[str]], tokenizer: DialogueTokenizer
) -> None:
    recipe = load_recipe(AblationRecipe, RECIPE, overrides(pipeline, arms))
    found = list(read_arms(recipe, tokenizer, 192).values())
    n_rows = PackedDataset(pipeline / "data" / "heldout").n_rows
    rows = unseen_rows(found, n_rows, 1000)
    assert sorted([*rows, *spread_rows(n_rows, EVALUATION_ROWS)]) == list(range(n_rows))
    assert len(unseen_rows(found, n_rows, 2)) == 2
    with pytest.raises(EvalError, match="on all 2 held-out rows"):
        unseen_rows(found, 2, 10)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("arms={mha: [runs/a]}", "expected at least two"),
        ("arms={mha: [runs/a], mqa: [runs/a]}", "runs/a given twice"),
        ("arms.mha=[]", "arms.mha"),
        ("speed.new_tokens=2", "speed.new_tokens"),
    ],
)
def test_recipe_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(AblationRecipe, RECIPE, [override])


def test_the_bins_of_context_leave_no_gap() -> None:
    assert CONTEXT_BINS[0][0] == 1
    assert all(after[0] == before[1] + 1 for before, after in pairwise(CONTEXT_BINS))
