"""Units: what is read of the sources at a time. They depend only on the sources and `unit_bytes`, not on the number of
tasks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from data.format.dialogue import Dialogue
from data.sources.source import DialogueSource, LeftOut, Rejected
from recipes.files import write_json


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive files of a source, or one of `n_parts` parts of one file."""

    source: str  # its name in the recipe
    files: tuple[str, ...]
    part: int = 0
    n_parts: int = 1

    def read(self, source: DialogueSource) -> Iterator[Dialogue | LeftOut | Rejected]:
        """Its records in order."""
        for file in self.files:
            yield from source.read_file(Path(file), self.part, self.n_parts)


def units_of(sources: Mapping[str, DialogueSource], unit_bytes: int) -> list[Unit]:
    """All records in order: large files that can be split in parts of at most `unit_bytes`, and groups of other files
    up to that size. Raises SourceError if a file is missing."""
    units: list[Unit] = []
    for name, source in sources.items():
        together: list[str] = []
        n_bytes = 0
        for path in source.files():
            n_parts, size = source.n_parts(path, unit_bytes), _size(path, unit_bytes)
            if together and (n_parts > 1 or n_bytes + size > unit_bytes):
                units.append(Unit(name, tuple(together)))
                together, n_bytes = [], 0
            if n_parts > 1:
                units += [Unit(name, (str(path),), part, n_parts) for part in range(n_parts)]
            else:
                together.append(str(path))
                n_bytes += size
        if together:
            units.append(Unit(name, tuple(together)))
    return units


def _size(path: Path, unit_bytes: int) -> int:
    """Bytes of a file; a name that is not a local file counts as a whole unit."""
    return path.stat().st_size if path.is_file() else unit_bytes


def write_units(path: Path, units: Sequence[Unit]) -> None:
    """Write units for the tasks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(unit) for unit in units])


def read_units(path: Path) -> list[Unit]:
    """The inverse of `write_units`."""
    return [Unit(**{**unit, "files": tuple(unit["files"])}) for unit in json.loads(path.read_text(encoding="utf-8"))]
