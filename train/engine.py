"""The only module that knows DeepSpeed's keys: every value is written, since its defaults have changed silently."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recipes.loader import Section
from train.optim import AdamW, build_optimizer

OPTIMIZER_DIRECTORY = "optimizer"


class EngineConfig(Section):
    """How a module is trained: precision, sharding, and how long a silent peer is waited for."""

    precision: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[1, 2, 3] = 1
    timeout_minutes: int = 10


class CheckpointStateError(ValueError):
    """The optimizer state of a checkpoint does not fit this run."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()


def join_world(timeout_minutes: int) -> World:
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
    comm.init_distributed(backend, verbose=False, timeout=timedelta(minutes=timeout_minutes))
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


def deepspeed_config(settings: EngineConfig, optimizer: AdamW, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration with every value that matters written out."""
    is_bfloat16 = settings.precision == "bfloat16"
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": is_bfloat16, "check_grad_overflow": True, "immediate_grad_update": False},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": settings.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 500_000_000 if torch.cuda.is_available() else 5_000_000,
            "allgather_bucket_size": 500_000_000 if torch.cuda.is_available() else 5_000_000,
            "round_robin_gradients": False,
        },
        "zero_allow_untested_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


class Engine:
    """A module under DeepSpeed: accumulate gradients, step, save and load the optimizer's part of a checkpoint."""

    def __init__(self, module: nn.Module, settings: EngineConfig, optimizer: AdamW, world: World):
        import deepspeed

        self.world = world
        self.peak_lr, self._zero_stage = optimizer.lr, settings.zero_stage
        module.to(world.device, torch.bfloat16 if settings.precision == "bfloat16" else torch.float32)
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, optimizer),
            config=deepspeed_config(settings, optimizer, world.size),
            dist_init_required=False,
        )
        self.module: nn.Module = self._deepspeed.module

    def forward(self, batch: Any) -> Any:
        """The module's loss on one micro-batch, under DeepSpeed's hooks."""
        return self._deepspeed(batch)

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of `loss`. Ranks' gradients are summed (DeepSpeed averages them)."""
        self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_multiplier: float) -> tuple[float, bool]:
        """Update the weights. Returns the gradient norm before clipping, and whether the step was taken.

        A step with a non-finite gradient is not taken and leaves weights and optimizer state as they were.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.peak_lr * lr_multiplier
        self._deepspeed.step()
        norm = float(self._deepspeed.get_global_grad_norm() or 0.0)
        return norm, bool(self._deepspeed.was_step_applied())

    def save(self, directory: Path) -> None:
        """Write this rank's optimizer state and random state below `directory` (called on every rank)."""
        self._deepspeed.save_checkpoint(
            str(directory),
            tag=OPTIMIZER_DIRECTORY,
            client_state={"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}},
            save_latest=False,
        )
        torch.save(_random_state(), directory / f"random_rank_{self.world.rank}.pt")

    def load(self, directory: Path, world_size: int) -> None:
        """Restore what `save` wrote. Raises CheckpointStateError when it was written by another number of ranks."""
        if world_size != self.world.size:
            raise CheckpointStateError(
                f"{directory} was written by {world_size} rank(s) and this run has {self.world.size}; "
                f"start it with --nproc-per-node {world_size}"
            )
        loaded, _ = self._deepspeed.load_checkpoint(str(directory), tag=OPTIMIZER_DIRECTORY)
        if loaded is None:
            raise CheckpointStateError(f"{directory / OPTIMIZER_DIRECTORY} holds no optimizer state")
        state = torch.load(directory / f"random_rank_{self.world.rank}.pt", weights_only=True)
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.world.device)

    def weights(self) -> dict[str, Tensor]:
        """The module's weights, whole and on the CPU (called on every rank)."""
        if self._zero_stage < 3:
            return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            return {name: tensor.detach().cpu().clone() for name, tensor in self.module.named_parameters()}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
