"""The model that a stage starts from: a finished run's, or an exported bundle's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.format.tokenizer import MODEL_FILE
from model.attention_ops import Backend
from model.bundle_files import MANIFEST, verify
from model.config import ModelConfig
from model.hugging_face import load_exported_config, load_exported_model
from model.transformer import Transformer
from model.weights import CONFIG, WEIGHTS, load_config, load_model
from recipes.run_inputs import digest_inputs
from train.deepspeed.world import World


class InitialModelError(ValueError):
    """`init_from` holds no model, or one that does not fit the recipe or the data."""


@dataclass(frozen=True)
class InitialModel:
    """Directory of weights, config and tokenizer. A bundle uses Hugging Face's parameter names."""

    directory: Path
    is_bundle: bool

    @property
    def tokenizer(self) -> Path:
        return self.directory / MODEL_FILE

    def config(self) -> ModelConfig:
        """Raises WeightsError or NotPortableError when it cannot be read."""
        return load_exported_config(self.directory) if self.is_bundle else load_config(self.directory)

    def load(self, attention: Backend, device: torch.device, dtype: torch.dtype) -> Transformer:
        """The model in training mode, its weights read directly into `dtype` on `device`."""
        load = load_exported_model if self.is_bundle else load_model
        return load(self.directory, device, dtype, attention).train()

    def check_tokenizer(self, data_directories: Iterable[str]) -> None:
        """Raise InitialModelError unless data and model have the same tokenizer."""
        for data in data_directories:
            if not self.tokenizer.is_file():
                raise InitialModelError(f"{self.tokenizer} does not exist: its model cannot be trained on {data}")
            found = Path(data) / MODEL_FILE
            if found.is_file() and found.read_bytes() != self.tokenizer.read_bytes():
                raise InitialModelError(
                    f"{found} is not the tokenizer of the model ({self.tokenizer}): prepare the data with "
                    f"tokenizer: {{kind: file, path: {self.directory}}}"
                )


def find_initial_model(init_from: str) -> InitialModel | None:
    """The model of a run directory or a bundle; None when there is none (yet). Raises InitialModelError for the model/
    folder of a run."""
    path = Path(init_from)
    if path.name == "model" and (path.parent / "done.json").is_file():
        raise InitialModelError(f"init_from {path}: the folder of a run's model; name the run instead: {path.parent}")
    if (path / "model" / CONFIG).is_file():
        return InitialModel(path / "model", is_bundle=False)
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return InitialModel(path, is_bundle=True)
    return None


def initial_model(init_from: str, world: World) -> InitialModel:
    """`find_initial_model`, checked. Raises InitialModelError when there is none, BundleError for a damaged bundle.

    Rank 0 hashes a bundle's files and the other ranks compare sizes; a run's files were hashed by
    `prepare_run_directory`.
    """
    found = find_initial_model(init_from)
    if found is None:
        what = "holds no model" if Path(init_from).is_dir() else "does not exist"
        raise InitialModelError(
            f"init_from {init_from}: {what}; expected the run_dir of a finished training stage (model/{CONFIG}) or an "
            f"exported bundle ({CONFIG}, {WEIGHTS})"
        )
    if found.is_bundle:
        verify(found.directory, hashes=world.is_main)
    return found


def init_input(init_from: str) -> str:
    """The input that identifies `init_from`: the run directory, or the manifest with a bundle's hashes."""
    found = find_initial_model(init_from)
    return str(found.directory / MANIFEST) if found and found.is_bundle else init_from


def content_key(inputs: Mapping[str, str]) -> str:
    """Hash of the content of finished runs and files, from the runs' done.json: no weights are read.

    Raises InputError where a file's size differs from what its run wrote.
    """
    digests = digest_inputs(inputs)
    return hashlib.sha256("".join(f"{name} {digests[name]['sha256']}\n" for name in inputs).encode()).hexdigest()


def check_same_architecture(written: ModelConfig, found: ModelConfig, init_from: str) -> None:
    """Raise InitialModelError when a recipe's `model` section is not the architecture of the weights."""
    ours, theirs = (_plain(config) for config in (written, found))
    lines = [f"  model.{key}: there {theirs[key]!r}, here {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if lines:
        raise InitialModelError(
            f"init_from {init_from} has another architecture than the recipe's model section:\n"
            + "\n".join(lines)
            + "\nleave the model section out, or correct it"
        )


def _plain(config: ModelConfig) -> dict[str, Any]:
    """The config in one canonical spelling of `layers` and `window`."""
    has_windows = "S" in config.layer_kinds
    layers, window = "".join(config.layer_kinds), config.window if has_windows else None
    return {**config.model_dump(), "layers": layers, "window": window}
