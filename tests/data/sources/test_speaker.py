"""Who is trained: the assistant under every spelling of its role, never a user or a system, and nobody by accident."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.format.dialogue import Dialogue, DialogueError, Message, supervision
from data.sources.chat_message import openai_message
from data.sources.record import Rejected
from data.sources.registry import SOURCES
from data.sources.speaker import ROLES, RoleNames

KINDS = ("openai_messages", "sharegpt", "chat_jsonl")


def read(kind: str, record: dict[str, Any], path: Path, **settings: Any) -> Dialogue | Rejected:
    path.write_text(json.dumps({"id": "1", **record}))
    (made,) = SOURCES[kind].model_validate({"kind": kind, "path": str(path), **settings}).read()
    assert isinstance(made, Dialogue | Rejected)
    return made


def log(*said: dict[str, str], **record: Any) -> dict[str, Any]:
    return {"messages": [{**one, "content": "abcdef"[i]} for i, one in enumerate(said)], **record}


def trained_texts(made: Dialogue | Rejected) -> list[str]:
    assert isinstance(made, Dialogue), made
    return [m.text for m, is_trained in zip(made.messages, supervision(made)[0], strict=True) if is_trained]


def reason(made: Dialogue | Rejected) -> str:
    assert isinstance(made, Rejected), made
    return made.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["role", "from"])
@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("user", "model"), ("User", "Assistant"), ("USER", "Bot"), ("human", "AI"), ("Human", "GPT"),
        (" user", "assistant "), ("prompter", "assistant"), ("user", "character"), ("user", "char"),
        ("user", "chatbot"),
    ],
)  # fmt: skip
def test_roles_in_every_spelling(tmp_path: Path, kind: str, key: str, user: str, assistant: str) -> None:
    for number in range(4):  # the character must not depend on the id
        record = log({key: "System"}, {key: user}, {key: assistant}, {key: user}, id=str(number))
        made = read(kind, record, tmp_path / "a.jsonl")
        assert trained_texts(made) == ["c"]
        assert isinstance(made, Dialogue)
        assert [m.speaker for m in made.messages] == ["narrator", "User", "Assistant", "User"]


@pytest.mark.parametrize("role", [role for role, meaning in ROLES.items() if meaning != "assistant"])
def test_without_an_assistant_nobody_is_trained(tmp_path: Path, role: str) -> None:
    path = tmp_path / "a.jsonl"
    for number in range(4):
        for said in (
            [{"role": role}] * 2,
            [{"role": role.title(), "name": "Ann"}, {"role": role, "name": "Bob"}],
            [{"role": role, "name": "Ann"}, {"speaker": "Ann"}],
            [{"speaker": role}, {"speaker": role.upper()}],
            [{"speaker": role}, {"speaker": "Tool"}],
        ):
            assert "nobody to train: only the narrator" in reason(read("chat_jsonl", log(*said, id=str(number)), path))
        record = log({"role": role}, {"speaker": "Mia"}, {"role": role}, id=str(number))
        assert trained_texts(read("chat_jsonl", record, path)) == ["b"], "the only speaker without a role"
        record = log({"speaker": role}, {"speaker": "Mia"}, id=str(number))
        assert trained_texts(read("chat_jsonl", record, path)) == ["b"]
    assert "name a character" in reason(read("chat_jsonl", log({"role": role}, {"role": role}), path))


def test_a_speaker_called_like_an_assistant_is_the_character(tmp_path: Path) -> None:
    for number in range(12):
        record = log({"speaker": "Tom"}, {"speaker": "AI"}, id=str(number))
        assert trained_texts(read("chat_jsonl", record, tmp_path / "a.jsonl")) == ["b"]


@pytest.mark.parametrize("character", ["user", "human", "system"])
def test_a_character_called_like_a_role_does_not_make_it_a_name(tmp_path: Path, character: str) -> None:
    record = log({"role": character}, {"speaker": "Bob"}, character=character)
    assert isinstance(read("chat_jsonl", record, tmp_path / "a.jsonl"), Rejected)


def test_an_unknown_role_is_no_speaker_beside_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for other in ("user", "bot", "gpt", "system"):
        why = reason(read("chat_jsonl", log({"role": other}, {"from": "agent"}), path))
        assert why.startswith("message 1: from is 'agent', and other messages have the role ")
        assert "expected one of system, " in why and "give somebody's name as speaker" in why
    assert isinstance(
        read("chat_jsonl", log({"role": "user"}, {"role": "assistant"}, {"role": "narrator"}), path), Dialogue
    )


def test_names_under_the_key_of_roles_are_speakers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for name in ("Mia", "Bot", "AI", "character"):
        for scene in ([], [{"from": "system"}], [{"from": "narrator"}]):
            record = log(*scene, {"from": "Tom"}, {"from": f" {name}"}, {"from": "Ann"}, character=name)
            made = read("chat_jsonl", record, path)
            assert isinstance(made, Dialogue)
            assert [m.speaker for m in made.messages][len(scene) :] == ["Tom", name, "Ann"]
            assert len(trained_texts(made)) == 1
    assert trained_texts(read("chat_jsonl", log({"role": "user"}, {"role": "Mia"}, character="Mia"), path)) == ["b"]


@pytest.mark.parametrize("kind", [*KINDS, "preference_pairs"])
@pytest.mark.parametrize("role", ["user", "System", "human"])
def test_a_role_with_the_name_of_the_character_is_refused(tmp_path: Path, kind: str, role: str) -> None:
    path = tmp_path / "a.jsonl"
    pair = {"character": "Mia", "chosen": "x", "rejected": "y"} if kind == "preference_pairs" else {}
    for last in ({"role": "assistant", "name": "Mia"}, {"role": "assistant", "name": "Bot"}):
        said = log({"role": role, "name": "Mia"}, last, {"role": "user"}, {"role": "assistant", "name": "Mia"}, **pair)
        why = reason(read(kind, said, path))
        assert why.startswith(
            f"message 0: the {ROLES[role.lower()]} has the name of the assistant, 'Mia', and would be"
        )
    if kind in ("chat_jsonl", "preference_pairs"):
        said = log({"role": role, "name": "Mia"}, {"role": "assistant", "name": "Bot"}, character="Mia") | pair
        assert "has the name of the character, 'Mia'" in reason(read(kind, said, path))
        said = log({"role": "user"}, {"speaker": "Bob"}) | pair | {"character": "User"}
        assert "the user has the name of the character, 'User'" in reason(read(kind, said, path))


@pytest.mark.parametrize("kind", [*KINDS, "preference_pairs"])
@pytest.mark.parametrize("name", ["mia", "MIA", "M ia", "Mia\u200b", "Narrator", "NARRATOR"])
def test_names_that_look_alike_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "a.jsonl"
    pair = {"character": "Mia", "chosen": "x", "rejected": "y"} if kind == "preference_pairs" else {}
    said = log({"role": "user", "name": name}, {"role": "assistant", "name": "Mia"}, {"role": "user"}, **pair)
    other = "narrator" if name.lower() == "narrator" else "Mia"
    assert f"speakers {name!r} and {other!r}" in reason(read(kind, said, path))
    own = log({"speaker": name}, {"speaker": "Mia"}, {"speaker": "Tom"}, **{"character": "Mia", **pair})
    if kind in ("chat_jsonl", "preference_pairs"):
        assert "differ only in case, white space or invisible characters" in reason(read(kind, own, path))


@pytest.mark.parametrize("kind", [*KINDS, "preference_pairs"])
def test_white_space_around_names_is_removed(tmp_path: Path, kind: str) -> None:
    pair = {"character": "Mia\n", "chosen": "x", "rejected": "y"} if kind == "preference_pairs" else {}
    roles = [{"role": "user"}, {"role": "assistant"}] * 2
    names = ["Tom ", "Mia", "\tTom", "Mia\n"]
    said = [{**role, "name": name} for role, name in zip(roles, names, strict=True)]
    settings: dict[str, Any] = {}
    if kind == "chat_jsonl":
        said = [{"speaker": name} for name in names]  # the short path of own logs
        settings = {"character": " Mia"}
    made = read(kind, log(*said, **pair), tmp_path / "a.jsonl", **settings)
    assert isinstance(made, Dialogue), made
    assert [m.speaker for m in made.messages][:4] == ["Tom", "Mia"] * 2
    assert trained_texts(made)[:2] == ["b", "d"]
    with pytest.raises(DialogueError, match="speaker 'Mia ' has white space around it"):
        Message("Mia ", "x")


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_is_not_the_narrator(tmp_path: Path, kind: str) -> None:
    made = read(kind, log({"role": "user", "name": "narrator"}, {"role": "assistant"}), tmp_path / "a.jsonl")
    assert reason(made).startswith("message 0: the user has the name 'narrator', whose messages are the scene")
    for names in (RoleNames("Bob", "Mia"), RoleNames("narrator", "Mia")):
        name = {"name": "narrator"} if names.user == "Bob" else {}
        with pytest.raises(DialogueError, match="the user has the name 'narrator'"):
            openai_message({"role": "user", "content": "x", **name}, names)


@pytest.mark.parametrize(("kind", "user"), [("openai_messages", "user"), ("sharegpt", "user"), ("hh_rlhf", "human")])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mia", "'mia' and 'Mia', the character, differ only"),
        ("narrator", "user has the name"),
        ("Tom ", "white space"),
    ],
)
def test_a_recipe_whose_names_are_confused_is_refused(kind: str, user: str, name: str, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        SOURCES[kind].model_validate({"kind": kind, "path": "x", user: name, "assistant": "Mia"})
