"""Cache-aware truncation: the limit holds, pins stay, and between steps the prefix does not move."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data.prompt_truncation import surviving_parts

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
