"""The files of a folder that a source reads, by their suffixes, and the files that it does not read."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.sources.record import SourceError

_PACKED = (".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".zip", ".tar", ".tgz", ".tar.gz")
ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")  # read by the sources of corpora
_N_NAMES = 5  # shown of the files that are not read


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Whether a file's name ends in one of the lowercase suffixes, in any case; .ndjson is another name of .jsonl."""
    return name.lower().replace(".ndjson", ".jsonl").endswith(tuple(suffixes))


def is_hidden(name: str) -> bool:
    """Whether a part of a relative path begins with a dot: a file of the desktop (._a.jsonl), a backup, a cache."""
    return any(part.startswith(".") for part in name.split("/") if part not in (".", ".."))


def find_files(path: str, suffixes: tuple[str, ...] = (".jsonl", ".jsonl.gz"), pattern: str = "*") -> list[Path]:
    """The file `path`, or the files of the directory `path` with these suffixes that are not hidden, sorted by name.
    Raises SourceError if there are none, or if the file is compressed in a way that is not read."""
    found = Path(path)
    if found.is_file():
        refuse_packed(found, suffixes)
        return [found]
    if not found.is_dir():
        beside = sorted(p.name for p in found.parent.iterdir()) if found.parent.is_dir() else []
        close = difflib.get_close_matches(found.name, beside, n=1)
        hint = f"; did you mean {found.parent / close[0]}?" if close else ""
        raise SourceError(f"source path {path}: no such file or directory{hint}")
    files = sorted(
        p for p in found.glob(pattern)
        if has_suffix(p.name, suffixes) and not is_hidden(p.relative_to(found).as_posix()) and p.is_file()
    )  # fmt: skip
    if not files:
        others = unread_files(path, files)
        there = f"; {describe_unread(others)}" if others else ""
        raise SourceError(f"source path {path}: a directory without any {' or '.join(suffixes)} file{there}")
    return files


def unread_files(path: str | None, read: Iterable[Path]) -> list[str]:
    """The files below the directory `path` that are not in `read`, relative to it, hidden ones last; empty if it is no
    directory. Links to folders, which are not followed, and links to nothing are among them."""
    if path is None or not Path(path).is_dir():
        return []
    root, known = Path(path), set(read)
    others = [file for file in root.rglob("*") if file not in known and (file.is_file() or file.is_symlink())]
    names = [file.relative_to(root).as_posix() + _what_link(file) for file in others]
    return sorted(names, key=lambda name: (is_hidden(name), name))


def _what_link(file: Path) -> str:
    if file.is_file():
        return ""
    return " (a link to a folder; give it as a source of its own)" if file.is_dir() else " (a link to a missing file)"


def describe_unread(names: Sequence[str]) -> str:
    """Their number and the first names, and what to do about compressed ones."""
    shown = ", ".join(names[:_N_NAMES]) + (", ..." if len(names) > _N_NAMES else "")
    packed = sorted({suffix for name in names for suffix in [_packed_suffix(name)] if suffix})
    remedy = f"; decompress {' and '.join(packed)} files to have them read" if packed else ""
    return f"{len(names):,} file{'s' * (len(names) != 1)} not read: {shown}{remedy}"


def refuse_packed(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raise SourceError for a compressed file or an archive, unless its name has one of the suffixes."""
    suffix = _packed_suffix(path.name)
    if suffix and not has_suffix(path.name, suffixes):
        raise SourceError(f"{path}: {suffix} files are not read here; decompress it, or compress it with gzip")


def is_packed(name: str) -> bool:
    """Whether no source reads a file of this name, because of its compression."""
    return not has_suffix(name, ARCHIVES) and _packed_suffix(name) != ""


def _packed_suffix(name: str) -> str:
    return next((suffix for suffix in _PACKED if name.lower().endswith(suffix)), "")
