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
from model.hugging_face import load_exported_model
from model.transformer import Transformer
from serving_export.export.manifest import Defaults, read_defaults
from serving_export.server.engine import Engine

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PAGE_SIZE = 16


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

    def engine(self, cache_mib: int) -> Engine:
        """An engine with a KV cache of `cache_mib` MiB. Raises BundleError if that is less than a page."""
        weight_VD = self.model.embed_tokens.weight
        page_bytes = PAGE_SIZE * self.model.config.kv_bytes_per_token(weight_VD.element_size())
        n_pages = cache_mib * 2**20 // page_bytes
        if not n_pages:
            raise BundleError(
                f"a cache of {cache_mib} MiB is less than one page of {page_bytes:,} bytes; make it larger"
            )
        return Engine(self.model, n_pages, PAGE_SIZE)


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
    return Bundle(
        str(directory), _model(path, target), DialogueTokenizer.load(path), read_defaults(path), _sampling(path)
    )


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
