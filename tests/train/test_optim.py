"""Which parameters each optimizer updates how, on one and two ranks, by what it does to the float32 weights."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from train.loop import Loss
from train.optim import AdamW, Muon, _import_muon, build_optimizer, parameter_roles
from train.stage import LossModule

MUON = {"kind": "muon", "lr": 0.02, "weight_decay": 0.0, "adamw_lr": 3e-3}
ADAMW = {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.0}
# with an eps this large a first step of AdamW is the gradient itself
GRADIENT = {"kind": "adamw", "lr": 1e6, "eps": 1e6, "weight_decay": 0.0, "gradient_clipping": 1e9}
BFLOAT16 = {"precision": "bfloat16"}
# documents of uneven length, in uneven micro-batches
ON_TWO = [[[0, 1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10, 11]]]
ON_ONE = [[[0, 1, 2, 3, 5, 6], [4, 7, 8, 9, 10, 11]]]

ROOT = Path(__file__).parents[2]

Results = list[dict[str, Any]]


def case(optimizer: dict[str, Any], engine: dict[str, Any], micro_batches: Any, **changes: Any) -> dict[str, Any]:
    return {"optimizer": {**optimizer, **changes}, "engine": engine, "micro_batches": micro_batches, "steps": 1}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, steps_on_ranks: Callable[[int, dict[str, Any]], Results]) -> Results:
    """All cases, on one rank and on two."""
    batches = ON_ONE if request.param == 1 else ON_TWO
    cases = {
        "muon": {**case(MUON, BFLOAT16, batches), "steps": 2, "documents_apart": 100},
        "muon_clipped": case(MUON, BFLOAT16, batches, gradient_clipping=0.05),
        "muon_decayed": case(MUON, BFLOAT16, batches, weight_decay=0.5),
        "muon_halved": {**case(MUON, BFLOAT16, batches), "lr_multiplier": 0.5},
        "adamw": case(ADAMW, BFLOAT16, batches),
        "adamw_decayed": case(ADAMW, BFLOAT16, batches, weight_decay=0.5),
        "gradient": case(GRADIENT, BFLOAT16, batches),
    }
    return steps_on_ranks(request.param, cases)


TINY = ModelConfig(vocab_size=9, d_model=8, n_layers=1, n_heads=1, d_head=8, d_ff=8, layers="G", max_length=16)
import_compiled = partial(_import_muon, is_compiled=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_the_settings_of_its_role(optimizer: str) -> None:
    module = LossModule(Transformer(TINY), lambda module, batch: Loss(torch.zeros(())), ScalarHead(8))
    if optimizer == "adamw":
        settings: AdamW | Muon = AdamW(
            kind="adamw", lr=0.1, beta1=0.7, beta2=0.8, eps=1e-3, weight_decay=0.4, gradient_clipping=1
        )
    else:
        settings = Muon(
            kind="muon", lr=0.1, momentum=0.6, adamw_lr=0.2, adamw_beta1=0.7, adamw_beta2=0.8, adamw_eps=1e-3,
            weight_decay=0.4,
        )  # fmt: skip
    groups = {id(p): group for group in build_optimizer(module, settings).param_groups for p in group["params"]}
    assert len(groups) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        group, decays = groups[id(parameter)], is_block_matrix(name) or name == "head.score.weight"
        assert group["weight_decay"] == (0.4 if decays else 0.0), name
        if optimizer == "muon" and is_block_matrix(name):
            assert (group["use_muon"], group["lr"], group["momentum"]) == (True, 0.1, 0.6)
        else:
            assert (group["lr"], group["betas"], group["eps"]) == (
                0.1 if optimizer == "adamw" else 0.2,
                (0.7, 0.8),
                1e-3,
            )


def test_muon_is_compiled_only_for_muon_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed imports its module whatever the optimizer is, and the compiler's import takes a second."""
    from deepspeed.runtime import compiler

    def compile_function() -> Callable[[Any], Any]:
        compiled.append(1)
        return lambda function: function

    module = LossModule(Transformer(TINY), lambda module, batch: Loss(torch.zeros(())), ScalarHead(8))
    monkeypatch.setattr(compiler, "compile", compile_function)
    adamw, muon = AdamW(kind="adamw", lr=0.1), Muon(kind="muon", lr=0.1, adamw_lr=0.2)
    for build in (partial(build_optimizer, module, adamw), partial(build_optimizer, module, muon), import_compiled):
        compiled: list[int] = []
        for name in ("original_muon", "muon_optimizer"):
            monkeypatch.delitem(sys.modules, f"deepspeed.runtime.zero.muon.{name}", raising=False)
        build()
        assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
        assert bool(compiled) == (build is import_compiled)
        assert compiler.compile is compile_function


def test_muon_is_refused_where_the_update_would_be_clipped() -> None:
    muon = Muon(kind="muon", lr=0.1, adamw_lr=0.2)
    for precision in ("float32", "bfloat16"):
        for zero_stage in (1, 2, 3):
            obstacle = muon.obstacle(precision, zero_stage)
            assert (obstacle is None) == ((precision, zero_stage) == ("bfloat16", 1))
            assert obstacle is None or f"found {precision} and {zero_stage}" in obstacle


def update(result: dict[str, Any], step: int = 0) -> dict[str, Tensor]:
    before, after = result["masters"][step : step + 2]
    return {name: after[name] - before[name] for name in before}


def is_block_matrix(name: str) -> bool:
    return ".blocks." in name and "norm" not in name


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_exactly_the_blocks_matrices_are_orthogonalized(ranks: Results) -> None:
    orthogonalized = set()
    muon, gradients = update(ranks[0]["muon"]), update(ranks[0]["gradient"])
    for name, step in muon.items():
        if step.ndim == 1:
            assert relative(step, 3e-3 * gradients[name].sign()) < 1e-2, name  # AdamW's first step
            continue
        left, values, right = torch.linalg.svd(gradients[name], full_matrices=False)
        nearest = left @ right
        size = 0.02 * math.sqrt(max(1, len(step) / step.shape[1]))
        sizes = torch.linalg.svdvals(step)[values > values[0] / 30] / size
        cosine = float((step * nearest).sum() / step.norm() / nearest.norm())
        if bool(((sizes > 0.55) & (sizes < 1.3)).all()) and cosine > 0.9 and min(step.shape) > 1:
            orthogonalized.add(name)
        else:
            assert relative(step, 3e-3 * gradients[name].sign()) < 0.05, name
    assert orthogonalized == {name for name in muon if is_block_matrix(name)}
    assert len(orthogonalized) == 3 * 7


def plain_gradients(weights: dict[str, Tensor], numbers: range) -> dict[str, Tensor]:
    """By autograd alone, of documents in one batch at these weights rounded to bfloat16; clipped to a norm of one."""
    spec = importlib.util.spec_from_file_location("steps_on_ranks", Path(__file__).with_name("steps_on_ranks.py"))
    assert spec is not None and spec.loader is not None
    steps = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(steps)
    trunk = Transformer(steps.CONFIG, "reference")
    module = LossModule(trunk, steps.loss, ScalarHead(steps.CONFIG.d_model))
    module.load_state_dict({name: weight.bfloat16().float() for name, weight in weights.items()})
    documents = [steps.document(number) for number in numbers]
    (module(documents).total / steps.count(documents)).backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    return {name: gradient / norm.clamp(min=1) for name, gradient in gradients.items()}


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def test_muons_second_step_follows_its_momentum(ranks: Results) -> None:
    """Nesterov's momentum of both steps' gradients (other documents in each), made orthogonal: nothing simpler."""
    first = plain_gradients(ranks[0]["muon"]["masters"][0], range(12))
    second = plain_gradients(ranks[0]["muon"]["masters"][1], range(100, 112))
    beta, cosines = 0.95, []
    for name, step in update(ranks[0]["muon"], 1).items():
        if is_block_matrix(name):
            momentum = beta * (1 - beta) * first[name] + (1 - beta) * second[name]
            blended = beta * momentum + (1 - beta) * second[name]
            candidates = [nearest_orthogonal(matrix) for matrix in (blended, momentum, second[name], first[name])]
            cosines.append([-float((step * c).sum() / step.norm() / c.norm()) for c in candidates])
    right, *wrong = torch.tensor(cosines).mean(0).tolist()
    assert right > 0.95
    assert right > max(wrong) + 0.03, (right, wrong)


def test_the_size_of_an_update_does_not_depend_on_clipping(ranks: Results) -> None:
    plain, clipped = update(ranks[0]["muon"]), update(ranks[0]["muon_clipped"])
    assert ranks[0]["muon"]["norms"][0] == ranks[0]["muon_clipped"]["norms"][0]
    assert ranks[0]["muon"]["norms"][0] > 1  # so that both were clipped, by factors twenty apart
    for name in filter(is_block_matrix, plain):
        assert relative(clipped[name], plain[name]) < 0.02, name


def test_the_schedule_multiplies_each_groups_own_rate(ranks: Results) -> None:
    plain, halved = update(ranks[0]["muon"]), update(ranks[0]["muon_halved"])
    for name in plain:
        assert relative(halved[name], 0.5 * plain[name]) < 1e-4, name


def test_the_norm_is_the_gradients(ranks: Results) -> None:
    squares = sum(float(g.square().sum()) for g in update(ranks[0]["gradient"]).values())
    assert ranks[0]["muon"]["norms"][0] == pytest.approx(math.sqrt(squares), rel=1e-3)


def test_ranks_hold_the_same_bits(ranks: Results) -> None:
    for held in ("masters", "weights"):
        first, *others = (rank["muon"][held] for rank in ranks)
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=0)
    for name, weight in ranks[0]["muon"]["weights"].items():
        assert torch.equal(weight, ranks[0]["muon"]["masters"][-1][name].bfloat16())


@pytest.mark.parametrize(("kind", "lr"), [("muon", 0.02), ("adamw", 3e-3)])
def test_matrices_decay_and_nothing_else(ranks: Results, kind: str, lr: float) -> None:
    plain, decayed = update(ranks[0][kind]), update(ranks[0][f"{kind}_decayed"])
    for name, weight in ranks[0][kind]["masters"][0].items():
        difference = decayed[name] - plain[name]
        if is_block_matrix(name):
            assert relative(difference, -lr * 0.5 * weight) < 1e-3, name
        else:  # the head decays too, from zero
            assert not difference.any(), name
    assert plain.keys() == decayed.keys()


def test_roles_follow_modules_not_names() -> None:
    """A matrix whose name says embedding, and an embedding whose name does not, are what they are."""
    config = ModelConfig(
        vocab_size=31, d_model=16, n_layers=2, n_heads=2, d_head=8, d_ff=24, layers="G", max_length=32
    )  # fmt: skip
    trunk = Transformer(config)
    trunk.blocks[0].attention.embed_query = trunk.blocks[0].attention.w_q  # type: ignore[union-attr]
    del trunk.blocks[0].attention.w_q  # type: ignore[union-attr]
    module = LossModule(trunk, lambda module, batch: Loss(torch.zeros(())), ScalarHead(16))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    roles = parameter_roles(module)
    matrices = {names[id(parameter)] for parameter in roles.block_matrices}
    assert "trunk.blocks.0.attention.embed_query.weight" in matrices
    assert matrices == {name for name in names.values() if is_block_matrix(name)}
    assert [names[id(parameter)] for parameter in roles.head_matrices] == ["head.score.weight"]
    n_roles = len(roles.block_matrices) + len(roles.head_matrices) + len(roles.others)
    assert n_roles == len(names)


def pretraining(recipe: Path, *overrides: str, ranks: int = 1) -> subprocess.Popen[str]:
    """A started pre-training run with Muon."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    muon = ("optimizer={kind: muon, lr: 0.05, adamw_lr: 3e-2}", "engine={precision: bfloat16, zero_stage: 1}")
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "train.pretrain", str(recipe), *muon, *overrides], cwd=ROOT, text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_killed_run_on_two_ranks_ends_with_the_same_bits(pretrain_recipe: Path, tmp_path: Path) -> None:
    steps = ("loop.max_steps=4", "loop.save_every=2", "loop.evaluate_every=4", "ngram_baselines=false")
    whole = pretraining(pretrain_recipe, *steps, f"run_dir={tmp_path / 'whole'}", ranks=2)
    output, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, output
    killed = pretraining(pretrain_recipe, *steps, ranks=2)
    latest, began = tmp_path / "run" / "checkpoints" / "latest", time.monotonic()
    while not latest.exists():
        assert killed.poll() is None and time.monotonic() - began < 150
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    again = pretraining(pretrain_recipe, *steps, ranks=2)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and "resuming from" in output, output
    ours, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_it_learns_what_adamw_learns(pretrain_recipe: Path, tmp_path: Path) -> None:
    """AdamW with the best of three learning rates reaches 1.197 here, from 5.8: words at random allow little less."""
    steps = ("loop.max_steps=200", "loop.evaluate_every=200", "loop.save_every=200", "evaluation_rows=16")
    child = pretraining(pretrain_recipe, *steps)
    output, _ = child.communicate(timeout=280)
    assert child.returncode == 0, output
    figures = json.loads((tmp_path / "run" / "done.json").read_text())["figures"]
    assert figures["heldout_loss"] < min(figures["baselines"].values())
    assert figures["heldout_loss"] < 1.215
