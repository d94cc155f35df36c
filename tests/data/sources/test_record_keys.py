"""The README shows the names under which keys are read."""

import re
from pathlib import Path

from data.sources.record_keys import MESSAGE_ALIASES, RECORD_ALIASES, TRAINED_FLAGS


def test_the_readme_shows_the_names_of_all_keys() -> None:
    readme = Path("README.md").read_text(encoding="utf-8")
    table = readme.split("| key | also named |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [[re.findall(r"`(\w+)`", cell) for cell in row.strip("|").split("|")] for row in table.splitlines()]
    shown = {key: tuple(others) for (key, *_), others in rows}
    trained, *others = TRAINED_FLAGS
    assert shown == {**RECORD_ALIASES, **MESSAGE_ALIASES, trained: (*others, "masked")}
