"""The same records as JSON lines and as Parquet, which fills absent keys with null, give equal dialogues."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import Dialogue, continuation_labels, supervision
from data.sources.hub import DatasetsSource
from data.sources.record import LeftOut, Rejected


def optional(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects that have some of the keys, a few of them as null."""
    return st.fixed_dictionaries({}, optional={key: st.none() | value for key, value in values.items()})


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
METADATA = optional(
    rating=st.integers(1, 5),
    engagement_label=st.sampled_from([1, 0, -1]),
    trained=st.booleans(),
    about=optional(device=TEXTS, screen=optional(width=st.integers(1, 9))),
)
OF_OTHERS = optional(rating=st.integers(1, 5), about=optional(device=TEXTS))


def message(speaker: str, role: str, time: int) -> st.SearchStrategy[dict[str, Any]]:
    who = {"chat_jsonl": {"speaker": speaker}, "openai_messages": {"role": role}, "sharegpt": {"from": role}}
    keys = optional(
        metadata=METADATA if role == "assistant" else OF_OTHERS,
        timestamp=st.just(time),
        weight=st.sampled_from([0, 1] if role == "assistant" else [0]),
    )
    return st.tuples(TEXTS, keys).map(
        lambda drawn: {kind: {**name, "content": drawn[0], **drawn[1]} for kind, name in who.items()}  # type: ignore[misc]
    )


def records(kind: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    said = st.tuples(
        *(message(("Tom", "Mia")[i % 2], ("user", "assistant")[i % 2], 1_700_000_000 + i) for i in range(4))
    )
    others = optional(
        metadata=optional(lang=TEXTS, model=optional(name=TEXTS)),
        weight=st.sampled_from([0, 1]),
        system=st.just("A pond.") | st.just(""),
        **({"participants": st.just(["u1", "Mia"]), "character": st.just("Mia")} if kind == "chat_jsonl" else {}),
    )
    record = st.tuples(said, others).map(lambda drawn: {"messages": [one[kind] for one in drawn[0]], **drawn[1]})
    return st.lists(record, min_size=1, max_size=4).map(
        lambda given_records: [{"id": str(number), **record} for number, record in enumerate(given_records)]
    )


def read(path: Path, kind: str) -> list[Dialogue | LeftOut | Rejected]:
    made = DatasetsSource.model_validate({"kind": "datasets", "path": str(path), "format": {"kind": kind}})
    return [
        (record.line, record.reason) if isinstance(record, Rejected) else record  # type: ignore[misc]
        for record in made.read()
    ]


@pytest.mark.parametrize("kind", ["chat_jsonl", "openai_messages", "sharegpt"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_parquet_reads_as_json_lines_do(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("both")
    rows = data.draw(records(kind))
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {key: None for row in rows for key in row}  # a table has the columns of its first row
    try:
        pq.write_table(pa.Table.from_pylist([keys | row for row in rows]), folder / "a.parquet")
    except pa.ArrowNotImplementedError:  # an object without any key
        return
    lines, parquet = read(folder / "a.jsonl", kind), read(folder / "a.parquet", kind)
    assert parquet == lines
    for one, other in zip(parquet, lines, strict=True):
        if isinstance(one, Dialogue) and isinstance(other, Dialogue):
            assert supervision(one) == supervision(other)


def test_a_label_beside_other_metadata_stands(tmp_path: Path) -> None:
    said: list[dict[str, Any]] = [{"speaker": "TomMia"[3 * (i % 2) :][:3], "text": "x"} for i in range(6)]
    metadata = [{"rating": 5}, {"engagement_label": 0}, {"rating": 2}]
    for one, known in zip(said[1::2], metadata, strict=True):
        one["metadata"] = known
    pq.write_table(pa.Table.from_pylist([{"id": "1", "character": "Mia", "messages": said}]), tmp_path / "a.parquet")
    (dialogue,) = read(tmp_path / "a.parquet", "chat_jsonl")
    assert isinstance(dialogue, Dialogue)
    assert continuation_labels(dialogue)[1:4:2] == [1, 0]
    assert [m.metadata for m in dialogue.messages[1::2]] == metadata


def test_maps_are_objects(tmp_path: Path) -> None:
    said = [{"speaker": "Tom", "text": "x"}, {"speaker": "Mia", "text": "y"}]
    table = pa.table({
        "id": ["1"],
        "messages": [said],
        "metadata": pa.array([[("lang", "en"), ("none", None)]], pa.map_(pa.string(), pa.string())),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    (dialogue,) = read(tmp_path / "a.parquet", "chat_jsonl")
    assert isinstance(dialogue, Dialogue) and dialogue.metadata == {"lang": "en"}
