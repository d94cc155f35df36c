"""The names of a recipe's sources, and that every module of data/sources/ with a source is registered."""

import importlib
import inspect
from pathlib import Path
from typing import get_args

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
