"""Files of an exported bundle, and checking them against manifest.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes.files import file_sha256

MANIFEST = "manifest.json"
FORMAT = "dramatis-bundle-1"


class BundleError(ValueError):
    """A bundle that is missing, unfinished, or changed since it was exported."""


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """manifest.json of a bundle. Raises BundleError when it is missing, damaged, or of another format."""
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
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(held, dict) and held.keys() == {"sha256", "bytes"} for held in files.values()
    ):
        raise BundleError(f"{path} is damaged: files: expected sha256 and bytes for each file; export again")
    return content


def verify(directory: str | Path, hashes: bool = True) -> dict[str, Any]:
    """Check every file of a bundle against its manifest, which is returned. Raises BundleError naming each bad file.

    hashes=False compares sizes only.
    """
    content = read_manifest(directory)
    problems = []
    for name, held in content["files"].items():
        path = Path(directory) / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != held["bytes"]:
            problems.append(f"{path} has {path.stat().st_size:,} bytes, the manifest says {held['bytes']:,}")
        elif hashes and described(path) != held:
            problems.append(f"{path} has changed since it was exported (sha256 differs)")
    if problems:
        raise BundleError("\n".join(problems) + f"\nmove {directory} away and export again")
    return content


def described(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file: sha256 (hex) and bytes."""
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}
