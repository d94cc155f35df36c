"""Run under torchrun: steps of a tiny model on given documents, and what every rank then holds.

    torchrun --standalone --nproc-per-node 2 tests/train/steps_on_ranks.py SPEC.json OUT

SPEC holds cases by name: engine, optimizer, number of steps, per rank its micro-batches as lists of documents, and how
much higher the documents' numbers are in each further step; spoilt: {step: what is added to the loss of each rank},
which changes no gradient; refused: steps that are not accepted;
fused: whether blocks are; changes: of CONFIG; measures_memory: whether bytes are counted.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from model.attention_ops import Documents
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from train.deepspeed.engine import EngineConfig, TrainingEngine, _add_gradient
from train.deepspeed.world import World, join_world
from train.loop import Loss, accumulate
from train.losses import next_token_loss
from train.optim import Optimizer
from train.stage import LossModule

if os.environ.get("TRITON_INTERPRET"):
    from tests.triton_interpreter import patch_once_a_launch

    patch_once_a_launch()

CONFIG = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=2, d_head=16, d_ff=48, layers="SSG", window=4, max_length=64
)

SPOILT = {"by": 0.0}
"""What is added to the loss now."""


def document(number: int) -> Tensor:
    """Made-up tokens, of another length and another number of them trained for every document."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(3, 24, (1,), generator=generator))
    return torch.randint(1, CONFIG.vocab_size, (length,), generator=generator)


def loss(module: LossModule, documents: list[Tensor]) -> Loss:
    """Next tokens inside documents; the head's score of every token, squared, so that it has a gradient too."""
    tokens_T = torch.cat(documents)
    hidden_TD = module.trunk(tokens_T, Documents.from_lengths([len(tokens) for tokens in documents]))
    counted_T = torch.cat([torch.arange(len(tokens)) < len(tokens) - 1 for tokens in documents])
    assert module.head is not None
    scores = module.head(hidden_TD).float().add(1).square().sum()
    return Loss(next_token_loss(module.trunk, hidden_TD, tokens_T.roll(-1), counted_T) + scores + SPOILT["by"])


def count(documents: list[Tensor]) -> int:
    return sum(len(tokens) - 1 for tokens in documents)


def masters(module: nn.Module) -> dict[str, Tensor]:
    """The float32 weights that the optimizer updates, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in module.named_parameters()}


def settings_in_use(engine: TrainingEngine) -> dict[str, Any]:
    """What DeepSpeed itself says it runs with, under the names of its configuration."""
    runtime, wrapper = engine._deepspeed, engine._optimizer
    config = runtime._config
    model_dtype, accumulation_dtype = runtime.get_data_types()
    return {
        "optimizer": type(wrapper).__name__,
        "wrapped": type(wrapper.optimizer).__name__,
        "clip": [runtime.gradient_clipping(), wrapper.clip_grad],
        "dtypes": [str(model_dtype), str(accumulation_dtype), str(runtime.communication_data_type)],
        "gradient_average": runtime.gradient_average,
        "managed_gradient_accumulation": runtime.managed_gradient_accumulation(),
        "prescale_gradients": not runtime.postscale_gradients(),
        "gradient_predivide_factor": runtime.gradient_predivide_factor(),
        "zero_allow_untested_optimizer": config.zero_allow_untested_optimizer,
        "torch_autocast": runtime.torch_autocast_enabled(),
        "fp16": config.float16_config.enabled,
        "main_grads": [hasattr(parameter, "main_grad") for parameter in engine.module.parameters()],
        "adds_to_main_grads": getattr(wrapper, "_update_hp_grad", None) is _add_gradient,
        "bf16": config.bfloat16_config.model_dump(),
        "zero_optimization": config.zero_config.model_dump(mode="json"),
    }


def held_bytes(engine: TrainingEngine) -> int:
    """Bytes of all distinct tensors that the module and DeepSpeed's optimizer object hold."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = [engine._optimizer, *engine.module.parameters()]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | str | bytes):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            todo += [value.grad] if value.is_leaf and value.grad is not None else []
            todo += [part for name, part in vars(value).items() if name in ("ds_tensor", "grad_accum")]
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set | deque):
            todo += value
        elif isinstance(value, torch.optim.Optimizer):
            todo += value.state.values()
        elif type(value).__module__.startswith("deepspeed.runtime") and hasattr(value, "__dict__"):
            todo += vars(value).values()
    return sum(storages.values())


def copied_bytes(engine: TrainingEngine) -> int:
    """Bytes of host memory that a checkpoint's copies take."""
    snapshot = engine.snapshot()
    engine.weights(snapshot)
    n_bytes = sum(tensor.nbytes for tensor in snapshot._lent)
    snapshot.release()
    return n_bytes


def run(case: dict[str, Any], world: World) -> dict[str, Any]:
    """The steps of one case."""
    config = ModelConfig(**{**dict(CONFIG), **case.get("changes", {})})
    module = LossModule(Transformer(config, "sdpa", seed=3), loss, ScalarHead(config.d_model))
    measures_memory = case.get("measures_memory", False)
    for block in module.trunk.blocks:
        block.fused = case.get("fused", False)
    optimizer = TypeAdapter(Optimizer).validate_python(case["optimizer"])
    engine = TrainingEngine(module, EngineConfig(**case["engine"]), optimizer, world)
    held, norms, taken, held_in_memory = [masters(engine.module)], [], [], 0
    for step in range(case.get("steps", 1)):
        SPOILT["by"] = case.get("spoilt", {}).get(str(step), [0.0] * world.size)[world.rank]
        first = step * case.get("documents_apart", 0)
        batches = [[document(first + number) for number in numbers] for numbers in case["micro_batches"][world.rank]]
        (n_counted,) = world.sum([float(sum(map(count, batches)))])
        accumulate(engine, batches, n_counted)
        held_in_memory = held_bytes(engine) if measures_memory else 0
        refuses = {"accepts": lambda norm: False} if step in case.get("refused", []) else {}
        norm, was_taken = engine.step(case.get("lr_multiplier", 1.0), **refuses)
        norms.append(norm)
        taken.append(was_taken)
        held.append(masters(engine.module))
    weights = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
    return {
        "masters": held,
        "weights": weights,
        "norms": norms,
        "taken": taken,
        "settings": settings_in_use(engine),
        "held_bytes": held_in_memory,
        "host_bytes": copied_bytes(engine) if measures_memory else 0,
    }


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    torch.set_num_threads(1)
    world = join_world(timeout_minutes=2)
    torch.save({name: run(case, world) for name, case in cases.items()}, out / f"rank_{world.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
