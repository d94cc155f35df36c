"""DeepSpeed's configuration and engine. Every value is set explicitly: defaults changed silently between releases."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from model.execution import Execution, Recompute
from model.transformer import Block
from recipes.loader import Section
from recipes.run_identity import MayChange
from train.deepspeed.host_memory import HostMemory
from train.deepspeed.snapshot import Snapshot
from train.deepspeed.world import World
from train.optim import AdamW, Muon, build_optimizer

OPTIMIZER_DIRECTORY = "optimizer"
BUCKET_ELEMENTS = {"cuda": 500_000_000, "cpu": 5_000_000}
"""Gradient elements that ZeRO reduces at a time. train/memory/estimate.py uses this and the following constants."""
PERSISTENT_ELEMENTS = {"cuda": 100_000, "cpu": 0}
"""ZeRO-3 shards tensors larger than this; on a CPU all of them, so that small tests take the same path."""
PREFETCH_ELEMENTS, MAX_LIVE_PARAMETERS, MAX_REUSE_DISTANCE = 50_000_000, 1_000_000_000, 1_000_000_000
SUB_GROUP_ELEMENTS = 1_000_000_000


class EngineConfig(Section):
    """Precision, sharding, recomputation, and the timeout for a rank that hangs."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[1, 2, 3] = 1
    timeout_minutes: MayChange[PositiveFloat] = 10.0
    """A rank that makes no progress for this long while others wait ends the job (train/health/watchdog.py)."""
    blocks: MayChange[Execution] = "auto"
    """auto: fused blocks on a GPU, plain blocks on a CPU."""
    recompute: MayChange[Recompute] = "none"
    recompute_blocks: MayChange[NonNegativeInt] = 0
    """The first this many blocks keep only their input, whatever `recompute` is."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and activations."""
        return getattr(torch, self.precision)


class CheckpointStateError(ValueError):
    """The optimizer state of a checkpoint does not fit this run."""


def deepspeed_config(settings: EngineConfig, optimizer: AdamW | Muon, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration, with every value that matters set explicitly."""
    is_bfloat16 = settings.precision == "bfloat16"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.gradient_clipping,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "bf16": {
            "enabled": is_bfloat16,
            "check_grad_overflow": True,
            "immediate_grad_update": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": settings.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": BUCKET_ELEMENTS[kind],
            "allgather_bucket_size": BUCKET_ELEMENTS[kind],
            "round_robin_gradients": False,
            "allgather_partitions": True,
            "compute_grad_norm": True,
            "load_from_fp32_weights": True,
            "elastic_checkpoint": False,
            "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
            "stage3_max_reuse_distance": MAX_REUSE_DISTANCE,
            "stage3_prefetch_bucket_size": PREFETCH_ELEMENTS,
            "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS[kind],
            "sub_group_size": SUB_GROUP_ELEMENTS,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        # on by default, and synchronizes with the device around every micro-batch
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "dump_state": False,
    }


class TrainingEngine:
    """A module under DeepSpeed: accumulate gradients, step, save and load optimizer state."""

    def __init__(self, module: nn.Module, settings: EngineConfig, optimizer: AdamW | Muon, world: World):
        import deepspeed
        from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

        obstacle = optimizer.obstacle(settings.precision, settings.zero_stage) if isinstance(optimizer, Muon) else None
        assert obstacle is None, obstacle
        self.world, self.host_memory = world, HostMemory()
        self.peak_lr, self._zero_stage = optimizer.lr, settings.zero_stage
        module.to(world.device, settings.dtype)
        if settings.zero_stage == 3:
            # gather weights per block: what is inside a block may be compiled
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
        with redirect_stdout(io.StringIO()):  # prints twenty lines of memory figures
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, optimizer),
                config=deepspeed_config(settings, optimizer, world.size),
                dist_init_required=False,
            )
        self._sums_gradients = isinstance(self._optimizer, BF16_Optimizer)
        if self._sums_gradients:
            self._optimizer._update_hp_grad = _add_gradient
            _offer_gradient_sums(self._optimizer)
        self.module: nn.Module = self._deepspeed.module
        # loading a checkpoint overwrites the groups' learning rates with those of its step
        self._peak_lrs = [group["lr"] for group in self._optimizer.param_groups]

    def forward(self, batch: Any) -> Any:
        """The module's loss on one micro-batch, under DeepSpeed's hooks."""
        return self._deepspeed(batch)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, summed over ranks (DeepSpeed averages, hence the factor)."""
        self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_multiplier: float, accepts: Callable[[float], bool] | None = None) -> tuple[float, bool]:
        """Update the weights. Returns (gradient norm before clipping, whether the step was taken).

        Skips the step, leaving weights and optimizer state unchanged, when the gradient is non-finite or
        `accepts(norm)` is False. `accepts` is called on every rank and must give the same answer.
        """
        for group, peak_lr in zip(self._optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak_lr * lr_multiplier
        if self._sums_gradients:
            _mark_gradient_sums(self._optimizer)
        with _norm_check(self._optimizer, accepts) as norm:
            self._deepspeed.step()
        value = float(self._deepspeed.get_global_grad_norm() or 0.0) if norm.value is None else norm.value
        return value, bool(self._deepspeed.was_step_applied())

    def snapshot(self) -> Snapshot:
        """Copy this rank's optimizer and RNG state, to be written to files later (called on every rank)."""
        snapshot = Snapshot(self.host_memory)
        usual, self._deepspeed.checkpoint_engine = self._deepspeed.checkpoint_engine, snapshot
        # would copy zero_to_fp32.py, which nobody needs: model/ holds the weights
        self._deepspeed._copy_recovery_script = lambda save_path: None
        self._deepspeed.save_checkpoint(
            ".",
            tag=OPTIMIZER_DIRECTORY,
            client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
            save_latest=False,
        )
        self._deepspeed.checkpoint_engine = usual
        snapshot.save(_random_state(), f"random_rank_{self.world.rank}.pt")
        return snapshot

    def load(self, directory: Path, universal: Path | None = None) -> None:
        """Restore what `snapshot` wrote to `directory`; `universal`: its converted form, for another number of ranks.

        With `universal`, each rank's RNG is seeded from rank 0's saved state and the rank's number.
        """
        groups = [{**group, "params": None} for group in self._optimizer.param_groups]
        self._deepspeed._config.load_universal_checkpoint = universal is not None
        loaded, _ = self._deepspeed.load_checkpoint(str(universal or directory), tag=OPTIMIZER_DIRECTORY)
        if loaded is None:
            raise CheckpointStateError(f"{directory / OPTIMIZER_DIRECTORY} holds no optimizer state")
        if universal:
            self._repair_universal_load(groups)
        state = torch.load(directory / f"random_rank_{0 if universal else self.world.rank}.pt", weights_only=True)
        _set_random_state(state, self.world, is_resharded=universal is not None)

    def _repair_universal_load(self, groups: list[dict[str, Any]]) -> None:
        """Undo a bug of DeepSpeed 0.19.8 under ZeRO-3: every group gets the first group's settings, and all states
        share one step counter tensor."""
        for group, settings in zip(self._optimizer.param_groups, groups, strict=True):
            group.update({**settings, "params": group["params"]})
        for state in self._optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def weights(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Copies of the module's full weights on rank 0; empty on other ranks (called on every rank)."""
        if self._zero_stage < 3:
            state = self.module.state_dict() if self.world.is_main else {}
            return {name: snapshot.tensor(tensor.detach()) for name, tensor in state.items()}
        import deepspeed

        # an evaluation may have left prefetches in flight, and a parameter in flight cannot be gathered
        self._optimizer.parameter_offload.partition_all_parameters()
        weights = {}
        for name, parameter in self.module.named_parameters():  # one at a time: all of them may not fit on the device
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.world.is_main:
                    weights[name] = snapshot.copy(parameter.detach())
        return weights


@dataclass
class _Norm:
    """Gradient norm before clipping (None: non-finite), and whether `accepts` took it."""

    value: float | None = None
    is_accepted: bool = True


@contextmanager
def _norm_check(optimizer: Any, accepts: Callable[[float], bool] | None) -> Iterator[_Norm]:
    """Patch DeepSpeed's check of the gradient norm, to read the norm and skip steps that `accepts` rejects.

    BF16_Optimizer and both ZeRO optimizers call `is_invalid_grad_norm` with the global norm (equal on all ranks) before
    they change weights or state; if it is True, they clear the gradients and return. ZeRO-1/2 calls it again when it
    clips. Reading the norm after `step` instead would wait for the weight update.
    """
    module = sys.modules[type(optimizer).__module__]
    is_invalid, found = module.is_invalid_grad_norm, _Norm()

    def is_rejected(norm: Tensor | float) -> bool:
        value = float(norm)
        if is_invalid(value):
            return True
        if found.value is None:
            found.value, found.is_accepted = value, accepts is None or accepts(value)
        return not found.is_accepted

    module.is_invalid_grad_norm = is_rejected  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        module.is_invalid_grad_norm = is_invalid  # type: ignore[attr-defined]


def _add_gradient(weight: nn.Parameter, group: int, number: int, clear_lp_grads: bool) -> None:
    """Replaces BF16_Optimizer._update_hp_grad, which makes a float32 copy of every gradient (2% of a step at 1B)."""
    if weight.grad is None:
        return
    weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
    if clear_lp_grads:
        weight.grad.zero_()


def _offer_gradient_sums(optimizer: Any) -> None:
    """Set `main_grad` of every weight to its float32 gradient sum, which fused blocks and `_add_gradient` add to."""
    for weights, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for weight, total in zip(weights, sums, strict=True):
            weight._hp_grad = total  # read by DeepSpeed's safe_get_full_grad
            weight.main_grad = total.view(weight.shape)


def _mark_gradient_sums(optimizer: Any) -> None:
    """Mark every weight as having a gradient, which `_update_hp_grad` would have done."""
    for group, weights in enumerate(optimizer.bf16_groups):
        optimizer.fp32_groups_has_gradients[group] = [True] * len(weights)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor], world: World, is_resharded: bool) -> None:
    if is_resharded:
        seed = hashlib.sha256(bytes(state["cpu"].tolist()) + f"{world.rank} of {world.size}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "little"))
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)
