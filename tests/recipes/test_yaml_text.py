"""YAML 1.2 to plain data: values as the standard says, lines kept, and everything a recipe may not hold refused."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.yaml_text import YamlError, parse_yaml, to_yaml

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20) | st.sampled_from(
    ["no", "null", "~", "", "1e3", "0x1F", "1_000", "2026-11-23", "<<", "a: b", "- a", "#", "*a", "&a", "=", "---"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)


@settings(max_examples=100, deadline=None)
@given(data=st.dictionaries(texts, values, max_size=4))
def test_what_is_written_is_read_equal_and_of_the_same_types(data: dict[str, object]) -> None:
    read = parse_yaml(to_yaml(data), "x").data
    assert repr(read) == repr(data)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.0", 1.0),
        ("010", 10),
        ("0x10", 16),
        ("yes", "yes"),
        ("'3'", "3"),
        ("2026-11-23", "2026-11-23"),
        ("~", None),
        ("true", True),
        ("a b", "a b"),
        ('"\\u2028"', "\u2028"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}\n", "x").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_path_knows_its_line_and_an_absent_one_its_section() -> None:
    document = parse_yaml("a: 1\n\nb:\n  c: 2\n  d:\n  - 3\n  - {e: 4}\n", "f.yaml")
    assert document.data == {"a": 1, "b": {"c": 2, "d": [3, {"e": 4}]}}
    assert document.place(("a",)) == "f.yaml:1"
    assert document.place(("b", "d", 1, "e")) == "f.yaml:7"
    assert document.place(("b", "missing", "deeper")) == "f.yaml:3"
    assert document.place(("missing",)) == "f.yaml:1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3: a: given twice, first at f:1"),
        ("a:\n  b: 1\n  b: 1\n", "f:3: a.b: given twice"),
        ("a:\n\t- 1\n", "f:2: a tab"),
        ("a: &x 1\nb: *x\n", "f:1: a: anchor &x"),
        ("a: *x\n", "f:1: not readable as YAML: found undefined alias"),
        ("a:\n  <<: {b: 1}\n", "f:2: key a.<<: not a string; recipes have no merge keys"),
        ("1: 2\n", "f:1: key 1: not a string; quote it"),
        ("? [1]\n: 2\n", "f:1: key a collection: not a string"),
        ("a: !secret 1\n", "f:1: a: tag !secret"),
        ("a: !!python/object:os.system x\n", "f:1: a: tag"),
        ("a: !!int x\n", "f:1: a: 'x' is not of type int"),
        ("a: .nan\n", "f:1: a: found .nan, expected a finite number"),
        ("a:\n- -.inf\n", "f:2: a.0: found -.inf, expected a finite number"),
        ("a: 1\n---\nb: 1\n", "f:2: a second document"),
        ("a: [1\n", "f:2: not readable as YAML: expected"),
        ("a: 1\n b: 2\n", "f:2: not readable as YAML: mapping values"),
        ("a: 1\nb: \0\n", "f:2: not readable as YAML: unacceptable character"),
        ('a: "\\ud800"\n', "f:1: a: a lone surrogate"),
        ("[" * 1_000, "f:1: nested too deeply"),
    ],
)
def test_what_a_recipe_may_not_hold_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(YamlError) as caught:
        parse_yaml(text, "f")
    assert str(caught.value).startswith(message)


def test_a_bomb_of_aliases_is_refused_without_growing() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    began = time.monotonic()
    with pytest.raises(YamlError, match="anchor &a0"):
        parse_yaml("\n".join(lines), "f")
    assert time.monotonic() - began < 30  # expanded, it has 9 ** 29 items and never ends
