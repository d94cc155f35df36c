"""manifest.json of a bundle (hashes of its files, parity, cache cost, engines) and dramatis.json for our own server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bundle_files import FORMAT, MANIFEST, BundleError, described
from model.config import ModelConfig
from model.portability import obstacles
from recipes.files import write_json

SERVING = "dramatis.json"


@dataclass(frozen=True)
class Defaults:
    """Defaults of a bundle's server: the names of user and assistant, and the longest sequence in tokens."""

    user: str
    character: str
    max_length: int


def write_manifest(
    directory: Path,
    names: Iterable[str],
    config: ModelConfig,
    dtype_bytes: int,
    parity: Mapping[str, Any],
    versions: Mapping[str, str],
) -> None:
    """Write manifest.json with hashes of the files `names`. Write it last: a directory without it is not a bundle."""
    reasons = obstacles(config)
    write_json(
        directory / MANIFEST,
        {
            "format": FORMAT,
            "files": {name: described(directory / name) for name in names},
            "n_parameters": config.n_parameters,
            "kv_bytes_per_token": config.kv_bytes_per_token(dtype_bytes),
            "kv_bytes_at_max_length": config.kv_bytes(config.max_length, dtype_bytes),
            "engines": {
                engine: {"runs": reason is None} | ({} if reason is None else {"reason": reason})
                for engine, reason in reasons.items()
            },
            "parity": dict(parity),
            "versions": dict(versions),
        },
    )


def write_defaults(directory: Path, defaults: Defaults) -> None:
    """Write dramatis.json."""
    content = {"user": defaults.user, "character": defaults.character, "max_length": defaults.max_length}
    write_json(directory / SERVING, content)


def read_defaults(directory: str | Path) -> Defaults:
    """dramatis.json of a bundle. Raises BundleError if it is missing or invalid."""
    path = Path(directory) / SERVING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Defaults(str(content["user"]), str(content["character"]), int(content["max_length"]))
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist: {directory} is not a finished bundle") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged: {error}") from None
