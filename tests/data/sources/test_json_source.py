"""Sources of JSON lines: the parts of a file give what the whole gives, lines of rejections included."""

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.format.dialogue import Dialogue
from data.sources.record import LeftOut, Rejected
from data.sources.registry import SOURCES
from data.sources.source import DialogueSource

GOOD = {
    "chat_jsonl": {"id": "1", "messages": [{"speaker": "Änn", "text": "日本"}, {"speaker": "Bob", "text": "yo"}]},
    "openai_messages": {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yo"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hé"}, {"from": "gpt", "value": "yo"}]},
    "hh_rlhf": {"chosen": "\n\nHuman: hé\n\nAssistant: yo", "rejected": ""},
}


def source(kind: str, path: Path) -> DialogueSource:
    return SOURCES[kind].model_validate({"kind": kind, "path": str(path)})


def in_parts(made: DialogueSource, path: Path, n_parts: int) -> list[Dialogue | LeftOut | Rejected]:
    return [record for part in range(n_parts) for record in made.read_file(path, part, n_parts)]


@given(lines=st.lists(st.sampled_from(["", "good", "bad", "  "]), max_size=9), n_parts=st.integers(1, 20))
@pytest.mark.parametrize("kind", GOOD)
def test_parts_give_what_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, kind: str, lines: list[str], n_parts: int
) -> None:
    path = tmp_path_factory.mktemp("parts") / "f.jsonl"
    good = json.dumps(GOOD[kind], ensure_ascii=False)
    path.write_text("\n".join(good if line == "good" else line for line in lines))
    made = source(kind, path)
    whole = list(made.read())
    assert in_parts(made, path, n_parts) == whole
    bad = [record.line for record in whole if isinstance(record, Rejected)]
    assert bad == [number for number, line in enumerate(lines, start=1) if line == "bad"]
    assert len(whole) - len(bad) == lines.count("good")


@pytest.mark.parametrize("kind", GOOD)
def test_a_file_alone_gives_what_it_gives_among_others(tmp_path: Path, kind: str) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz"):
        content = (json.dumps(GOOD[kind]) + "\nbad\n").encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    folder = source(kind, tmp_path)
    alone = [record for path in folder.files() for record in source(kind, path).read()]
    assert alone == list(folder.read())
    assert [path.name for path in folder.files()] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]


def test_files_of_the_same_name_in_several_folders_give_different_ids(tmp_path: Path) -> None:
    """Such as a folder a month."""
    for folder in (tmp_path, tmp_path / "05", tmp_path / "06"):
        folder.mkdir(exist_ok=True)
        (folder / "a.jsonl").write_text(json.dumps(GOOD["openai_messages"]))
        (folder / "b.json").write_text(json.dumps([GOOD["openai_messages"]]))
        pq.write_table(pa.Table.from_pylist([GOOD["openai_messages"]]), folder / "c.parquet")
    names = [f"{folder}{name}" for folder in ("05/", "06/", "") for name in ("a.jsonl@0", "b.json:1")]
    assert [record.id for record in source("openai_messages", tmp_path).read()] == names
    settings = {"kind": "datasets", "path": str(tmp_path), "format": {"kind": "openai_messages"}}
    rows = [record.id for record in SOURCES["datasets"].model_validate(settings).read()]
    assert [name for name in rows if "parquet" in name] == ["05/c.parquet:1", "06/c.parquet:1", "c.parquet:1"]


def test_compressed_files_lists_and_archives_are_read_by_the_first_part(tmp_path: Path) -> None:
    content = (json.dumps(GOOD["sharegpt"]) + "\n").encode() * 3
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "f.json").write_text(json.dumps([GOOD["sharegpt"]] * 3))
    with tarfile.open(tmp_path / "f.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("logs/f.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    made = source("sharegpt", tmp_path)
    ids = []
    for path in made.files():
        assert made.n_parts(path, 10) == 1
        whole = list(made.read_file(path))
        assert in_parts(made, path, 4) == whole
        ids.append([record.id for record in whole if isinstance(record, Dialogue)])
    step = len(content) // 3
    by_byte = [f"f.jsonl@{step * i}" for i in range(3)]
    assert ids == [["f.json:1", "f.json:2", "f.json:3"], by_byte, [f"logs/{name}" for name in by_byte]]


def test_into_how_many_parts(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"x" * 100)
    made = source("chat_jsonl", path)
    assert [made.n_parts(path, size) for size in (1_000, 100, 99, 30)] == [1, 1, 2, 4]
    path.write_bytes(b"")
    assert made.n_parts(path, 10) == 1
    casino = source("casino", path)
    assert (casino.splittable, casino.n_parts(path, 1)) == (False, 1)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_memory_stays_flat(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"f.jsonl{suffix}"
    record: dict[str, Any] = {"id": "1", "messages": [{"speaker": "A", "text": "long " * 1_000}] * 2}
    content = (json.dumps(record) + "\n").encode() * 4_000  # 40 MB
    path.write_bytes(gzip.compress(content, 1) if suffix else content)
    n_bytes = len(content)
    del content
    tracemalloc.start()
    assert sum(isinstance(read, Dialogue) for read in source("chat_jsonl", path).read()) == 4_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < n_bytes / 20
