"""DeepSpeed's internals that train/deepspeed patches or relies on are still what was read when that code was written.

Read from DeepSpeed's source, which is not imported. What the patches compute is tested in test_engine.py,
test_universal.py and tests/train/test_gradients.py.
"""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from train.deepspeed.snapshot import Snapshot


class Internal(NamedTuple):
    """A function of DeepSpeed's, the SHA-256 of its source, our code that relies on it, and what it must contain."""

    file: str
    name: str
    sha256: str
    used_by: str
    contains: tuple[str, ...]


BF16, ZERO_1_2, ZERO_3 = "runtime/bf16_optimizer.py", "runtime/zero/stage_1_and_2.py", "runtime/zero/stage3.py"
ENGINE = "runtime/engine.py"
NORM = "engine.py, _norm_check: the norm is checked before weights, state or gradients change"
SUMS = "engine.py, _add_gradient, _offer_gradient_sums and _mark_gradient_sums"
SAVING = "engine.py, TrainingEngine.snapshot, and snapshot.py"
UNIVERSAL = "engine.py, TrainingEngine.load and _repair_universal_load"
INTERNALS = [
    Internal(
        BF16, "BF16_Optimizer.step", "4b7fa5d63f969a77", NORM,
        ("is_invalid_grad_norm(all_groups_norm)",),
    ),
    Internal(
        ZERO_1_2, "DeepSpeedZeroOptimizer.step", "050c36d7948f2613", NORM,
        ("is_invalid_grad_norm(scaled_global_grad_norm)",),
    ),
    Internal(
        ZERO_1_2, "DeepSpeedZeroOptimizer.unscale_and_clip_grads", "eb8167e72e37f207", NORM,
        ("is_invalid_grad_norm(clip_norm)",),
    ),
    Internal(
        ZERO_3, "DeepSpeedZeroOptimizer_Stage3.step", "dfc83b7912f0cd7e", NORM,
        ("is_invalid_grad_norm(scaled_global_grad_norm)",),
    ),
    Internal(
        BF16, "BF16_Optimizer._update_hp_grad", "566e65cd340129ec", SUMS,
        (
            "lp, group_idx, param_idx, clear_lp_grads",
            "lp._hp_grad = ",
        ),
    ),
    Internal(
        BF16, "BF16_Optimizer.update_hp_grads", "d0e017f723eb9894", SUMS,
        ("self._update_hp_grad(lp, i, j, clear_lp_grads)",),
    ),
    Internal(
        BF16, "BF16_Optimizer.accumulate_hp_grads_and_remove_lp", "183c44dc83b7e91a", SUMS,
        ("self._update_hp_grad(lp_param,",),
    ),
    Internal(
        BF16, "BF16_Optimizer._setup_for_real_optimizer", "4ad8763ac34c6a87", SUMS,
        (
            "self.bf16_groups.append",
            "self.fp32_groups_gradients.append",
            "self.fp32_groups_has_gradients.append",
        ),
    ),
    Internal(
        BF16, "BF16_Optimizer.get_grads_for_norm", "a77d2b6e2cd0d3d7", SUMS,
        (
            "if not self.fp32_groups_has_gradients[i][j]",
            "self.fp32_groups_gradients[i][j]",
        ),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine.save_checkpoint", "ee6a6b21ab04e7c7", SAVING,
        ("self._save_zero_checkpoint(save_dir, tag)",),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine._save_checkpoint", "6aa14162ffffa8f1", SAVING,
        ("checkpoint_engine.save(state_dict=state, path=",),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine._create_checkpoint_file", "79ce60e9374171aa", SAVING,
        ("checkpoint_engine.makedirs",),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine._save_zero_checkpoint", "06dbb348f0e97faa", SAVING,
        ("self._copy_recovery_script(save_path)",),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine._copy_recovery_script", "b9bd261b2de226cb", SAVING,
        ("zero_to_fp32.py",),
    ),
    Internal(
        ENGINE, "DeepSpeedEngine.load_universal_checkpoint", "99acfb19e410d1c3", UNIVERSAL,
        ("self._config.load_universal_checkpoint",),
    ),
    Internal(
        ZERO_3, "DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3",
        "ad44f116e504959a", UNIVERSAL,
        (
            '["param_groups"][0]',
            "['step'] = state_step",
        ),
    ),
    Internal(
        "runtime/zero/parameter_offload.py", "DeepSpeedZeRoOffload.partition_all_parameters",
        "5113f0557ac25d21", "engine.py, TrainingEngine.weights",
        ("release_and_reset_all",),
    ),
    Internal(
        "comm/torch.py", "build_shm_op", "5ee7daeb8dd5b011", "world.py, join_world",
        ("__compatible_ops__.get(builder.NAME",),
    ),
]  # fmt: skip


@cache
def parsed(file: str) -> tuple[list[str], dict[str, ast.FunctionDef]]:
    """Lines of one of DeepSpeed's files, and its functions and methods by qualified name."""
    spec = find_spec("deepspeed")
    assert spec is not None and spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / file).read_text()
    found = {}
    for node in ast.parse(text).body:
        members = [node] if isinstance(node, ast.FunctionDef) else getattr(node, "body", [])
        for member in members:
            if isinstance(member, ast.FunctionDef):
                name = member.name if member is node else f"{getattr(node, 'name', '')}.{member.name}"
                found[name] = member
    return text.splitlines(keepends=True), found


def source_of(file: str, name: str) -> str | None:
    """Source of a function from `def` on; ast.get_source_segment would split the whole file again for each."""
    lines, found = parsed(file)
    if name not in found:
        return None
    node = found[name]
    return "".join(lines[node.lineno - 1 : node.end_lineno])[node.col_offset :].rstrip("\n")


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.name)
def test_an_internal_is_what_was_read(internal: Internal) -> None:
    where = f"deepspeed/{internal.file}: {internal.name}"
    source = source_of(internal.file, internal.name)
    assert source is not None, f"{where} is gone; train/deepspeed/{internal.used_by} needs it"
    for text in internal.contains:
        assert text in source, f"{where} no longer has {text!r}; train/deepspeed/{internal.used_by} needs it"
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == internal.sha256, (
        f"{where} has changed: compare it with train/deepspeed/{internal.used_by}, then update its hash here"
    )


def test_a_snapshot_has_every_method_that_deepspeed_calls_while_saving() -> None:
    saving = [internal for internal in INTERNALS if internal.used_by == SAVING]
    calls = {
        method
        for internal in saving
        for method in re.findall(r"self\.checkpoint_engine\.(\w+)\(", source_of(internal.file, internal.name) or "")
    }
    assert {"save", "makedirs", "create", "commit", "is_decoupled"} <= calls
    assert not [method for method in sorted(calls) if not hasattr(Snapshot, method)]


def test_a_weights_gradient_sum_is_where_deepspeeds_accessors_look() -> None:
    source = source_of("utils/tensor_fragment.py", "safe_get_full_grad")
    assert source is not None
    assert "getattr(param, '_hp_grad', None)" in source, (
        "deepspeed: param._hp_grad; see engine.py, _offer_gradient_sums"
    )
