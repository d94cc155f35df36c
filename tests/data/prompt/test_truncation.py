"""Cache-aware truncation: the limit holds, pins stay, and between moves of the cut every prompt extends the last."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.format.dialogue import Message
from data.format.encode import encode_reply
from data.format.message_encoder import MessageEncoder
from data.format.tokenizer import DialogueTokenizer
from data.prompt.template import PromptTemplate, conversation_values
from data.prompt.truncation import planned_parts, surviving_parts
from data.prompt.values import PromptError

sizes = st.lists(st.integers(1, 30), max_size=30)


@given(lengths=sizes, limit=st.integers(0, 200), step=st.integers(1, 60), data=st.data())
def test_limit_holds_and_pins_stay(lengths: list[int], limit: int, step: int, data: st.DataObject) -> None:
    priorities = [data.draw(st.integers(0, 2)) for _ in lengths]
    kept = surviving_parts(lengths, priorities, limit, step)
    assert kept == sorted(set(kept))
    assert {i for i, priority in enumerate(priorities) if priority == 0} <= set(kept)
    if sum(lengths) <= limit:
        assert kept == list(range(len(lengths)))
    over = sum(lengths[i] for i in kept) > limit
    assert not (over and any(priorities[i] > 0 for i in kept)), "too long although something could still go"


@settings(max_examples=200)
@given(pin=st.integers(0, 20), lengths=sizes, limit=st.integers(50, 120), step=st.integers(1, 50))
def test_the_cut_moves_only_with_the_step(pin: int, lengths: list[int], limit: int, step: int) -> None:
    """As a conversation grows, what was kept stays a prefix until the surplus crosses a multiple of the step."""
    before: tuple[int, list[int]] | None = None
    for n in range(1, len(lengths) + 1):
        grown = [pin, *lengths[:n]]
        target = -(-max(sum(grown) - limit, 0) // step)
        kept = surviving_parts(grown, [0] + [1] * n, limit, step)
        if before and before[0] == target:
            assert kept[: len(before[1])] == before[1]
        before = target, kept


def test_higher_priority_goes_first_and_oldest_first() -> None:
    lengths, priorities = [10, 10, 10, 10, 10], [1, 5, 5, 0, 1]
    assert surviving_parts(lengths, priorities, 41, 1) == [0, 2, 3, 4]
    assert surviving_parts(lengths, priorities, 30, 1) == [0, 3, 4]
    assert surviving_parts(lengths, priorities, 20, 1) == [3, 4]
    assert surviving_parts(lengths, priorities, 0, 1) == [3]


def test_the_surplus_is_rounded_up_to_the_step() -> None:
    assert surviving_parts([10] * 6, [1] * 6, 59, 30) == [3, 4, 5]


costs = st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.5])


@given(lengths=sizes, limit=st.integers(0, 200), cost=costs, data=st.data())
def test_planned_limit_holds_and_pins_stay(lengths: list[int], limit: int, cost: float, data: st.DataObject) -> None:
    priorities = [data.draw(st.integers(-1, 2)) for _ in lengths]
    kept = planned_parts(lengths, priorities, limit, cost)
    assert kept == sorted(set(kept))
    assert {i for i, priority in enumerate(priorities) if priority <= 0} <= set(kept)
    assert sum(lengths[i] for i in kept) <= limit or all(priorities[i] <= 0 for i in kept)
    if sum(lengths) <= limit - limit // 32:
        assert kept == list(range(len(lengths)))


@given(head=st.integers(0, 40), lengths=sizes, limit=st.integers(80, 200), cost=costs)
@settings(max_examples=200)
def test_a_plan_never_takes_back_a_cut_nor_cuts_more_than_its_share(
    head: int, lengths: list[int], limit: int, cost: float
) -> None:
    """What one turn removed stays removed; a full room keeps 1 - 2 c of itself, up to the size of a message."""
    room = limit - head
    before: list[int] = []
    for n in range(1, len(lengths) + 1):
        kept = planned_parts([head, *lengths[:n]], [0] + [1] * n, limit, cost)
        assert kept == [0, *range(n + 1 - len(kept) + 1, n + 1)], "the newest remain, without a gap"
        assert set(kept) & set(range(n)) <= set(before) | {0}
        moved = kept[: len(before)] != before
        tokens = sum(lengths[i - 1] for i in kept[1:])
        if moved and before:
            assert head + sum(lengths[i - 1] for i in before[1:]) + lengths[n - 1] > limit
        if sum(lengths[:n]) > room:
            assert tokens >= min((1 - 2 * cost) * room - max(lengths), room - max(lengths))
        before = kept


def test_a_cost_of_nothing_is_naive_truncation() -> None:
    lengths = [7, 3, 12, 5, 9, 4, 8]
    for limit in range(1, 50):
        kept = planned_parts(lengths, [1] * 7, limit, 0.0)
        assert kept == surviving_parts(lengths, [1] * 7, limit, 1)


@pytest.mark.parametrize("cost", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("message", [3, 10, 17])
def test_the_plan_costs_its_share_and_reuses_what_its_docstring_says(cost: float, message: int) -> None:
    """Steady growth, nothing pinned: context kept 1 - c, reuse 1 - m / (2 c (1 - c) L), to a message's size."""
    limit, n = 1000, 1200
    prompt_tokens = reused = turns = 0
    before: list[int] = []
    for i in range(1, n + 1):
        kept = planned_parts([message] * i, [1] * i, limit, cost)
        if i * message > limit:
            turns += 1
            prompt_tokens += len(kept) * message
            reused += len(before) * message if kept[: len(before)] == before else 0
        before = kept
    assert prompt_tokens / turns / limit == pytest.approx(1 - cost, abs=0.03)
    assert reused / prompt_tokens == pytest.approx(1 - message / (2 * cost * (1 - cost) * limit), abs=0.02)


@given(data=st.data(), limit=st.integers(60, 250), by_steps=st.booleans())
@settings(max_examples=40)
def test_between_moves_each_prompt_extends_the_last_in_token_ids(
    tokenizer: DialogueTokenizer, data: st.DataObject, limit: int, by_steps: bool
) -> None:
    """Turn after turn, with the reply that was given: either the cut moved, or the ids of the last prompt and of its
    reply begin the next. The pinned scene begins it always."""
    template, encoder = PromptTemplate(), MessageEncoder(tokenizer)
    words = st.text(st.sampled_from("ab <|end>\u2060é\n:"), max_size=12)
    messages: list[Message] = []
    before, n_removed = None, 0
    scene = template.render(conversation_values([], "Ann", "the scene"), encoder)
    pinned = [tokenizer.bos_id, *scene.parts[0].tokens]
    for _ in range(data.draw(st.integers(1, 18))):
        messages += [Message("Bob", text) for text in data.draw(st.lists(words, min_size=1, max_size=2))]
        rule = {"truncation_step": limit // 3} if by_steps else {}
        prompt = template.render(conversation_values(messages, "Ann", "the scene"), encoder, limit, **rule)
        assert prompt.tokens[: len(pinned)] == pinned
        assert len(prompt.tokens) <= limit
        if before is not None and prompt.n_removed == n_removed:
            assert prompt.tokens[: len(before)] == before
        assert prompt.n_removed >= n_removed
        reply = data.draw(words)
        before, n_removed = [*prompt.tokens, *encode_reply(tokenizer, reply)], prompt.n_removed
        messages.append(Message("Ann", reply))


def test_a_longer_name_at_the_end_moves_no_cut(tokenizer: DialogueTokenizer) -> None:
    """In a group chat the reply that follows is another character's every time."""
    template, encoder, limit = PromptTemplate(), MessageEncoder(tokenizer), 1024
    names = ["Jo", "Ann", "Bartholomew"]
    conversation = [Message(names[i % 3], f"this is message number {i}") for i in range(120)]
    removed = []
    for i in range(40, 120):
        rendered = template.render(conversation_values(conversation[:i], names[i % 3]), encoder, limit)
        removed.append(rendered.n_removed)
    assert removed == sorted(removed), "the cut never comes back"
    assert sum(a != b for a, b in pairwise(removed)) <= len(removed) // 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"truncation_step": 5}, "need a token_limit"),
        ({"context_cost": 0.2}, "need a token_limit"),
        ({"token_limit": 90, "truncation_step": 5, "context_cost": 0.2}, "one of them"),
        ({"token_limit": 90, "context_cost": 0.7}, "from 0"),
        ({"token_limit": 90, "truncation_step": 0}, "1 or more"),
        ({"token_limit": 0}, "1 or more"),
    ],
)
def test_settings_without_effect_are_refused(
    tokenizer: DialogueTokenizer, options: dict[str, float], reason: str
) -> None:
    with pytest.raises(PromptError, match=reason):
        PromptTemplate().render(conversation_values([], "Ann"), tokenizer, **options)
