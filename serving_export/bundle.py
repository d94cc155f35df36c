"""Load an exported bundle: transformer, tokenizer, and the defaults of its server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.format.tokenizer import DialogueTokenizer
from model.bundle_files import BundleError, verify
from model.config import ModelConfig
from model.hugging_face import load_exported_model
from model.inference.runner import Path as DecodingPath
from model.inference.runner import working_bytes
from model.transformer import Transformer
from serving_export.export.manifest import Defaults, read_defaults
from serving_export.server.engine import Engine

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PAGE_SIZE, MAX_RUNNING = 16, 64


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling of requests that do not set it."""

    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in memory. `name` is the model name of requests."""

    name: str
    model: Transformer
    tokenizer: DialogueTokenizer
    defaults: Defaults
    sampling: SamplingDefaults

    def engine(self, cache_mib: int, path: DecodingPath = "auto", deterministic: bool = False) -> Engine:
        """An engine with a KV cache of `cache_mib` MiB; path and deterministic: see `open_runner`.

        Raises BundleError for a cache of less than a page or more than fits, RunnerError for a path that cannot be had.
        """
        weight_VD = self.model.embed_tokens.weight
        page_bytes = PAGE_SIZE * self.model.config.kv_bytes_per_token(weight_VD.element_size())
        n_pages = cache_mib * 2**20 // page_bytes
        if not n_pages:
            raise BundleError(
                f"a cache of {cache_mib} MiB is less than one page of {page_bytes:,} bytes; make it larger"
            )
        if weight_VD.device.type == "cuda":
            _check_cache_fits(self.model.config, n_pages * page_bytes, weight_VD.device)
        return Engine(self.model, n_pages, PAGE_SIZE, MAX_RUNNING, path=path, deterministic=deterministic)


def open_bundle(directory: str | Path, device: str = "auto") -> Bundle:
    """Load a bundle after checking every file against its manifest; float32 on the CPU, else the stored dtype.

    Raises BundleError for a bundle that is missing, unfinished or changed, TokenizerError or NotPortableError for one
    that this project did not write.
    """
    path = Path(directory)
    if not path.is_dir():
        raise BundleError(f"{path} does not exist; export a model there first: python -m serving_export.export")
    verify(path)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if target.type == "cuda":
        _check_weights_fit(path, target)
    return Bundle(
        str(directory), _model(path, target), DialogueTokenizer.load(path), read_defaults(path), _sampling(path)
    )


def _check_weights_fit(path: Path, device: torch.device) -> None:
    """Raise BundleError if the weights need more than is free on a GPU."""
    n_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    free, total = torch.cuda.mem_get_info(device)
    if n_bytes > free:
        raise BundleError(
            f"the weights in {path} are {_gib(n_bytes)}, and {_gib(free)} of {_gib(total)} are free on {device}: "
            "free some, or use a larger GPU or --device cpu"
        )


def _check_cache_fits(config: ModelConfig, cache_bytes: int, device: torch.device) -> None:
    """Raise BundleError if a cache leaves no room on a GPU for the steps; the message names the largest that would."""
    free, total = torch.cuda.mem_get_info(device)
    needed = working_bytes(config, MAX_RUNNING, config.max_length)
    if cache_bytes + needed > free:
        largest = max(free - needed, 0) // 2**20
        advice = f"the largest cache that fits is --cache-mib {largest}" if largest else "no cache fits"
        raise BundleError(
            f"a cache of {_gib(cache_bytes)} does not fit on {device}: {_gib(free)} of {_gib(total)} are free beside "
            f"the weights, and steps need {_gib(needed)}; {advice}"
        )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _model(path: Path, device: torch.device) -> Transformer:
    stored = str(_json(path / CONFIG).get("dtype", "float32"))
    return load_exported_model(path, device, torch.float32 if device.type == "cpu" else getattr(torch, stored))


def _sampling(path: Path) -> SamplingDefaults:
    content = _json(path / GENERATION_CONFIG) if (path / GENERATION_CONFIG).is_file() else {}
    if content.get("do_sample") is False:
        return SamplingDefaults(0.0, 0, 1.0)
    return SamplingDefaults(content.get("temperature", 1.0), content.get("top_k", 0), content.get("top_p", 1.0))


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise BundleError(f"{path} holds {type(content).__name__}, expected an object")
    return content
