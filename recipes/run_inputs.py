"""Content digests of the inputs of a run: the files and finished runs that its recipe names."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recipes.files import file_sha256

Digests = dict[str, dict[str, str]]
"""{name of the input: {path, sha256}}. Inputs are compared by name and digest only."""

_CACHE = ".digests.json"
_SETTLED_SECONDS = 2.0  # a file written this recently may change again within the same timestamp


class InputError(ValueError):
    """An input that does not exist."""


class DigestCache:
    """SHA-256 of files, cached in a run directory with each file's size, times and inode. A file is hashed again only
    if one of these changes; they include ctime, which a program cannot set back."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / _CACHE
        self._known: dict[str, list[Any]] = {}
        self._is_changed = False
        try:
            held = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = held if isinstance(held, dict) else {}
        except (OSError, ValueError):  # it is only a cache
            pass

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file."""
        key, signature = os.path.abspath(path), _signature(path)
        held = self._known.get(key)
        if isinstance(held, list) and held[:-1] == signature:
            return str(held[-1])
        began = time.time()
        digest = file_sha256(path)
        newest = max(signature[1:3]) / 1e9
        if newest < began - _SETTLED_SECONDS and _signature(path) == signature:
            self._known[key] = [*signature, digest]
            self._is_changed = True
        return digest

    def save(self) -> None:
        """Write new digests, if the run directory exists and is writable."""
        if not self._is_changed or not self._file.parent.is_dir():
            return
        temporary = self._file.with_name(f"{_CACHE}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known), encoding="utf-8")
            temporary.replace(self._file)
        except OSError:
            return
        self._is_changed = False


def _signature(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


def digest_inputs(inputs: Mapping[str, str | Path], run_dir: Path | None = None) -> Digests:
    """Digests of inputs: of a finished run its content (see `content_digest`), of a file its bytes.

    `run_dir`: where digests of files are cached between calls. Raises InputError if an input is missing.
    """
    cache = DigestCache(run_dir) if run_dir is not None else None
    digests: Digests = {}
    for name, given in inputs.items():
        path = Path(given)
        if path.is_dir():
            sha256 = _run_digest(name, path)
        elif path.is_file():
            sha256 = cache.sha256(path) if cache else file_sha256(path)
        else:
            raise InputError(f"input {name}: {path} does not exist; finish the stage that writes it first")
        digests[name] = {"path": str(given), "sha256": sha256}
    if cache:
        cache.save()
    return digests


def _run_digest(name: str, run_dir: Path) -> str:
    file = run_dir / "done.json"
    if not file.is_file():
        raise InputError(
            f"input {name}: {run_dir} holds no finished run (no done.json); finish the stage that writes it first"
        )
    done = _read_done(file)
    if done is None:
        raise InputError(f"input {name}: {file} is damaged; remove it and run the stage that writes it again")
    if damaged := damaged_outputs(run_dir, done):
        raise InputError(f"input {name}: {run_dir} is damaged: {damaged[0]}; run the stage that writes it again")
    stated = done.get("content")
    return stated if isinstance(stated, str) else file_sha256(file)


def _read_done(file: Path) -> dict[str, Any] | None:
    """None for a missing or damaged file."""
    try:
        done = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return done if isinstance(done, dict) else None


def _files_of(run_dir: Path, outputs: Iterable[str]) -> dict[str, Path]:
    """The files of `outputs`, which are files below `run_dir`, or folders that stand for their files."""
    return {
        file.relative_to(run_dir).as_posix(): file
        for name in outputs
        for file in ([run_dir / name] if (run_dir / name).is_file() else (run_dir / name).rglob("*"))
        if file.is_file()
    }


def output_sizes(run_dir: Path, outputs: Iterable[str]) -> dict[str, int]:
    """The size in bytes of each file of `outputs`, for done.json."""
    return {name: file.stat().st_size for name, file in sorted(_files_of(run_dir, outputs).items())}


def damaged_outputs(run_dir: Path, done: Mapping[str, Any]) -> list[str]:
    """One line for every file that is missing or whose size differs from what a finished run (its done.json) wrote."""
    lines = []
    for name, size in done.get("outputs", {}).items():
        file = run_dir / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            is_now = "is missing" if found is None else f"has {found:,} bytes"
            lines.append(f"{file} {is_now}, {size:,} bytes were written")
    return lines


def check_content(inputs: Mapping[str, str | Path]) -> None:
    """Hash what the input runs wrote for later stages. Raises InputError if the content has changed."""
    for name, given in inputs.items():
        path = Path(given)
        done = _read_done(path / "done.json") or {}
        if (read := done.get("content_of")) and content_digest(path, read) != done["content"]:
            raise InputError(
                f"input {name}: {path} is damaged: the bytes of {', '.join(read)} differ from what its run wrote "
                f"(sha256); remove {path / 'done.json'} and run the stage that writes it again"
            )


def content_digest(run_dir: Path, outputs: Iterable[str]) -> str:
    """SHA-256 of the names and bytes of files; `outputs` are files below `run_dir`, or folders that stand for their
    files."""
    files = _files_of(run_dir, outputs)
    lines = [f"{name} {file_sha256(file)}\n" for name, file in sorted(files.items())]
    assert lines, f"{run_dir} holds none of {', '.join(outputs)}"
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def changed_inputs(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every input that changed, was added or was removed."""
    lines = []
    for name in [*stored, *(name for name in now if name not in stored)]:
        before, after = stored.get(name), now.get(name)
        if before is None or after is None:
            was = "not an input of that run" if before is None else "an input of that run, but not of this one"
            lines.append(f"input {name} ({(after or before or {}).get('path')}): {was}")
        elif before.get("sha256") != after.get("sha256"):
            lines.append(f"input {name} ({after.get('path')}): its content differs")
    return lines


def names_below(key: str, location: str | Path, files: Iterable[Path]) -> dict[str, Path]:
    """The files of a recipe's location as inputs, named by the recipe key and by their path below the location, so that
    a moved folder or another spelling of its path gives the same names."""
    root = Path(location)
    if root.is_file() or not root.exists():
        return {f"{key}: {file.name}": file for file in files}
    return {f"{key}: {Path(os.path.relpath(file, root)).as_posix()}": file for file in files}
