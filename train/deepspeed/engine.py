"""The only module that knows DeepSpeed's keys: every value is written, since its defaults have changed silently."""

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
"""Gradients that ZeRO reduces at a time. train/memory/estimate.py counts these and the following."""
PERSISTENT_ELEMENTS = {"cuda": 100_000, "cpu": 0}
"""ZeRO-3 shards larger tensors; on a CPU all, so that small tests take the paths of large runs."""
PREFETCH_ELEMENTS, MAX_LIVE_PARAMETERS, MAX_REUSE_DISTANCE = 50_000_000, 1_000_000_000, 1_000_000_000
SUB_GROUP_ELEMENTS = 1_000_000_000


class EngineConfig(Section):
    """How a module is trained: precision, sharding, and how long a silent peer is waited for."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[1, 2, 3] = 1
    timeout_minutes: MayChange[PositiveFloat] = 10.0
    """A rank that does not go on for so long while others wait ends the job (train/health/watchdog.py)."""
    blocks: MayChange[Execution] = "auto"
    """auto: fused blocks where their kernels run, which is on a GPU."""
    recompute: MayChange[Recompute] = "none"
    recompute_blocks: MayChange[NonNegativeInt] = 0
    """So many blocks, from the first, keep only their input, whatever `recompute` says of the rest."""

    @property
    def dtype(self) -> torch.dtype:
        """What weights and activations are computed in."""
        return getattr(torch, self.precision)


class CheckpointStateError(ValueError):
    """The optimizer state of a checkpoint does not fit this run."""


def deepspeed_config(settings: EngineConfig, optimizer: AdamW | Muon, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration with every value that matters written out."""
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
        # on by default, and then the host waits for the device before and after every micro-batch
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "dump_state": False,
    }


class TrainingEngine:
    """A module under DeepSpeed: accumulate gradients, step, save and load the optimizer's part of a checkpoint."""

    def __init__(self, module: nn.Module, settings: EngineConfig, optimizer: AdamW | Muon, world: World):
        import deepspeed

        obstacle = optimizer.obstacle(settings.precision, settings.zero_stage) if isinstance(optimizer, Muon) else None
        assert obstacle is None, obstacle
        self.world, self.host_memory = world, HostMemory()
        self.peak_lr, self._zero_stage = optimizer.lr, settings.zero_stage
        module.to(world.device, torch.bfloat16 if settings.precision == "bfloat16" else torch.float32)
        if settings.zero_stage == 3:
            # weights are gathered before a whole block: what is inside it may be compiled
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
        with redirect_stdout(io.StringIO()):  # twenty lines of memory figures
            self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, optimizer),
                config=deepspeed_config(settings, optimizer, world.size),
                dist_init_required=False,
            )
        if hasattr(self._optimizer, "_update_hp_grad"):
            self._optimizer._update_hp_grad = _add_gradient
            _offer_gradient_sums(self._optimizer)
        self.module: nn.Module = self._deepspeed.module
        # kept here, since a loaded checkpoint brings the rates of its own step into the groups
        self._peak_lrs = [group["lr"] for group in self._optimizer.param_groups]

    def forward(self, batch: Any) -> Any:
        """The module's loss on one micro-batch, under DeepSpeed's hooks."""
        return self._deepspeed(batch)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Ranks' gradients are summed (DeepSpeed averages them)."""
        self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_multiplier: float, accepts: Callable[[float], bool] | None = None) -> tuple[float, bool]:
        """Update the weights. Returns the gradient norm before clipping, and whether the step was taken.

        A step with a non-finite gradient is not taken, nor one whose norm `accepts` (asked on every rank) answers with
        False; weights and optimizer state are then as they were.
        """
        for group, peak_lr in zip(self._optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak_lr * lr_multiplier
        if hasattr(self._optimizer, "fp32_groups_has_gradients"):
            _mark_gradient_sums(self._optimizer)
        with _norm_check(self._optimizer, accepts) as norm:
            self._deepspeed.step()
        value = float(self._deepspeed.get_global_grad_norm() or 0.0) if norm.value is None else norm.value
        return value, bool(self._deepspeed.was_step_applied())

    def snapshot(self) -> Snapshot:
        """A copy of this rank's optimizer state and random state, to be written as files (called on every rank)."""
        snapshot = Snapshot(self.host_memory)
        usual, self._deepspeed.checkpoint_engine = self._deepspeed.checkpoint_engine, snapshot
        self._deepspeed._copy_recovery_script = lambda save_path: None  # a script for the weights, which `model/` holds
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
        """Restore what `snapshot` wrote: from `directory`, or, written by another number of ranks, from `universal`.

        In the latter case the saved random states belong to other ranks: each rank is seeded anew, from rank 0's state
        and its own number.
        """
        groups = [{**group, "params": None} for group in self._optimizer.param_groups]
        self._deepspeed._config.load_universal_checkpoint = universal is not None
        loaded, _ = self._deepspeed.load_checkpoint(str(universal or directory), tag=OPTIMIZER_DIRECTORY)
        if loaded is None:
            raise CheckpointStateError(f"{directory / OPTIMIZER_DIRECTORY} holds no optimizer state")
        if universal:
            self._mend_universal_load(groups)
        state = torch.load(directory / f"random_rank_{0 if universal else self.world.rank}.pt", weights_only=True)
        _set_random_state(state, self.world, is_foreign=universal is not None)

    def _mend_universal_load(self, groups: list[dict[str, Any]]) -> None:
        """DeepSpeed 0.19.8, ZeRO-3: all groups get the first one's settings, and all states one step counter tensor."""
        for group, settings in zip(self._optimizer.param_groups, groups, strict=True):
            group.update({**settings, "params": group["params"]})
        for state in self._optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def weights(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """Copies of the module's weights, whole, on rank 0; nothing on the others (called on every rank)."""
        if self._zero_stage < 3:
            state = self.module.state_dict() if self.world.is_main else {}
            return {name: snapshot.tensor(tensor.detach()) for name, tensor in state.items()}
        import deepspeed

        # an evaluation may have left weights on their way, which cannot be gathered again before they arrive
        self._optimizer.parameter_offload.partition_all_parameters()
        weights = {}
        for name, parameter in self.module.named_parameters():  # one at a time: the whole need not fit on a device
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.world.is_main:
                    weights[name] = snapshot.copy(parameter.detach())
        return weights


@dataclass
class _Norm:
    """The gradient's norm before clipping; None when it is not finite."""

    value: float | None = None
    is_accepted: bool = True


@contextmanager
def _norm_check(optimizer: Any, accepts: Callable[[float], bool] | None) -> Iterator[_Norm]:
    """Note the gradient's norm where DeepSpeed looks whether it is finite, and let `accepts` judge it there too.

    BF16_Optimizer and both ZeRO optimizers ask `is_invalid_grad_norm` of the global norm, the same on all ranks, before
    they touch weights or state, and then clear the gradients and return. ZeRO-1/2 asks again when it clips. To read the
    norm afterwards would be to wait until the weights are updated.
    """
    module = sys.modules[type(optimizer).__module__]
    is_invalid, found = module.is_invalid_grad_norm, _Norm()

    def is_refused(norm: Tensor | float) -> bool:
        value = float(norm)
        if is_invalid(value):
            return True
        if found.value is None:
            found.value, found.is_accepted = value, accepts is None or accepts(value)
        return not found.is_accepted

    module.is_invalid_grad_norm = is_refused  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        module.is_invalid_grad_norm = is_invalid  # type: ignore[attr-defined]


def _add_gradient(weight: nn.Parameter, group: int, number: int, clear_lp_grads: bool) -> None:
    """BF16_Optimizer's own, without its float32 copy of every gradient (2% of a step of a billion parameters)."""
    if weight.grad is None:
        return
    weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
    if clear_lp_grads:
        weight.grad.zero_()


def _offer_gradient_sums(optimizer: Any) -> None:
    """Give every weight its float32 gradient sum as `main_grad`, which fused blocks and `_add_gradient` add to."""
    for weights, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
        for weight, total in zip(weights, sums, strict=True):
            weight._hp_grad = total  # where DeepSpeed's own accessors look
            weight.main_grad = total.view(weight.shape)


def _mark_gradient_sums(optimizer: Any) -> None:
    """BF16_Optimizer's own hooks note who has a gradient; here every weight has one."""
    for group, weights in enumerate(optimizer.bf16_groups):
        optimizer.fp32_groups_has_gradients[group] = [True] * len(weights)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor], world: World, is_foreign: bool) -> None:
    if is_foreign:
        seed = hashlib.sha256(bytes(state["cpu"].tolist()) + f"{world.rank} of {world.size}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "little"))
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)
