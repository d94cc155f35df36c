"""Units hold every record once and in order, whatever their size."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.pipeline.unit import Unit, read_units, units_of, write_units
from data.sources.chat_jsonl import ChatJsonlSource
from data.sources.registry import named_sources


@pytest.mark.parametrize("unit_bytes", [1, 900, 5_000, 40_000, 1 << 26])
def test_units_one_after_the_other_are_the_source(
    tmp_path: Path, unit_bytes: int, write_chats: Callable[..., None]
) -> None:
    for name, n in (("a", 30), ("b", 2), ("c", 1), ("d", 70)):
        write_chats(tmp_path / f"{name}.jsonl", n)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    sources = named_sources([ChatJsonlSource(kind="chat_jsonl", path=str(tmp_path))] * 2)
    units = units_of(sources, unit_bytes)
    write_units(tmp_path / "units.json", units)
    assert read_units(tmp_path / "units.json") == units
    for name, source in sources.items():
        found = [record for unit in units if unit.source == name for record in unit.read(source)]
        assert found == list(source.read())
    sizes = {str(path): path.stat().st_size for path in tmp_path.glob("*.jsonl")}
    together = [unit for unit in units if len(unit.files) > 1]
    assert all(unit.n_parts == 1 and sum(sizes[file] for file in unit.files) <= unit_bytes for unit in together)
    assert all(sizes[unit.files[0]] / unit.n_parts <= max(unit_bytes, 1) for unit in units if unit.n_parts > 1)


def test_small_files_share_a_unit(tmp_path: Path, write_chats: Callable[..., None]) -> None:
    for name in "abc":
        write_chats(tmp_path / f"{name}.jsonl", 3)
    sources = named_sources([ChatJsonlSource(kind="chat_jsonl", path=str(tmp_path))])
    (unit,) = units_of(sources, 1 << 20)
    assert unit == Unit("chat_jsonl", tuple(str(tmp_path / f"{name}.jsonl") for name in "abc"))
