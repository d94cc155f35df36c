"""What a record says beside its texts: which messages are trained, who the character is, what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.format.dialogue import Dialogue, supervision
from data.sources.record import Rejected
from data.sources.record_keys import (
    MESSAGE_ALIASES,
    RECORD_ALIASES,
    REFUSED_IN_MESSAGE,
    REFUSED_IN_RECORD,
    TRAINED_FLAGS,
)
from data.sources.registry import SOURCES

KINDS = ("openai_messages", "sharegpt", "chat_jsonl")


def read(kind: str, record: dict[str, Any], path: Path, **settings: Any) -> Dialogue | Rejected:
    path.write_text(json.dumps({"id": "1", **record}))
    source = SOURCES[kind].model_validate({"kind": kind, "path": str(path), **settings})
    (made,) = source.read()
    assert isinstance(made, Dialogue | Rejected)
    return made


def good(made: Dialogue | Rejected) -> Dialogue:
    assert isinstance(made, Dialogue), made
    return made


def trained(made: Dialogue | Rejected) -> list[bool]:
    return supervision(good(made))[0]


def chat(*messages: dict[str, Any] | str, **record: Any) -> dict[str, Any]:
    """A record of messages; a text alone is by the user and the assistant in turn."""
    roles = ("user", "assistant")
    given_keys = [{"content": one} if isinstance(one, str) else one for one in messages]
    said = [{"role": roles[i % 2], **keys} for i, keys in enumerate(given_keys)]
    return {"messages": said, **record}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", [*TRAINED_FLAGS, "masked"])
def test_flags_keep_a_reply_out_of_the_loss(tmp_path: Path, kind: str, flag: str) -> None:
    off, on = (1, 0) if flag == "masked" else (0, 1)
    path = tmp_path / "a.jsonl"
    for values in ((off, on), (bool(off), bool(on)), (float(off), None)):
        record = chat("a", {"content": "no", flag: values[0]}, "b", {"content": "yes", flag: values[1]})
        assert trained(read(kind, record, path)) == [False, False, False, True]
    whole = chat("a", "b", "c", {"content": "d", flag: on}, **{flag: off})
    assert trained(read(kind, whole, path)) == [False, False, False, True], "the record's flag is its messages' default"
    assert trained(read(kind, chat({"content": "a", flag: off}, "b"), path)) == [False, True]
    bad = read(kind, chat({"content": "a", flag: on}, "b"), path)
    assert isinstance(bad, Rejected)
    assert "message 0: a flag says to train 'User'; only the character 'Assistant' is" in bad.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "no", [0], {"a": 1}])
@pytest.mark.parametrize("whole", [True, False])
def test_a_flag_that_is_no_yes_or_no_is_refused(tmp_path: Path, kind: str, value: object, whole: bool) -> None:
    record = chat("a", "b", weight=value) if whole else chat("a", {"content": "b", "weight": value})
    bad = read(kind, record, tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected)
    assert f"weight is {value!r}: expected 0 or 1, false or true" in bad.reason


@pytest.mark.parametrize("kind", KINDS)
def test_flags_that_contradict_each_other_are_refused(tmp_path: Path, kind: str) -> None:
    inner = {"metadata": {"trained": True}}
    for both in ({"weight": 0, "train": True}, {"weight": 1, "masked": 1}, {"weight": 0, **inner}):
        assert isinstance(read(kind, chat("a", {"content": "b", **both}), tmp_path / "a.jsonl"), Rejected)
    agreeing = {"weight": 0, "train": False, "masked": True, "metadata": {"trained": False}}
    assert trained(read(kind, chat("a", {"content": "b", **agreeing}), tmp_path / "a.jsonl")) == [False, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", [*TRAINED_FLAGS, "masked"])
def test_flags_in_metadata_are_flags(tmp_path: Path, kind: str, flag: str) -> None:
    """Of a message with the keys of our own, with other names, and of the record: honored, and refused where they
    contradict what stands beside them."""
    off, on = (1, 0) if flag == "masked" else (0, 1)
    path = tmp_path / "a.jsonl"

    def made(own: dict[str, Any], **record: Any) -> Dialogue | Rejected:
        names = [{"speaker": "Tom", "role": "user"}, {"speaker": "Mia", "role": "assistant"}]
        said = [{**name, "text": text} for name, text in zip(names * 2, "abcd", strict=False)]
        said[1] |= own
        if kind == "chat_jsonl":
            said = [{key: value for key, value in one.items() if key != "role"} for one in said]
            record["character"] = "Mia"
        return read(kind, {"messages": said, **record}, path)

    assert trained(made({"metadata": {flag: off, "stars": 5}})) == [False, False, False, True]
    assert trained(made({"metadata": {flag: None}})) == [False, True, False, True]
    assert trained(made({}, metadata={flag: off})) == [False] * 4
    assert trained(made({"metadata": {flag: on}}, metadata={flag: off})) == [False, True, False, False]
    assert trained(made({"metadata": {flag: on}}, weight=0)) == [False, True, False, False]
    for bad in (
        made({"metadata": {flag: off}, "weight": 1}),
        made({"metadata": {flag: on}, "weight": 0}),
        made({}, metadata={flag: off}, weight=1),
        made({"metadata": {flag: off, ("weight" if flag == "loss" else "loss"): 1}}),
    ):
        assert isinstance(bad, Rejected) and "contradict each other on what is trained" in bad.reason
        assert "metadata." in bad.reason
    bad = made({"metadata": {flag: 0.5}})
    assert isinstance(bad, Rejected) and f"message 1: metadata.{flag} is 0.5: expected 0 or 1" in bad.reason
    bad = made({"metadata": {"loss_mask": [1, 0]}})
    assert isinstance(bad, Rejected) and "message 1: metadata.loss_mask is not read" in bad.reason
    for value in (60, -1, "heavy", [0], {"kg": 1}) if flag != "trained" else ():
        kept = made({"metadata": {flag: value}}, metadata={flag: value})
        assert trained(kept) == [False, True, False, True]
        assert isinstance(kept, Dialogue) and (kept.messages[1].metadata or {})[flag] == value
        assert kept.metadata.get("metadata", kept.metadata)[flag] == value
    bad = made({"metadata": {flag: "false"}})
    assert isinstance(bad, Rejected) and f"metadata.{flag} is 'false': expected 0 or 1" in bad.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", list(REFUSED_IN_MESSAGE))
def test_keys_that_change_a_message_are_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = read(kind, chat("a", {"content": "b", key: [{"x": 1}]}), path)
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith(f"message 1: {key} is not read: ")
    for nothing in (None, [], "", {}):
        dialogue = good(read(kind, chat("a", {"content": "b", key: nothing}), path))
        assert dialogue.messages[1].metadata is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", list(REFUSED_IN_RECORD))
def test_keys_that_change_a_record_are_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = read(kind, chat("a", "b", **{key: [{"x": 1}]}), path)
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith(f"{key} is not read: ")
    assert good(read(kind, chat("a", "b", **{key: []}), path)).metadata == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engagement_label_of_a_record_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    for value in (0, 1, -1):
        bad = read(kind, chat("a", "b", metadata={"engagement_label": value}), path)
        assert isinstance(bad, Rejected)
        assert bad.reason.startswith("metadata.engagement_label is not read: it labels one reply; put engagement_label")
        assert isinstance(read(kind, chat("a", "b", engagement_label=value), path), Rejected)
    assert isinstance(read(kind, chat("a", "b", metadata={"engagement_label": None}), path), Dialogue)
    inside = good(read(kind, chat("a", {"content": "b", "metadata": {"engagement_label": 0}}), path))
    assert supervision(inside)[1] == [-1, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flag", ["is_trained", "train_on_turn", "learnable", "no_loss", "ignore"])
def test_what_looks_like_a_training_flag_is_refused(tmp_path: Path, kind: str, flag: str) -> None:
    path = tmp_path / "a.jsonl"
    for value in (0, 1, False, True):
        for record, place in (
            (chat("a", {"content": "b", flag: value}), "message 1: "),
            (chat("a", "b", **{flag: value}), ""),
            (chat("a", {"content": "b", "metadata": {flag: value}}), "message 1: metadata."),
            (chat("a", "b", metadata={flag: value}), "metadata."),
        ):
            bad = read(kind, record, path)
            assert isinstance(bad, Rejected)
            assert bad.reason.startswith(f"{place}{flag} is not read: it looks like a training flag; write trained")
        own = {"speaker": "Mia", "text": "b", "metadata": {flag: value}}
        bad = read("chat_jsonl", {"messages": [{"speaker": "Tom", "text": "a"}, own], "character": "Mia"}, path)
        assert isinstance(bad, Rejected) and f"message 1: metadata.{flag} is not read" in bad.reason
    kept = good(read(kind, chat("a", {"content": "b", "metadata": {flag: "noise"}}), path))
    assert kept.messages[1].metadata == {flag: "noise"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("System", "system"), ("systemPrompt", "system_prompt"), ("Weight", "weight"), ("Instruction", "instruction"),
        ("Messages", "messages"), ("ID", "id"), ("engagementLabel", "engagement_label"), ("isTrained", "is_trained"),
    ],
)  # fmt: skip
def test_keys_in_another_spelling_are_refused(tmp_path: Path, kind: str, key: str, meant: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = read(kind, chat("a", "b", **{key: "x"}), path)
    assert isinstance(bad, Rejected)
    assert bad.reason == f"{key} is not read: it differs from {meant} in spelling only; write {meant}"
    if kind != "chat_jsonl":
        assert good(read(kind, chat("a", "b", **{key: ""}), path)).messages[1].text == "b"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "meant"), [("Name", "name"), ("createdAt", "created_at"), ("Weight", "weight"), ("toolCalls", "tool_calls")]
)
def test_keys_of_a_message_in_another_spelling_are_refused(tmp_path: Path, kind: str, key: str, meant: str) -> None:
    bad = read(kind, chat("a", {"content": "b", key: "x"}), tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected)
    assert bad.reason == f"message 1: {key} is not read: it differs from {meant} in spelling only; write {meant}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_beside_messages_is_refused_unless_it_repeats_them(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    for prompt in ("Be brief.", ["x"], [{"role": "user", "content": "a"}], {"a": 1}):
        bad = read(kind, chat("a", "b", prompt=prompt), path)
        assert isinstance(bad, Rejected) and bad.reason.startswith("prompt is not read beside messages; found ")
    scene = chat(
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    )
    for record in (chat("a", "b", prompt=" a"), chat("a", "b", prompt=""), {**scene, "prompt": "a"}):
        assert good(read(kind, record, path)).metadata == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ["tool", "function", "observation", "function_call", "ipython"])
@pytest.mark.parametrize("name", [{}, {"name": "weather"}])
def test_tools_are_no_speakers(tmp_path: Path, kind: str, role: str, name: dict[str, str]) -> None:
    record = chat("a", "b", {"role": role, "content": "21", **name}, "c")
    bad = read(kind, record, tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected)
    assert f"message 2: role is '{role}': expected one of system" in bad.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "settings"),
    [
        ({"role": "user", "name": "Assistant"}, {}),
        ({"role": "system", "name": "Assistant"}, {}),
        ({"from": "human", "speaker": "Assistant"}, {}),
    ],
)
def test_nobody_else_has_the_name_of_the_assistant(
    tmp_path: Path, kind: str, first: dict[str, Any], settings: dict[str, Any]
) -> None:
    record = {"messages": [{**first, "content": "hi"}, {"role": "assistant", "content": "yo"}]}
    bad = read(kind, record, tmp_path / "a.jsonl", **settings)
    assert isinstance(bad, Rejected)
    assert "has the name of the assistant, 'Assistant', and would be trained as it" in bad.reason


@pytest.mark.parametrize(("kind", "user"), [("openai_messages", "user"), ("sharegpt", "user"), ("hh_rlhf", "human")])
def test_a_recipe_that_names_both_alike_is_refused(kind: str, user: str) -> None:
    with pytest.raises(ValidationError, match="are both 'Mia': both would be trained as the character"):
        SOURCES[kind].model_validate({"kind": kind, "path": "x", user: "Mia", "assistant": "Mia"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["system", *RECORD_ALIASES["system"]])
def test_the_system_of_a_record_is_the_scene(tmp_path: Path, kind: str, key: str) -> None:
    path = tmp_path / "a.jsonl"
    dialogue = good(read(kind, chat("a", "b", **{key: "Be brief."}), path))
    assert [(m.speaker, m.text) for m in dialogue.messages[:2]] == [("narrator", "Be brief."), ("User", "a")]
    assert dialogue.metadata == {}
    twice = [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]
    assert good(read(kind, {"messages": twice, key: "Be brief. "}, path)).messages == dialogue.messages
    bad = read(kind, {"messages": twice, key: "Be long."}, path)
    assert isinstance(bad, Rejected) and f"{key} differs from the first message" in bad.reason
    bad = read(kind, chat("a", "b", **{key: ["x"]}), path)
    assert isinstance(bad, Rejected) and bad.reason.startswith(f"{key} holds x: expected parts")
    assert good(read(kind, chat("a", "b", **{key: ""}), path)).messages == dialogue.messages[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_completion_are_messages(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    said = chat("a", "b", "c", "d")["messages"]
    dialogue = read(kind, {"prompt": said[:3], "completion": said[3:]}, path)
    assert [m.text for m in good(dialogue).messages] == list("abcd")
    assert trained(dialogue) == [False, False, False, True], "the prompt's replies are context"
    texts = read(kind, {"prompt": "a", "completion": "b"}, path)
    assert isinstance(texts, Rejected) and "two lists of messages" in texts.reason
    rated = read(kind, {"prompt": said[:1], "completion": said[1:2], "label": False}, path)
    assert isinstance(rated, Rejected) and "label is not read" in rated.reason


NAMES = {key: st.sampled_from([key, *others]) for key, others in (RECORD_ALIASES | MESSAGE_ALIASES).items()}


@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_all_names_of_a_key_mean_the_same(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("any")
    plain = [
        {"role": "user", "speaker": "Tom", "text": "hi", "time": 1714521600},
        {"role": "assistant", "speaker": "Mia", "text": "yo", "time": 1714521660.5},
    ]
    times = st.sampled_from([lambda i: plain[i]["time"], lambda i: f"2024-05-01T00:0{i}:0{i and '0.5'}Z"])
    renamed = [
        {data.draw(NAMES[key]): data.draw(times)(i) if key == "time" else value for key, value in message.items()}
        for i, message in enumerate(plain)
    ]
    expected = good(read(kind, {"messages": plain, "system": "x"}, folder / "a.jsonl"))
    record = {data.draw(NAMES["messages"]): renamed, data.draw(NAMES["system"]): "x"}
    assert read(kind, record, folder / "a.jsonl") == expected
    assert [m.time for m in expected.messages] == [None, 1714521600, 1714521660.5]
    assert (expected.character, [m.speaker for m in expected.messages]) == ("Mia", ["narrator", "Tom", "Mia"])


@pytest.mark.parametrize("kind", KINDS)
def test_two_names_of_a_key_with_two_values_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    bad = read(kind, chat("a", {"content": "b", "text": "c"}), path)
    assert isinstance(bad, Rejected)
    assert "message 1: text 'c' and content 'b' differ, and mean the same key text" in bad.reason
    assert isinstance(read(kind, chat("a", {"content": "b", "text": "b"}), path), Dialogue)
    assert isinstance(read(kind, chat("a", "b", conversations=[]), path), Rejected)
    parts = [{"type": "text", "text": "b"}]
    assert isinstance(read(kind, chat("a", {"content": "b", "text": parts}), path), Dialogue)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("time", "other", "is_same"),
    [
        (1714521600, "2024-05-01T00:00:00Z", True),
        (1714521600.0, 1714521600, True),
        ("2024-05-01T02:00:00+02:00", "2024-05-01", True),
        ("2024-05-01T00:00", "2024-05-01", True),
        (1714521600, "2024-05-01T00:00:01Z", False),
        (0, False, False),
        (1, True, False),
        (0, "", False),
    ],
)
def test_two_times_of_a_message_are_compared_as_moments(
    tmp_path: Path, kind: str, time: object, other: object, is_same: bool
) -> None:
    for first, second in ((time, other), (other, time)):
        made = read(kind, chat("a", {"content": "b", "time": first, "created_at": second}), tmp_path / "a.jsonl")
        if is_same:
            assert good(made).messages[1].time == 1714521600
        else:
            assert isinstance(made, Rejected) and f"time {first!r} and created_at {second!r} differ" in made.reason


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), ("1", 1)])
def test_two_ids_of_different_types_differ(tmp_path: Path, one: object, other: object) -> None:
    record = {**chat("a", "b"), "id": one, "conversation_id": other}
    made = read("openai_messages", record, tmp_path / "a.jsonl")
    assert isinstance(made, Rejected) and "differ, and mean the same key id" in made.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1714521600000, 1714521600 * 10**6, "1714521600", "noon", True, [1]])
def test_times_that_are_none_are_refused_by_the_name_of_their_key(tmp_path: Path, kind: str, value: object) -> None:
    bad = read(kind, chat("a", {"content": "b", "timestamp": value}), tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith("message 1: timestamp is ")


def test_formats_of_roles_keep_other_keys_of_a_message(tmp_path: Path) -> None:
    record = chat("a", {"content": "b", "rating": 3, "metadata": {"model": "m"}, "engagement_label": 1})
    dialogue = good(read("openai_messages", record, tmp_path / "a.jsonl"))
    assert dialogue.messages[1].metadata == {"model": "m", "rating": 3, "engagement_label": 1}
    bad = read("chat_jsonl", record, tmp_path / "a.jsonl")
    assert isinstance(bad, Rejected) and "unknown key 'engagement_label'" in bad.reason


def test_a_log_of_names_under_other_keys(tmp_path: Path) -> None:
    said = [{"from": "Tom", "value": "hi"}, {"from": "Mia", "value": "yo"}]
    dialogue = good(read("chat_jsonl", {"messages": said, "character": "Mia"}, tmp_path / "a.jsonl"))
    assert [m.speaker for m in dialogue.messages] == ["Tom", "Mia"]
    assert good(read("chat_jsonl", chat("a", "b"), tmp_path / "a.jsonl", character="Mia")).character == "Mia"


def test_participants_of_roles(tmp_path: Path) -> None:
    dialogue = good(read("openai_messages", chat("a", "b", participants=["u1", "Assistant"]), tmp_path / "a.jsonl"))
    assert (dialogue.participants, dialogue.metadata) == (("u1",), {})


def test_parts_of_text_are_lines_under_every_name(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    for key in ("text", "content", "value"):
        for said, empty in ((parts, "x\ny"), ([], "")):
            record = {"messages": [{"speaker": "Tom", key: said}, {"speaker": "Mia", "text": "yo"}]}
            assert good(read("chat_jsonl", record, tmp_path / "a.jsonl")).messages[0].text == empty


def test_the_character_is_no_participant(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    said = [{"speaker": "Tom", "text": "hi"}, {"speaker": "Mia", "text": "yo"}]
    for given_ids in (["u1", "Mia"], {"Tom": "u1", "Mia": "bot-1"}, {"Tom": "u1", "Mia ": "bot-1"}):
        record = {"messages": said, "participants": given_ids}
        assert good(read("chat_jsonl", {**record, "character": "Mia"}, path)).participants == ("u1",)
        assert good(read("chat_jsonl", record, path, character="Mia")).participants == ("u1",)
        assert len(good(read("chat_jsonl", record, path)).participants) == 2, "one of the people"


@pytest.mark.parametrize("blank", [None, "", " \n", "\u200b"])
def test_a_blank_participant_is_none(tmp_path: Path, blank: str | None) -> None:
    """It would link everybody who has it."""
    path = tmp_path / "a.jsonl"
    for given_ids in (["u1", blank], {"User": blank, "Ann": "u1"}):
        assert good(read("openai_messages", chat("a", "b", participants=given_ids), path)).participants == ("u1",)
    assert isinstance(read("openai_messages", chat("a", "b", participants=[3]), path), Rejected)
