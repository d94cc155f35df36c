"""The names of a recipe's sources, and that every module of data/sources/ with a source is registered."""

import importlib
import inspect
from pathlib import Path
from typing import Any, get_args

import data.sources
from data.sources.registry import SOURCES, named_sources
from data.sources.source import DialogueSource


def test_names_are_kinds_and_numbered_where_a_kind_repeats() -> None:
    given = [
        SOURCES[kind].model_validate({"kind": kind, "path": f"p{number}"})
        for number, kind in enumerate(["casino", "star", "casino", "casino"])
    ]
    named = named_sources(given)
    assert list(named) == ["casino", "star", "casino_2", "casino_3"]
    assert list(named.values()) == given


def test_every_source_is_registered_under_its_kind() -> None:
    for module in Path(data.sources.__file__).parent.glob("*.py"):
        members = vars(importlib.import_module(f"data.sources.{module.stem}")).values()
        for source in members:
            if inspect.isclass(source) and issubclass(source, DialogueSource) and not inspect.isabstract(source):
                (kind,) = get_args(source.model_fields["kind"].annotation)
                assert SOURCES[kind] is source


def test_the_end_of_a_dialogue_is_evidence_only_where_people_talked_as_long_as_they_liked() -> None:
    given: dict[str, dict[str, Any]] = {kind: {"kind": kind, "path": "p"} for kind in SOURCES}
    given["datasets"]["format"] = {"kind": "openai_messages"}
    ends = {kind: SOURCES[kind].model_validate(fields).end_means_partner_left for kind, fields in given.items()}
    assert {kind for kind, is_evidence in ends.items() if is_evidence} == {"chat_jsonl", "chitchat"}
    given["datasets"]["format"] = {"kind": "chat_jsonl"}
    assert SOURCES["datasets"].model_validate(given["datasets"]).end_means_partner_left
    excerpts = given["chat_jsonl"] | {"ends_when_partner_leaves": False}
    assert not SOURCES["chat_jsonl"].model_validate(excerpts).end_means_partner_left
