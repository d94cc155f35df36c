"""Tests of eval/context.py."""

import pytest

from data.format.dialogue import NARRATOR, Dialogue, Message
from data.format.encode import decode_reply, encode_prompt, encode_reply
from data.format.tokenizer import DialogueTokenizer
from eval.context import dialogues_of, human_replies, sample_replies, select_contexts
from model.inference.sampling import Sampling
from model.transformer import Transformer


def test_contexts_are_one_a_dialogue_and_end_before_a_reply_of_the_character(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 100, seed=3, max_prompt_tokens=100)
    assert len({c.dialogue_id for c in contexts}) == len(contexts) >= 30
    by_id = {d.id: d for d in dialogues}
    for context in contexts:
        messages = by_id[context.dialogue_id].messages
        place = context.turn - 1
        assert messages[place].speaker == "Alex" and messages[place].text == context.human_reply
        assert context.messages == messages[place - len(context.messages) : place]
        assert context.messages[-1].speaker == "Sam" and place >= 2
        assert list(context.prompt) == encode_prompt(tokenizer, context.messages, "Alex")
        assert list(context.human_tokens) == encode_reply(tokenizer, context.human_reply)
    assert [dialogues[number].id for number in dialogues_of(contexts)] == [c.dialogue_id for c in contexts]


def test_selection_follows_the_seed(dialogues: list[Dialogue], tokenizer: DialogueTokenizer) -> None:
    first, second = (select_contexts(dialogues, tokenizer, 10, seed=1) for _ in range(2))
    assert first == second
    assert first != select_contexts(dialogues, tokenizer, 10, seed=2)
    assert first == select_contexts(dialogues, tokenizer, 20, seed=1)[:10]


def test_long_contexts_lose_old_messages_and_keep_the_scene(tokenizer: DialogueTokenizer) -> None:
    talk = [Message("Sam" if i % 2 == 0 else "Alex", f"music {i}") for i in range(20)]
    dialogue = Dialogue("d", (Message(NARRATOR, "rain"), *talk), "Alex")
    (context,) = select_contexts([dialogue], tokenizer, 1, seed=0, max_prompt_tokens=60, min_messages=18)
    assert context.messages[0].text == "rain" and context.n_opening == 1
    assert len(context.prompt) <= 60 and 2 < len(context.messages) < 18
    assert context.messages[-1] == dialogue.messages[context.turn - 2]


def test_a_message_too_long_for_the_budget_gives_no_context(tokenizer: DialogueTokenizer) -> None:
    messages = (Message("Sam", "hi"), Message("Alex", "hi"), Message("Sam", "why " * 50), Message("Alex", "no"))
    assert select_contexts([Dialogue("d", messages, "Alex")], tokenizer, 1, seed=0, max_prompt_tokens=30) == []


def test_a_reply_kept_out_of_the_loss_is_not_chosen(tokenizer: DialogueTokenizer) -> None:
    for trained, expected in ((True, ["no"]), (False, [])):
        reply = Message("Alex", "no", metadata={"trained": trained})
        dialogue = Dialogue("d", (Message("Sam", "hi"), Message("Sam", "why"), reply), "Alex")
        contexts = select_contexts([dialogue], tokenizer, 1, seed=0, max_prompt_tokens=60)
        assert [context.human_reply for context in contexts] == expected


def test_replies_are_text_closed_by_end(
    dialogues: list[Dialogue], tokenizer: DialogueTokenizer, models: dict[str, Transformer]
) -> None:
    contexts = select_contexts(dialogues, tokenizer, 7, seed=0, max_prompt_tokens=60)
    forbidden = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.message_id)
    sampling = Sampling(max_new_tokens=5, stop_ids=(tokenizer.end_id,), seed=4, forbidden_ids=forbidden)
    replies = sample_replies(models["sft"], tokenizer, contexts, sampling)
    assert len(replies) == 7
    for reply in replies:
        assert reply.tokens[-1] == tokenizer.end_id and tokenizer.end_id not in reply.tokens[:-1]
        assert reply.text == decode_reply(tokenizer, reply.tokens[:-1])
        assert reply.finished == (len(reply.tokens) <= 5)
        assert not set(forbidden) & set(reply.tokens)
    assert replies == sample_replies(models["sft"], tokenizer, contexts, sampling)


def test_human_replies_have_the_form_of_model_replies(dialogues: list[Dialogue], tokenizer: DialogueTokenizer) -> None:
    contexts = select_contexts(dialogues, tokenizer, 3, seed=0)
    for context, reply in zip(contexts, human_replies(contexts), strict=True):
        assert reply.text == context.human_reply and reply.tokens[-1] == tokenizer.end_id and reply.finished


@pytest.mark.parametrize("n", [0, 1])
def test_no_dialogues_no_contexts(n: int, tokenizer: DialogueTokenizer) -> None:
    only_character = Dialogue("d", (Message("Alex", "hi"), Message("Alex", "hello")), "Alex")
    assert select_contexts([only_character] * n, tokenizer, 5, seed=0) == []
