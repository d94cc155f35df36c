"""What is written of a run is JSON that a strict parser reads, whatever the figures are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from recipes.json_text import NOT_FINITE, as_number, finite_figures, json_text
from recipes.run_directory import finish_run, prepare_run_directory, read_done


def strict(text: str) -> Any:
    """The value of a JSON text; NaN and Infinity, which Python's parser takes, are errors."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


FIGURES = st.dictionaries(
    st.text("abc", min_size=1),
    st.floats() | st.integers() | st.none() | st.text(max_size=3) | st.dictionaries(st.text("xy"), st.floats())
    | st.lists(st.floats(), max_size=3),
    max_size=4,
)  # fmt: skip


@given(FIGURES)
def test_figures_are_json_and_say_what_was_not_finite(figures: dict[str, Any]) -> None:
    written = finite_figures(figures)
    assert strict(json_text(written)) == json.loads(json_text(written))
    scalars = {key: value for key, value in figures.items() if isinstance(value, float)}
    for key, value in scalars.items():
        if math.isfinite(value):
            assert written[key] == value and key not in written.get(NOT_FINITE, {})
        else:
            assert written[key] is None and written[NOT_FINITE][key] == str(value)
        assert as_number(written[key]) == value or not math.isfinite(value)
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"x": math.nan})


def test_the_files_of_a_run_are_strict_json(tmp_path: Path) -> None:
    class Recipe(BaseModel):
        stage: str = "toy"

    with prepare_run_directory(tmp_path / "run", Recipe(), {}):
        figures = {"heldout_loss": math.nan, "baselines": {"unigram": math.inf, "bigram": 2.0}}
        finish_run(tmp_path / "run", Recipe(), {}, "held-out loss nan", 1.0, figures)
    files = list((tmp_path / "run").rglob("*.json"))
    assert len(files) >= 2
    for path in files:
        strict(path.read_text())
    done = read_done(tmp_path / "run")
    assert done is not None
    assert done["figures"]["heldout_loss"] is None and done["figures"]["baselines"] == {"unigram": None, "bigram": 2.0}
    assert done["figures"][NOT_FINITE] == {"heldout_loss": "nan", "baselines.unigram": "inf"}
