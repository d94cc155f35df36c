"""The models of an evaluation, loaded on demand, with the weights of one model in memory at a time."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from model.config import ModelConfig
from model.scalar_head import ScalarHead
from model.transformer import Transformer
from model.weights import WEIGHTS, load_config, load_model, load_scorer

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Models(Mapping[str, Transformer]):
    """Models by name, from run directories. Loading a model releases the weights of the one before.

    `scorer` is the run directory of the scorer, which is loaded and released like the models. `dtype` None: float32 on
    the CPU, on a GPU the dtype of the stored weights.
    """

    def __init__(self, run_dirs: Mapping[str, str], scorer: str | None = None, dtype: torch.dtype | None = None):
        self._directories = {name: Path(run_dir) / "model" for name, run_dir in run_dirs.items()}
        self._scorer = None if scorer is None else Path(scorer) / "model"
        self._dtype = dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._loaded: tuple[Path, Transformer, ScalarHead | None] | None = None

    def __getitem__(self, name: str) -> Transformer:
        return self._load(self._directories[name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._directories)

    def __len__(self) -> int:
        return len(self._directories)

    def scorer(self) -> tuple[Transformer, ScalarHead]:
        """Trunk and head of the scorer."""
        assert self._scorer is not None
        model, head = self._load(self._scorer, is_scorer=True)
        assert head is not None
        return model, head

    def config(self, name: str) -> ModelConfig:
        """The architecture of a model, without loading it."""
        return load_config(self._directories[name])

    def release(self) -> None:
        """Free the memory of the loaded model, even while a caller still refers to it."""
        if self._loaded is not None:
            for module in self._loaded[1:]:
                if isinstance(module, nn.Module):
                    module.to_empty(device="meta")
            self._loaded = None

    def _load(self, directory: Path, is_scorer: bool = False) -> tuple[Transformer, ScalarHead | None]:
        if self._loaded is None or self._loaded[0] != directory:
            self.release()
            dtype = self._dtype or (torch.float32 if self.device.type == "cpu" else stored_dtype(directory))
            if is_scorer:
                self._loaded = (directory, *load_scorer(directory, self.device, dtype))
            else:
                self._loaded = (directory, load_model(directory, self.device, dtype), None)
        return self._loaded[1:]


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of the weights of a model directory, from the header of their file."""
    with safe_open(directory / WEIGHTS, "pt") as file:
        return _DTYPES[file.get_slice(next(iter(file.keys()))).get_dtype()]
