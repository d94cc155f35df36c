"""The only module that knows DeepSpeed's keys: every value is written, since its defaults have changed silently."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
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
from train.health.watchdog import Progress
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


class LaunchError(ValueError):
    """The environment does not say which rank this process is."""


class CheckpointStateError(ValueError):
    """The optimizer state of a checkpoint does not fit this run."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    progress: Progress = field(default_factory=Progress, compare=False)
    cpu_group: torch.distributed.ProcessGroup | None = field(default=None, compare=False)
    """The gloo group of all ranks under NCCL: agreeing on host numbers does not wait for the GPU's queue."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self.cpu_group)
        values = total.tolist()
        self.progress.tick()
        return values

    def sum_later(self, values: dict[str, Tensor]) -> Callable[[], dict[str, float]]:
        """The same for scalars on the device, which goes on working meanwhile: what is returned waits for the sums."""
        names = sorted(values)
        totals = torch.stack([values[name].detach().double() for name in names])
        if self.size > 1:
            torch.distributed.all_reduce(totals)
        host, arrived = totals, None
        if totals.device.type == "cuda":
            host = torch.empty_like(totals, device="cpu", pin_memory=True).copy_(totals, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def sums() -> dict[str, float]:
            if arrived:
                arrived.synchronize()
            self.progress.tick()
            return dict(zip(names, host.tolist(), strict=True))

        return sums

    def first_text(self, text: str | None) -> str:
        """The text of the first rank that has one, with its number."""
        if self.size == 1:
            return text or ""
        texts: list[str | None] = [None] * self.size
        torch.distributed.all_gather_object(texts, text, group=self.cpu_group)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(texts) if text), "")

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def check_launch() -> None:
    """Raise LaunchError when the environment does not describe a rank that this machine can run."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names if os.environ.get(name)]
    advice = "start ranks with python -m train.launch (or torchrun), or unset them to train in this process alone"
    if "RANK" not in there:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise LaunchError(f"environment: WORLD_SIZE={os.environ['WORLD_SIZE']} without RANK; {advice}")
        return
    if missing := [name for name in names if name not in there]:
        raise LaunchError(f"environment: RANK is set without {', '.join(missing)}; {advice}")
    numbers = {name: os.environ[name] for name in names if name != "MASTER_ADDR"}
    if wrong := [f"{name}={text}" for name, text in numbers.items() if not text.isdecimal()]:
        raise LaunchError(f"environment: {', '.join(wrong)}: expected whole numbers; {advice}")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise LaunchError(f"environment: RANK={numbers['RANK']} of WORLD_SIZE={numbers['WORLD_SIZE']} ranks; {advice}")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if n_gpus is not None and int(numbers["LOCAL_RANK"]) >= n_gpus:
        raise LaunchError(f"rank {numbers['RANK']} finds no GPU: this machine has {n_gpus}; lower --nproc-per-node")


def join_world(timeout_minutes: float) -> World:
    """Join the process group that torchrun describes; alone when started without it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # used by inference only, and building it costs a minute and a C++ compiler on the first run
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    # longer than the watchdog's, which says more
    timeout = timedelta(minutes=1.25 * timeout_minutes + 0.5)
    comm.init_distributed(backend, verbose=False, timeout=timeout)
    size = int(os.environ["WORLD_SIZE"])
    cpu_group = torch.distributed.new_group(backend="gloo", timeout=timeout) if backend == "nccl" and size > 1 else None
    return World(int(os.environ["RANK"]), size, device, cpu_group=cpu_group)


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


class Engine:
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
