"""However documents are dealt to ranks and micro-steps, a step takes the gradient of the mean over trained tokens."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

# with an eps this large a first step of AdamW is the gradient itself
GRADIENT = {"kind": "adamw", "lr": 1e6, "eps": 1e6, "weight_decay": 0.0, "gradient_clipping": 1e9}
CLIPPED = {**GRADIENT, "gradient_clipping": 0.25}
# eleven documents of 3 to 23 tokens: no two micro-batches and no two ranks train the same number of them
WHOLE = [[[*range(11)]]]
IN_TURN = [[[7], [0, 1, 2, 3, 4], [5, 6], [8, 9, 10]]]
ON_TWO = [[[0, 1, 2, 3, 4, 5], [6], [7]], [[8], [9], [10]]]
# of fused blocks, whose kernels are interpreted on a CPU: four short documents and two blocks
FEW, FEW_ON_TWO = [[[0, 4, 6, 10]]], [[[0], [4]], [[6], [10]]]
TWO_BLOCKS = {"n_layers": 2, "layers": "SG"}

Run = Callable[[int, dict[str, Any]], list[dict[str, Any]]]


def case(
    micro_batches: Any, optimizer: dict[str, Any] = GRADIENT, stage: int = 1, precision: str = "float32",
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    engine = {"precision": precision, "zero_stage": stage}
    return {"optimizer": optimizer, "engine": engine, "micro_batches": micro_batches, **more}


def gradient(result: dict[str, Any]) -> dict[str, Tensor]:
    before, after = result["masters"]
    return {name: before[name] - after[name] for name in before}


@pytest.fixture(scope="module")
def alone(steps_on_ranks: Run) -> dict[str, Any]:
    """One rank: all documents in one batch, dealt over micro-steps, and with the gradient clipped."""
    cases = {"whole": case(WHOLE), "in_turn": case(IN_TURN), "clipped": case(WHOLE, CLIPPED)}
    cases["few"] = case(FEW, changes=TWO_BLOCKS)
    return steps_on_ranks(1, cases)[0]


@pytest.fixture(scope="module")
def on_two(steps_on_ranks: Run) -> dict[str, Any]:
    """Two ranks, three micro-steps each, at every ZeRO stage."""
    stages = {f"stage_{stage}": case(ON_TWO, stage=stage) for stage in (1, 2, 3)}
    cases = {**stages, "clipped": case(ON_TWO, CLIPPED)}
    if find_spec("triton"):
        fused = {"fused": True, "changes": TWO_BLOCKS}
        cases |= {f"fused_{stage}": case(FEW_ON_TWO, stage=stage, **fused) for stage in (1, 3)}
        cases |= {f"bf16_{stage}": case(FEW_ON_TWO, stage=stage, precision="bfloat16", **fused) for stage in (1, 2, 3)}
    return steps_on_ranks(2, cases)[0]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    ours, theirs = gradient(found), gradient(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert theirs[name].norm() > 0, name
        # a gradient is read off weights that were rounded once more
        rounding = torch.finfo(torch.float32).eps * expected["masters"][0][name].norm()
        assert (ours[name] - theirs[name]).norm() <= 2e-5 * theirs[name].norm() + rounding, name
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_micro_steps_are_one_batch(alone: dict[str, Any]) -> None:
    assert_same(alone["in_turn"], alone["whole"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_are_one_batch(alone: dict[str, Any], on_two: dict[str, Any], stage: int) -> None:
    assert_same(on_two[f"stage_{stage}"], alone["whole"])


@pytest.mark.skipif(not find_spec("triton"), reason="fused blocks need Triton")
@pytest.mark.parametrize("stage", [1, 3])
def test_fused_blocks_are_one_batch_too(alone: dict[str, Any], on_two: dict[str, Any], stage: int) -> None:
    assert_same(on_two[f"fused_{stage}"], alone["few"])


@pytest.mark.skipif(not find_spec("triton"), reason="fused blocks need Triton")
@pytest.mark.parametrize("stage", [2, 3])
def test_sums_inside_the_products_are_those_of_sixteen_bit_gradients(on_two: dict[str, Any], stage: int) -> None:
    """ZeRO-1 adds a fused block's gradients to its float32 sums inside the products, the others after rounding them."""
    ours, theirs = gradient(on_two["bf16_1"]), gradient(on_two[f"bf16_{stage}"])
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 2**-7 * theirs[name].norm(), name


def test_the_whole_gradient_is_clipped(alone: dict[str, Any], on_two: dict[str, Any]) -> None:
    """The norm of all ranks' sum is held against the bound, and reported as it was before."""
    for clipped in (alone["clipped"], on_two["clipped"]):
        assert_same({**clipped, "norms": alone["whole"]["norms"]}, alone["clipped"])
        assert clipped["norms"] == pytest.approx(alone["whole"]["norms"], rel=1e-5)
        norm = torch.stack([g.norm() for g in gradient(clipped).values()]).norm()
        assert float(norm) == pytest.approx(0.25, rel=1e-3)
