"""An item's folder is there whole or not at all, whoever else writes it."""

from pathlib import Path

import pytest

from data.pipeline.work_folder import WorkFolder, whole_folder


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    item = work.item("read", 3)
    with whole_folder(item) as folder:
        (folder / "a").write_text("a")
        assert not item.exists()
        assert work.n_done("read") == 0
    assert (item / "a").read_text() == "a"
    assert [path.name for path in item.parent.iterdir()] == [item.name]
    assert work.n_done("read") == 1
    assert work.n_done("pack") == 0


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    item = WorkFolder(tmp_path).item("read", 0)
    with pytest.raises(KeyboardInterrupt), whole_folder(item) as folder:  # noqa: PT012
        (folder / "a").write_text("a")
        raise KeyboardInterrupt
    assert list(item.parent.iterdir()) == []


def test_of_two_writers_the_first_stays(tmp_path: Path) -> None:
    item = WorkFolder(tmp_path).item("read", 0)
    with whole_folder(item) as folder:
        (folder / "a").write_text("slow")
        item.mkdir()
        (item / "a").write_text("fast")
    assert (item / "a").read_text() == "fast"
    assert [path.name for path in item.parent.iterdir()] == [item.name]


def test_leftovers_and_the_whole_are_removed(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    with whole_folder(work.item("read", 0)):
        pass
    (work.path / "read" / ".000001.host.7").mkdir()
    work.remove_leftovers()
    assert [path.name for path in (work.path / "read").iterdir()] == ["000000"]
    work.remove()
    work.remove()
    assert list(tmp_path.iterdir()) == []
