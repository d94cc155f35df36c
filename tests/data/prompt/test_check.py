"""What breaks a prefix cache is found with its part, line and value; what does not is left alone."""

import json
from pathlib import Path

import pytest

from data.prompt.__main__ import main
from data.prompt.check import check
from data.prompt.example import called_functions, example_values
from data.prompt.template import DEFAULT_TEMPLATE, PromptTemplate
from data.prompt.values import PromptError

TEMPLATES = Path(__file__).parents[3] / "recipes" / "templates"
REPLY = "- name: reply\n  content: '{{ character }}:'\n"
LOOP = """\
{% for m in messages %}
- name: message
  truncation_priority: 1
  content: |
    {{ m.speaker }}: {{ m.text }}
{% endfor %}
"""
GOOD = "- name: definition\n  content: |\n    {{ character }}: {{ definition }}\n" + LOOP + REPLY


def found(source: str, *varying: str) -> list[tuple[str, str, str]]:
    template = PromptTemplate(source, "t.yml.j2")
    findings = check(template, example_values(template), varying).findings
    return [(finding.place, finding.part, finding.value) for finding in findings]


BEHIND = "- name: now\n  content: It is {{ now }}, after '{{ messages[-1].text }}'\n"


@pytest.mark.parametrize("source", [GOOD, DEFAULT_TEMPLATE, GOOD.replace("truncation_priority: 1", ""), GOOD + BEHIND])
def test_a_prefix_that_stays_has_no_findings(source: str) -> None:
    assert found(source) == []


@pytest.mark.parametrize("name", ["timestamp", "now", "current_time", "dateToday", "message_count", "session.id"])
def test_clocks_and_counters_before_the_conversation(name: str) -> None:
    source = f"- name: bod\n  content: |\n    It is\n    {{{{ {name} }}}}.\n" + GOOD
    assert found(source) == [("t.yml.j2:4", "part 0 (bod)", name)]


def test_a_value_is_judged_by_its_text_as_well() -> None:
    template = PromptTemplate("- name: bod\n  content: '{{ since }}'\n" + GOOD)
    values = example_values(template) | {"since": "2024-06-24T10:41:00"}
    assert [finding.value for finding in check(template, values).findings] == ["since"]
    assert check(template, values | {"since": "June"}).findings == ()


def test_a_value_that_one_says_varies() -> None:
    source = "- name: mood\n  content: '{{ mood }}'\n" + GOOD
    assert found(source) == []
    assert found(source, "mood") == [("t.yml.j2:2", "part 0 (mood)", "mood")]


@pytest.mark.parametrize(
    ("source", "place", "part"),
    [
        ("- name: n\n  content: '{{ messages | length }} messages'\n" + GOOD, "t.yml.j2:2", "part 0 (n)"),
        ("- name: last\n  content: '{{ messages[-1].text }}'\n" + GOOD, "t.yml.j2:2", "part 0 (last)"),
        (GOOD.replace("in messages", "in messages[-2:]"), "t.yml.j2:8", "part 1 (message)"),
        (GOOD.replace("in messages", "in messages | reverse"), "t.yml.j2:8", "part 1 (message)"),
        (GOOD.replace("{{ m.text }}", "{{ 'new: ' if loop.last }}{{ m.text }}"), "t.yml.j2:4", "part 4 (message)"),
        (GOOD.replace("{{ m.text }}", "{{ loop.revindex }}"), "t.yml.j2:8", "part 1 (message)"),
    ],
)
def test_what_changes_when_a_message_is_appended(source: str, place: str, part: str) -> None:
    assert (place, part) in [(finding[0], finding[1]) for finding in found(source)]


def test_chance_before_the_conversation_but_not_behind_it() -> None:
    chance = "- name: opening\n  content: \"{{ ['a', 'b', 'c'] | random }}\"\n"
    assert found(chance + GOOD) == [("t.yml.j2:2", "part 0 (opening)", "")]
    assert found(GOOD + chance) == []


def test_values_that_must_stay_and_parts_that_are_computed_anew() -> None:
    template = PromptTemplate.load(TEMPLATES / "chat.yml.j2")
    result = check(template, example_values(template))
    assert result.findings == ()
    assert result.constant == ("character.description", "character.name", "user.name", "user.persona")
    assert result.trailing == ("note", "reply")


def test_lines_of_included_files(tmp_path: Path) -> None:
    (tmp_path / "clock.yml.j2").write_text("- name: bod\n  content: |\n    {{ now }}\n")
    (tmp_path / "t.yml.j2").write_text("{% include 'clock.yml.j2' %}\n\n" + GOOD)
    template = PromptTemplate.load(tmp_path / "t.yml.j2")
    (finding,) = check(template, example_values(template)).findings
    assert finding.place == f"{tmp_path / 'clock.yml.j2'}:3"


def test_a_template_without_a_conversation_is_an_error() -> None:
    with pytest.raises(PromptError, match="no conversation grows"):
        found("- name: a\n  content: '{{ x }}'\n")


def test_called_functions_are_named() -> None:
    source = "{% macro own(x) %}{{ x }}{% endmacro %}{{ own(theirs(known(range(3)))) }}"
    template = PromptTemplate(source, functions={"known": len})
    assert called_functions(template) == ["theirs"]


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    path = tmp_path / "clock.yml.j2"
    path.write_text("- name: bod\n  content: '{{ hour_of(now) }}'\n" + GOOD)
    return path


def test_the_command(clock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(clock)]) == 1
    shown = capsys.readouterr().out
    assert f"{clock}:2: part 0 (bod), value now" in shown
    assert "move the part after the messages" in shown
    assert "replaced by their first argument: hour_of" in shown
    assert main(["check", str(TEMPLATES / "group_chat.yml.j2")]) == 0
    assert "characters.*.definition" in capsys.readouterr().out
    values = tmp_path / "values.json"
    messages = [{"speaker": "B", "text": "x"}]
    values.write_text(json.dumps({"now": 1, "character": "A", "definition": "d", "messages": messages}))
    assert main(["check", str(clock), "--values", str(values)]) == 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [(None, "cannot be read"), ("[]", "expected a JSON object"), ("{", "not JSON"), ("{}", "no conversation grows")],
)
def test_user_errors_exit_2(
    clock: Path, tmp_path: Path, values: str | None, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "values.json"
    if values is not None:
        path.write_text(values)
    assert main(["check", str(clock), "--values", str(path)]) == 2
    assert reason in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none.yml.j2")]) == 2
    assert "none.yml.j2" in capsys.readouterr().err
