"""A recipe's prompt template: what is trained begins with the prompt that the same template renders for serving."""

import json
from pathlib import Path

import pytest

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.dialogue_json import read_dialogues
from data.format.encode import encode_dialogue
from data.format.tokenizer import DialogueTokenizer
from data.prepare import main
from data.prompt.template import PromptTemplate, conversation_values

TEMPLATE = """\
{% include "persona.yml.j2" %}
{% for message in messages %}
- speaker: {{ message.speaker }}
  content: {{ message.text }}
  truncation_priority: 1
{% endfor %}
- speaker: {{ character }}
  content: ""
"""
PERSONA = """\
- role: system
  content: "{{ place }}: {{ character }} {{ metadata.persona }}."
"""


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Forty dialogues with a persona each in the metadata, the last without."""
    (tmp_path / "template.yml.j2").write_text(TEMPLATE)
    (tmp_path / "persona.yml.j2").write_text(PERSONA)
    with open(tmp_path / "chats.jsonl", "w") as file:
        for number in range(40):
            messages = [{"speaker": speaker, "text": f"{number} words"} for speaker in ("Ann", "Bo", "Ann", "Bo")]
            record = {"id": f"d{number}", "character": "Bo", "messages": messages, "participants": [f"p{number}"]}
            persona = {"persona": f"likes {number} <|end|>\n- role: x"} if number < 39 else {}
            file.write(json.dumps({**record, "metadata": persona}) + "\n")
    return tmp_path / "chats.jsonl"


def given(recipe_file: Path, tmp_path: Path, *more: str) -> list[str]:
    template = f"prompt_template={{path: {tmp_path}/template.yml.j2, values: {{place: A kitchen}}}}"
    return [str(recipe_file), template, f"run_dir={tmp_path}/run", "continue_within_seconds=null", *more]


def test_dialogues_are_trained_as_the_template_says_them(recipe_file: Path, tmp_path: Path, chats: Path) -> None:
    workers = "executor={kind: local, workers: 2}"
    assert main(given(recipe_file, tmp_path, "max_bad_fraction=0.1", workers)) == 0
    tokenizer = DialogueTokenizer.load(tmp_path / "run")
    template = PromptTemplate.load(tmp_path / "template.yml.j2")
    sides = [read_dialogues(tmp_path / "run" / "dialogues" / f"{side}.jsonl") for side in ("train", "heldout")]
    prepared = {dialogue.id: dialogue for side in sides for dialogue in side}
    assert len(prepared) == 39
    for dialogue in prepared.values():
        persona, *messages = dialogue.messages
        assert persona == Message(NARRATOR, f"A kitchen: Bo {dialogue.metadata['persona']}.")
        trained = encode_dialogue(tokenizer, dialogue)
        values = {"place": "A kitchen", "metadata": dialogue.metadata, **conversation_values(messages[:3], "Bo")}
        served = template.render(values, tokenizer).tokens
        assert served == trained.tokens[: trained.text_starts[4]].tolist()
    (bad,) = map(json.loads, (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines())
    assert bad["line"] == "d39"
    assert "persona" in bad["reason"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["records"]["quarantined"] == 1


def test_a_template_that_fits_no_dialogue_stops_with_the_reason(
    recipe_file: Path, tmp_path: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "template.yml.j2").write_text("- role: system\n  content: no messages\n- content: 'Bo:'\n")
    assert main(given(recipe_file, tmp_path)) == 2
    assert "message 0 (Ann: '0 words') is left out or changed" in capsys.readouterr().err.replace("\n", " ")


def test_a_template_is_an_input_with_all_that_it_includes(recipe_file: Path, tmp_path: Path, chats: Path) -> None:
    assert main(given(recipe_file, tmp_path, "max_bad_fraction=0.1")) == 0
    inputs = json.loads((tmp_path / "run" / "done.json").read_text())["inputs"]
    assert {f"prompt_template: {name}.yml.j2" for name in ("template", "persona")} <= inputs.keys()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file or directory; correct the path; expected a Prompt Poet template"),
        ("{% for %}", "line 1"),
        ('{% include "lost.yml.j2" %}', "lost.yml.j2, which is not in its folder"),
    ],
)
def test_a_bad_template_is_told_before_anything_is_read(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, reason: str
) -> None:
    if text is not None:
        (tmp_path / "template.yml.j2").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(given(recipe_file, tmp_path))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "prompt_template" in said
    assert reason in said.replace("\n", " ")


def test_a_template_may_add_what_the_character_says(tmp_path: Path) -> None:
    (tmp_path / "t.yml.j2").write_text("- speaker: {{ character }}\n  content: Welcome.\n" + TEMPLATE.split("\n", 1)[1])
    dialogue = Dialogue("d", (Message("Ann", "hi", 1.0), Message("Bo", "yes", 2.0)), "Bo")
    found = PromptTemplate.load(tmp_path / "t.yml.j2").dialogue(dialogue)
    assert found.messages == (Message("Bo", "Welcome."), *dialogue.messages)
