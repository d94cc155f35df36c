"""Recipes load strictly, dump to text that loads equal, take overrides, and say everything wrong in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from recipes.loader import RecipeError, Section, dump_recipe, load_recipe, parse_command_line, print_recipe


class Cosine(Section):
    kind: Literal["cosine"]
    peak: PositiveFloat
    floor: float = 0.0


class Constant(Section):
    kind: Literal["constant"]
    rate: PositiveFloat


Schedule = Annotated[Cosine | Constant, Field(discriminator="kind")]


class Loop(Section):
    max_steps: PositiveInt
    keep: PositiveInt = 2
    mode: Literal["offline", "online"] = "offline"

    @model_validator(mode="after")
    def _consistent(self) -> Loop:
        if self.keep > self.max_steps:
            raise ValueError(f"keep={self.keep} is more than max_steps={self.max_steps}")
        return self


class Recipe(Section):
    stage: Literal["pretrain"]
    run_dir: str
    loop: Loop
    schedule: Schedule
    sources: tuple[Schedule, ...] = ()
    languages: tuple[str, ...] = ()
    parts: tuple[Constant, ...] = Field((Constant(kind="constant", rate=1.0),), min_length=1)
    weights: dict[str, float] = Field(default_factory=dict)
    clip: float | Literal["auto"] | None = None
    shuffle: bool = True
    again: Loop | None = None


GOOD = """\
stage: pretrain
run_dir: runs/x
loop:
  max_steps: 20
schedule:
  kind: cosine
  peak: 3e-4
sources:
  - {kind: constant, rate: 1}
languages: [en, no]
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


def problems(path: Path, text: str | bytes | None = None, *overrides: str) -> list[str]:
    """The lines of the one error, with the path of the file as `FILE`."""
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path, overrides)
    return [line.strip() for line in str(caught.value).replace(str(path), "FILE").splitlines()]


def test_a_good_recipe_has_the_types_of_its_schema(recipe_file: Path) -> None:
    recipe = load_recipe(Recipe, recipe_file)
    assert recipe.schedule == Cosine(kind="cosine", peak=3e-4)
    assert recipe.sources == (Constant(kind="constant", rate=1.0),)
    assert recipe.languages == ("en", "no")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.run_dir = "elsewhere"


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
schedules = st.builds(Cosine, kind=st.just("cosine"), peak=positive, floor=numbers) | st.builds(
    Constant, kind=st.just("constant"), rate=positive
)
modes = st.sampled_from(["offline", "online"])
loops = st.builds(Loop, max_steps=st.integers(9, 10**30), keep=st.integers(1, 9), mode=modes)
recipes = st.builds(
    Recipe,
    stage=st.just("pretrain"),
    run_dir=texts,
    loop=loops,
    schedule=schedules,
    sources=st.lists(schedules, max_size=3).map(tuple),
    languages=st.lists(texts, max_size=3).map(tuple),
    weights=st.dictionaries(texts, numbers, max_size=3),
    clip=st.none() | st.just("auto") | numbers,
    shuffle=st.booleans(),
    again=st.none() | loops,
)


@settings(max_examples=50, deadline=None)
@given(recipe=recipes)
def test_a_dumped_recipe_loads_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(Recipe, path) == recipe


def test_every_problem_of_file_and_command_line_is_in_one_message(recipe_file: Path) -> None:
    bad = """\
stage: pretrain
run_dir: 3
loop:
  max_step: 5
  keep: a
  mode: ofline
schedule:
  kind: cosine
  peak: -1
  rate: 3
languages: [en, 3]
sources:
  - kind: constant
  - {kind: cosin, peak: 1}
  - {rate: 3}
  - 7
clip: atuo
shuffle: yes
weights: {plays: x}
max_steps: 3
again: 4
"""
    assert problems(recipe_file, bad, "schedule.flor=1", "loop.keep=2.5") == [
        "FILE has 18 problems:",
        "FILE:2: run_dir: found 3, expected a string",
        "FILE:3: loop.max_steps: missing, expected an integer",
        "FILE:4: loop.max_step: unknown key (found 5); did you mean max_steps?",
        "FILE:6: loop.mode: found \"ofline\", expected 'offline' or 'online'; did you mean offline?",
        "FILE:9: schedule.peak: found -1, expected greater than 0",
        "FILE:10: schedule.rate: unknown key (found 3); known here: kind, peak, floor",
        "FILE:11: languages.1: found 3, expected a string",
        "FILE:13: sources.0.rate: missing, expected a number",
        'FILE:14: sources.1: found kind "cosin", expected cosine or constant; did you mean cosine?',
        "FILE:15: sources.2: no key kind in this section, expected kind: cosine or constant",
        "FILE:16: sources.3: found 7, expected a section with kind: cosine or constant",
        "FILE:17: clip: found \"atuo\", expected a number or 'auto'; did you mean auto?",
        'FILE:18: shuffle: found "yes", expected a boolean; did you mean true?',
        'FILE:19: weights.plays: found "x", expected a number',
        "FILE:20: max_steps: unknown key (found 3); did you mean loop.max_steps?",
        "FILE:21: again: found 4, expected a section with max_steps, keep, mode",
        "command line: loop.keep: found 2.5, expected an integer",
        "command line: schedule.flor: unknown key (found 1); did you mean floor?",
    ]


def test_a_missing_key_that_may_be_null_says_so(tmp_path: Path) -> None:
    class Limits(Section):
        seconds: float | None
        mode: Literal["a", "b"]

    path = tmp_path / "limits.yaml"
    path.write_text("{}")
    with pytest.raises(RecipeError, match="seconds: missing, expected a number or null") as caught:
        load_recipe(Limits, path)
    assert "mode: missing, expected a or b" in str(caught.value)


def test_a_rule_over_several_keys_names_the_section(recipe_file: Path) -> None:
    assert problems(recipe_file, None, "loop.keep=50")[1:] == ["FILE:3: loop: keep=50 is more than max_steps=20"]


def test_a_key_of_another_variant_is_unknown_in_the_chosen_one(recipe_file: Path) -> None:
    found = problems(recipe_file, GOOD.replace("peak: 3e-4", "peak: 3e-4\n  rate: 1"))
    assert found[1:] == ["FILE:8: schedule.rate: unknown key (found 1); known here: kind, peak, floor"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loop.max_steps=7", {"loop": Loop(max_steps=7)}),
        ("schedule={kind: constant, rate: 3e-4}", {"schedule": Constant(kind="constant", rate=3e-4)}),
        ("languages.1=de", {"languages": ("en", "de")}),
        ("sources.0.rate=2", {"sources": (Constant(kind="constant", rate=2.0),)}),
        ("again.max_steps=4", {"again": Loop(max_steps=4)}),
        ("clip=null", {"clip": None}),
        ("run_dir=''", {"run_dir": ""}),
        ("run_dir=a=b", {"run_dir": "a=b"}),
    ],
)
def test_an_override_replaces_one_value(recipe_file: Path, override: str, expected: dict[str, object]) -> None:
    assert load_recipe(Recipe, recipe_file, [override]) == load_recipe(Recipe, recipe_file).model_copy(update=expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lop.max_steps=3", "command line: lop: unknown key"),
        ("loop.max_stesp=3", "command line: loop.max_stesp: unknown key (found 3); did you mean max_steps?"),
        ("loop.max_steps=many", 'command line: loop.max_steps: found "many", expected an integer'),
        ("languages.2=de", "command line: languages.2=de: languages is a list of 2; found 2, expected 0 to 1"),
        ("languages.first=de", "command line: languages.first=de: languages is a list of 2; found first"),
        ("run_dir.x=3", "command line: run_dir.x=3: run_dir is 'runs/x', not a section"),
        ("loop", "command line: loop: expected dotted.key=value"),
        ("loop..keep=1", "command line: loop..keep=1: expected dotted.key=value"),
        ("run_dir=", "command line: run_dir=: no value; write run_dir=null or run_dir=''"),
        ("languages=[en", "command line: languages=[en: not readable as YAML"),
    ],
)
def test_a_bad_override_is_named_as_the_command_line(recipe_file: Path, override: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(recipe_file, None, override))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE: found an empty file, expected a mapping"),
        (b"# nothing\n", "FILE: found an empty file"),
        (b"- 1\n", "FILE: found a list, expected a mapping"),
        (b"stage: a\nrun_dir: \xff\n", "FILE:2: byte 18 is not UTF-8"),
        (b"a: 1\na: 2\n", "FILE:2: a: given twice"),
    ],
)
def test_an_unreadable_file_is_one_clear_error(recipe_file: Path, content: bytes, message: str) -> None:
    (line,) = problems(recipe_file, content)
    assert line.startswith(message)


def test_a_missing_file_and_a_directory_name_the_recipes_nearby(recipe_file: Path) -> None:
    assert problems(recipe_file.with_name("gone.yaml"))[0].endswith(f"no such file; there are {recipe_file}")
    (line,) = problems(recipe_file.parent)
    assert line == "FILE: a directory, expected one recipe file; it holds recipe.yaml"


def test_a_recipe_of_another_stage_names_its_own_command(recipe_file: Path) -> None:
    (line,) = problems(recipe_file, GOOD.replace("stage: pretrain", "stage: sft") + "beta: 3\n")
    assert line.startswith("FILE:1: stage: found sft, expected pretrain; run this recipe with: ")
    assert line.endswith(": python -m train.sft FILE")


def test_the_command_line_takes_recipe_overrides_and_dry_run(recipe_file: Path) -> None:
    command = parse_command_line(Recipe, ["--dry-run", str(recipe_file), "loop.max_steps=3"])
    assert (command.recipe.loop.max_steps, command.recipe_path, command.dry_run) == (3, recipe_file, True)
    assert command.overrides == ("loop.max_steps=3",)


def test_the_command_line_tells_a_bad_recipe_and_exits_2(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(Recipe, [str(recipe_file), "languages=[1]", "loop=[/bold]"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "command line: languages.0: found 1, expected a string" in told
    assert 'loop: found ["/bold"]' in told


def test_print_recipe_shows_every_key(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_recipe(load_recipe(Recipe, recipe_file))
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert "  max_steps: 20" in shown
    assert "clip: null" in shown


def test_a_list_of_items_with_problems_is_not_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD + "parts:\n- {kind: constant, rate: fast}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Recipe, path)
    (problem,) = str(caught.value).splitlines()[1:]
    assert 'parts.0.rate: found "fast", expected a number' in problem
    with pytest.raises(RecipeError, match="parts: found"):
        load_recipe(Recipe, path, ["parts=[]"])
