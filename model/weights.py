"""Model directories: model.safetensors and config.json, written atomically, readable without DeepSpeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.attention_ops import Backend
from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from recipes.files import replace_directory

WEIGHTS, CONFIG, SCALAR_HEAD = "model.safetensors", "config.json", "scalar_head.safetensors"


class WeightsError(ValueError):
    """A model directory is missing, incomplete or does not fit its config."""


def save_model(
    directory: str | Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    scalar_head: Mapping[str, Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write a model directory atomically, replacing an older one.

    `state` and `scalar_head` are state dicts; `files` (such as the tokenizer) are copied in under their names.
    """
    directory = Path(directory)
    staging = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_tensors(staging / WEIGHTS, _plain(state))
    if scalar_head is not None:
        write_tensors(staging / SCALAR_HEAD, _plain(scalar_head))
    for name, source in (files or {}).items():
        shutil.copyfile(source, staging / name)
    content = {"format": "dramatis-1", "model": config.model_dump()}
    (staging / CONFIG).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    replace_directory(staging, directory)


def copy_model(source: Path, directory: Path) -> None:
    """Copy a model directory atomically, replacing an older one."""
    staging = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging)
    replace_directory(staging, directory)


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises WeightsError with the path when that fails (full disk)."""
    try:
        save_file(dict(state), path, metadata)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} could not be written: {error}; make room and run the same command again") from error


def load_config(directory: str | Path) -> ModelConfig:
    """The architecture of a model directory."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise WeightsError(f"{path} does not exist: {directory} is not a finished model directory")
    try:
        return ModelConfig.model_validate_json(json.dumps(json.loads(path.read_text())["model"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise WeightsError(f"{path} is not a model config of this project: {error}") from error


def load_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: Backend = "auto",
) -> Transformer:
    """The transformer of a model directory, in evaluation mode."""
    path = Path(directory) / WEIGHTS
    return model_of_state(load_config(directory), read_tensors(path), path, device, dtype, attention)


def model_of_state(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attention: Backend,
) -> Transformer:
    """A transformer with these weights, in evaluation mode. Raises WeightsError naming `path`, their file.

    `tensors` is consumed one (name, tensor) pair at a time, so that host memory holds one unconverted tensor at most.
    """
    with torch.device("meta"):
        model = Transformer(config, attention)
    state = {name: tensor.to(device, dtype) for name, tensor in tensors}
    _check_shapes(path, state, model)
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_scorer(
    directory: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Transformer, ScalarHead]:
    """Trunk (in `dtype`) and float32 scalar head of a reward model."""
    model = load_model(directory, device, dtype)
    head = ScalarHead(model.config.d_model)
    path = Path(directory) / SCALAR_HEAD
    state = dict(read_tensors(path))
    _check_shapes(path, state, head)
    head.load_state_dict(state)
    return model, head.to(device).eval()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, one at a time. Raises WeightsError when it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _check_shapes(path: Path, state: Mapping[str, Tensor], module: nn.Module) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
    if missing or extra:
        raise WeightsError(f"{path} does not fit its config: missing {missing[:5]}, unexpected {extra[:5]}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"{path}: {name} has shape {tuple(state[name].shape)}, the config says {shape}")
