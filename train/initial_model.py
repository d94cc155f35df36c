"""The model that a stage starts from: that of a finished run, or of a bundle that serving_export has written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.format.tokenizer import MODEL_FILE
from model.attention_ops import Backend
from model.bundle_files import MANIFEST, verify
from model.config import ModelConfig
from model.hugging_face import load_exported_config, load_exported_model
from model.transformer import Transformer
from model.weights import CONFIG, WEIGHTS, load_config, load_model


class InitialModelError(ValueError):
    """`init_from` holds no model, or one that does not fit the recipe or the data."""


@dataclass(frozen=True)
class InitialModel:
    """Where weights, architecture and tokenizer are; a bundle has them under Hugging Face's names."""

    directory: Path
    is_bundle: bool

    @property
    def tokenizer(self) -> Path:
        return self.directory / MODEL_FILE

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    def config(self) -> ModelConfig:
        """Raises WeightsError or NotPortableError when it cannot be read."""
        return load_exported_config(self.directory) if self.is_bundle else load_config(self.directory)

    def load(self, attention: Backend) -> Transformer:
        """The model in training mode, with float32 weights."""
        load = load_exported_model if self.is_bundle else load_model
        return load(self.directory, attention=attention).train()

    def check_tokenizer(self, data_directories: Iterable[str]) -> None:
        """Raise InitialModelError unless the data's token ids mean what they mean to the model."""
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
    """The model of a run directory or of a bundle; None when the directory has none (yet)."""
    path = Path(init_from)
    if (path / "model" / CONFIG).is_file():
        return InitialModel(path / "model", is_bundle=False)
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return InitialModel(path, is_bundle=True)
    return None


def initial_model(init_from: str) -> InitialModel:
    """The same, to be loaded. Raises InitialModelError when there is none, BundleError for a bundle's changed file."""
    found = find_initial_model(init_from)
    if found is None:
        what = "holds no model" if Path(init_from).is_dir() else "does not exist"
        raise InitialModelError(
            f"init_from {init_from}: {what}; expected the run_dir of a finished training stage (model/{CONFIG}) or an "
            f"exported bundle ({CONFIG}, {WEIGHTS})"
        )
    if found.is_bundle:
        verify(found.directory)
    return found


def init_input(init_from: str) -> str:
    """What a run that starts from `init_from` is known by: the run, or the manifest that has a bundle's hashes."""
    found = find_initial_model(init_from)
    return str(found.directory / MANIFEST) if found and found.is_bundle else init_from


def check_same_architecture(written: ModelConfig, found: ModelConfig, init_from: str) -> None:
    """Raise InitialModelError when a recipe's `model` section is not the architecture that the weights have."""
    ours, theirs = (_plain(config) for config in (written, found))
    lines = [f"  model.{key}: there {theirs[key]!r}, here {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if lines:
        raise InitialModelError(
            f"init_from {init_from} has another architecture than the recipe's model section:\n"
            + "\n".join(lines)
            + "\nleave the model section out, or correct it"
        )


def _plain(config: ModelConfig) -> dict[str, Any]:
    """Equal for equal architectures, however their layers are written down."""
    has_windows = "S" in config.layer_kinds
    layers, window = "".join(config.layer_kinds), config.window if has_windows else None
    return {**config.model_dump(), "layers": layers, "window": window}
