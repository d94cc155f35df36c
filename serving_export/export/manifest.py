"""manifest.json of a bundle (hashes of its files, parity, cache cost, engines) and dramatis.json for our own server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic_file import write_json
from model.config import ModelConfig
from model.portability import obstacles

MANIFEST, SERVING = "manifest.json", "dramatis.json"
FORMAT = "dramatis-bundle-1"


class BundleError(ValueError):
    """A bundle that is missing, unfinished or changed since it was exported."""


@dataclass(frozen=True)
class Defaults:
    """What a bundle's server assumes: who the user and the assistant are, and the longest sequence in tokens."""

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
    """Hash the files `names` of `directory` into its manifest.json, which is what makes it a bundle: write it last."""
    reasons = obstacles(config)
    write_json(
        directory / MANIFEST,
        {
            "format": FORMAT,
            "files": {name: {"sha256": digest(directory / name), "bytes": _size(directory / name)} for name in names},
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


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """manifest.json of a bundle. Raises BundleError when there is none, or none of ours."""
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise BundleError(f"{path} does not exist: {directory} is not a finished bundle; run serving_export.export")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is damaged: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise BundleError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    return content


def verify(directory: str | Path) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, which is returned. Raises BundleError naming each bad file."""
    content = read_manifest(directory)
    problems = []
    for name, held in content["files"].items():
        path = Path(directory) / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif _size(path) != held["bytes"]:
            problems.append(f"{path} has {_size(path):,} bytes, the manifest says {held['bytes']:,}")
        elif digest(path) != held["sha256"]:
            problems.append(f"{path} has changed since it was exported (sha256 differs)")
    if problems:
        raise BundleError("\n".join(problems) + f"\nmove {directory} away and export again")
    return content


def write_defaults(directory: Path, defaults: Defaults) -> None:
    """Write dramatis.json."""
    content = {"user": defaults.user, "character": defaults.character, "max_length": defaults.max_length}
    write_json(directory / SERVING, content)


def read_defaults(directory: str | Path) -> Defaults:
    """dramatis.json of a bundle. Raises BundleError when it is missing or holds something else."""
    path = Path(directory) / SERVING
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Defaults(str(content["user"]), str(content["character"]), int(content["max_length"]))
    except FileNotFoundError:
        raise BundleError(f"{path} does not exist: {directory} is not a finished bundle") from None
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged: {error}") from None


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size
