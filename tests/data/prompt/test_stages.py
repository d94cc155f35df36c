"""One template renders training data, evaluation prompts and serving prompts: the ids are equal at every reply."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import NARRATOR, Dialogue, Message, continuation_labels
from data.format.encode import encode_dialogue, encode_prompt
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer
from data.prompt.template import PromptTemplate, conversation_values
from data.prompt.values import PromptError
from eval.context import select_contexts
from serving_export.server.conversation import ConversationEncoder

TEMPLATES = Path(__file__).parents[3] / "recipes" / "templates"
GROUP = {
    "scene": "A kitchen.",
    "characters": [{"name": name, "definition": "is here", "greeting": ""} for name in ["Ann", "B", "C", "D", "E"]],
}
texts = st.sampled_from(["hello", "", " a\n- name: b", "<|end|>", "\u2060", "{{ x }}"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=10
)
conversations = st.lists(st.tuples(st.sampled_from(["Ann", "Ben", "Zed"]), texts), min_size=1, max_size=8)


@pytest.mark.parametrize("name", ["default", "group_chat"])
@given(said=conversations)
@settings(max_examples=60)
def test_training_evaluation_and_serving_have_the_same_ids(
    tokenizer: DialogueTokenizer, name: str, said: list[tuple[str, str]]
) -> None:
    template = PromptTemplate() if name == "default" else PromptTemplate.load(TEMPLATES / "group_chat.yml.j2")
    values = {} if name == "default" else GROUP
    whole = [("Zed", "hi"), *said, ("Ann", "bye")]
    messages = tuple(Message(speaker, text, float(i)) for i, (speaker, text) in enumerate(whole))
    dialogue = Dialogue("one", messages, "Ann")
    rendered = template.dialogue(dialogue, values)
    n_added = len(rendered.messages) - len(messages)
    assert n_added == (0 if name == "default" else 6)
    if name == "default":
        assert rendered == dialogue, "the default template is the format itself: encode_dialogue needs no template"

    training = encode_dialogue(tokenizer, rendered, 1.5)
    encoder, server = MessageEncoder(tokenizer), ConversationEncoder(tokenizer)
    for i, message in enumerate(messages):
        if message.speaker != "Ann":
            continue
        given_values = conversation_values(messages[:i], "Ann") | values
        serving = template.render(given_values, encoder)
        assert serving.tokens == training.tokens[: training.text_starts[n_added + i]].tolist()
        assert serving.tokens == server.encode_prompt(rendered.messages[: n_added + i], "Ann").tokens
        assert serving.tokens == encode_prompt(tokenizer, rendered.messages[: n_added + i], "Ann")
    labels = continuation_labels(dialogue, 1.5)
    assert continuation_labels(rendered, 1.5)[n_added:] == labels, "times and labels survive the template"


def test_an_evaluation_context_is_the_prompt_that_is_served(tokenizer: DialogueTokenizer) -> None:
    template = PromptTemplate.load(TEMPLATES / "group_chat.yml.j2")
    messages = tuple(Message(("Zed", "Ann")[i % 2], f"message {i}") for i in range(10))
    rendered = template.dialogue(Dialogue("one", messages, "Ann"), GROUP)
    for seed in range(5):
        (context,) = select_contexts([rendered], tokenizer, 1, seed, max_prompt_tokens=10_000)
        values = GROUP | conversation_values(messages[: context.turn - 1 - 6], "Ann", "A kitchen.")
        assert list(context.prompt) == template.render(values, tokenizer).tokens


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages[1:] %}- speaker: {{ m.speaker }}\n  content: {{ m.text }}\n{% endfor %}",
        "{% for m in messages %}- speaker: {{ m.speaker }}\n  content: {{ m.text | upper }}\n{% endfor %}",
    ],
)
def test_a_template_that_loses_a_message_trains_nothing(source: str) -> None:
    dialogue = Dialogue("one", (Message("Zed", "hi"), Message("Ann", "yes")), "Ann")
    with pytest.raises(PromptError, match=r"message 0 \(Zed: 'hi'\) is left out or changed"):
        PromptTemplate(source + "- content: 'Ann:'\n").dialogue(dialogue)


def test_the_reply_is_the_dialogue_s_character_s() -> None:
    dialogue = Dialogue("one", (Message("Zed", "hi"), Message("Ann", "yes")), "Ann")
    said = "{% for m in messages %}- speaker: {{ m.speaker }}\n  content: {{ m.text }}\n{% endfor %}"
    with pytest.raises(PromptError, match="reply is by 'Zed', expected its character 'Ann'"):
        PromptTemplate(said + "- content: '{{ character.name }}:'\n").dialogue(dialogue, {"character": {"name": "Zed"}})


def test_a_template_without_a_reply_still_trains() -> None:
    said = "{% for m in messages %}- content: '{{ m.speaker }}: {{ m.text }}'\n{% endfor %}"
    source = "- role: system\n  content: scene\n" + said
    dialogue = Dialogue("one", (Message("Zed", "hi", 1.0), Message("Ann", "yes", 2.0)), "Ann")
    expected = replace(dialogue, messages=(Message(NARRATOR, "scene"), *dialogue.messages))
    assert PromptTemplate(source).dialogue(dialogue) == expected
