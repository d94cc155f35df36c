"""A file is there whole or not at all, also after a power cut."""

import os
from pathlib import Path

import pytest

from recipes.files import atomic_file, durable_rename, replace_directory, write_json, write_text

Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """(operation, name of the file) of every fsync and rename, in order; of a rename the new name."""
    made: Calls = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def recorded_fsync(descriptor: int) -> None:
        made.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        replace(source, target)

    def recorded_rename(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return made


def test_a_file_is_synced_before_it_gets_its_name_and_its_directory_after(tmp_path: Path, calls: Calls) -> None:
    write_json(tmp_path / "x.json", {})
    assert calls == [("fsync", ".x.json.partial"), ("rename", "x.json"), ("fsync", tmp_path.name)]


def test_a_renamed_file_keeps_its_name_after_a_power_cut(tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    durable_rename(tmp_path / "a", tmp_path / "b")
    assert calls == [("rename", "b"), ("fsync", tmp_path.name)] and (tmp_path / "b").read_text() == "new"


def test_a_directory_is_synced_before_it_replaces_the_old_one(tmp_path: Path, calls: Calls) -> None:
    for name in ("new", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    replace_directory(tmp_path / "new", tmp_path / "model")
    order = [("fsync", "weights"), ("fsync", "new"), ("rename", ".model.old"), ("rename", "model")]
    assert calls == [*order, ("fsync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "new"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    with atomic_file(path, "w") as file:
        file.write("old\n")

    def interrupted() -> None:
        with atomic_file(path, "w") as file:
            file.write("new")
            assert path.read_text() == "old\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old\n"


def test_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"x": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "done.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
