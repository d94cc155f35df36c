"""A mixture: exact shares of tokens at every place, an order that is a pure function, rows from the right part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packed.dialogue_table import dialogue_table
from data.packed.mixture import MixtureData, MixtureOrder, MixtureRows, open_mixture, training_order
from data.packed.packing import DOCUMENT, NO_DIALOGUE
from data.packed.sampler import DataPositionError, position_after
from data.packed.shards import PackedRow, ShardError
from tests.written_data import write_shards

LENGTH = 32
weights = st.lists(st.floats(0.01, 10), min_size=2, max_size=5)


def shares_of(values: list[float]) -> list[float]:
    return [value / sum(values) for value in values]


@given(values=weights, start=st.integers(0, 10**9), count=st.integers(0, 400))
def test_no_part_is_further_from_its_share_than_a_row_for_each_part(
    values: list[float], start: int, count: int
) -> None:
    shares = shares_of(values)
    order = MixtureOrder([5] * len(values), shares, seed=3)
    counts = np.array(order.counts(start))
    for owner in order.parts(start, count).tolist():
        counts[owner] += 1
    end = start + count
    assert counts.tolist() == order.counts(end), "place by place, or at once"
    assert counts.sum() == end
    assert np.all(np.abs(counts - np.array(shares) * end) <= len(values) + end * 1e-8)


@given(
    n_rows=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    start=st.integers(0, 50),
    pieces=st.lists(st.integers(0, 20), max_size=5),
    data=st.data(),
)
def test_restarts_do_not_change_the_order_and_parts_repeat_when_all_is_seen(
    n_rows: list[int], seed: int, start: int, pieces: list[int], data: st.DataObject
) -> None:
    shares = shares_of(data.draw(st.lists(st.floats(0.1, 1), min_size=len(n_rows), max_size=len(n_rows))))
    whole = MixtureOrder(n_rows, shares, seed).rows(start, sum(pieces))
    place, found = start, [np.zeros(0, np.int64)]
    for piece in pieces:
        found.append(MixtureOrder(n_rows, shares, seed).rows(place, piece))
        place += piece
    assert np.concatenate(found).tolist() == whole.tolist()
    order = MixtureOrder(n_rows, shares, seed)
    seen = np.bincount(order.rows(0, place), minlength=sum(n_rows))
    starts = np.cumsum([0, *n_rows])
    for number, count in enumerate(order.counts(place)):
        of_part = seen[starts[number] : starts[number + 1]]
        assert of_part.sum() == count
        assert of_part.max() - of_part.min() <= 1, "a row comes again only when all of its part have come"
    assert order.epoch(place) == seen.min()


def test_the_order_is_fixed_for_ever() -> None:
    """Changing these numbers breaks the resume of every existing checkpoint."""
    order = MixtureOrder([3, 4, 2], [0.5, 0.3, 0.2], seed=0)
    assert order.parts(0, 10).tolist() == [2, 0, 1, 0, 2, 0, 1, 0, 1, 0]
    assert order.rows(0, 10).tolist() == [8, 2, 4, 1, 7, 0, 6, 2, 3, 0]


def directory(path: Path, fill: list[int], token: int, tokenizer: str = "t") -> Path:
    """Both sides of prepared data whose rows hold so many tokens, all of them `token`."""
    for side in ("train", "heldout"):
        rows = []
        for n in fill:
            tokens_L = np.where(np.arange(LENGTH) < n, token, 0).astype(np.uint16)
            padding = [(LENGTH - n, NO_DIALOGUE, 0, 0)] * (n < LENGTH)
            documents = np.array([(n, len(rows), 0, 0), *padding], DOCUMENT)
            rows.append(PackedRow(tokens_L, np.zeros(LENGTH, np.uint8), np.full(LENGTH, -1, np.int8), documents))
        write_shards(
            path / side, rows, row_length=LENGTH, vocab_size=300, rows_per_shard=3, tokenizer_sha256=tokenizer,
            dialogues=dialogue_table([str(number) for number in range(len(fill))], [[]] * len(fill)),
        )  # fmt: skip
    return path


def mixture(paths: list[Path], values: list[float]) -> MixtureData:
    parts = [{"path": str(path), "weight": value} for path, value in zip(paths, values, strict=True)]
    return MixtureData.model_validate({"kind": "mixture", "parts": tuple(parts)})


def test_weights_are_of_tokens_to_a_thousandth_of_a_hundred_million(tmp_path: Path) -> None:
    """Rows of the three parts are filled to 97, 62 and 100 percent, unevenly; 3.7 million rows."""
    rng = np.random.default_rng(0)
    fills = [rng.integers(30, 33, 50), rng.integers(8, 33, 70), np.full(20, LENGTH)]
    paths = [directory(tmp_path / str(n), fill.tolist(), 10 + n) for n, fill in enumerate(fills)]
    values = [6.0, 3.0, 1.0]
    rows = open_mixture(mixture(paths, values), "train")
    order = training_order(rows, seed=5)
    filled = np.concatenate(fills)
    n_places, tokens = 3_700_000, np.zeros(3)
    for start in range(0, n_places, 370_000):
        numbers = order.rows(start, 370_000)
        tokens += np.bincount(np.searchsorted([50, 120], numbers, side="right"), filled[numbers], 3)
    assert tokens.sum() > 1e8
    assert np.all(np.abs(tokens / tokens.sum() - np.array(shares_of(values))) < 1e-4)


def test_rows_come_from_their_part_and_in_the_order_asked(tmp_path: Path) -> None:
    paths = [directory(tmp_path / "a", [20, 32, 7, 31], 11), directory(tmp_path / "b", [32, 9], 12)]
    rows = open_mixture(mixture(paths, [1, 1]), "train")
    assert (rows.n_rows, rows.row_length, rows.vocab_size) == (6, LENGTH, 300)
    tokens_RL, loss_mask_RL, label_RL, documents = rows.gather([5, 0, 3, 4, 4])
    assert [row[0] for row in tokens_RL.tolist()] == [12, 11, 11, 12, 12]
    assert (tokens_RL > 0).sum(1).tolist() == [9, 20, 31, 32, 32]
    assert documents["length"].tolist() == [9, 23, 20, 12, 31, 1, 32, 32]
    assert documents["dialogue"].tolist() == [5, -1, 0, -1, 3, -1, 4, 4], "dialogues of two parts are two"
    assert loss_mask_RL.shape == label_RL.shape == (5, LENGTH)
    assert rows.gather([])[0].shape == (0, LENGTH)
    assert set(np.searchsorted([4], rows.spread(4), side="right")) == {0, 1}
    position = position_after(7, rows, training_order(rows, 1))
    assert (position.tokens_consumed, position.fingerprint) == (7 * LENGTH, rows.fingerprint)


def test_the_fingerprint_is_of_parts_and_shares(tmp_path: Path) -> None:
    paths = [directory(tmp_path / "a", [20, 32], 11), directory(tmp_path / "b", [32, 9], 12)]
    prints = {
        open_mixture(mixture(order, values), "train").fingerprint
        for order, values in [(paths, [1, 1]), (paths, [1, 2]), (paths, [2, 2]), (paths[::-1], [1, 1])]
    }
    assert len(prints) == 3, "equal shares are equal, whatever the weights"


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    a, b = directory(tmp_path / "a", [20], 11), directory(tmp_path / "b", [20], 12, tokenizer="other")
    with pytest.raises(ShardError, match=r"a/train has tokenizer_sha256 t, .*b/train other.*one tokenizer"):
        open_mixture(mixture([a, b], [1, 1]), "train")
    with pytest.raises(ShardError, match="c/train: no such directory"):
        open_mixture(mixture([a, tmp_path / "c"], [1, 1]), "train")
    with pytest.raises(ShardError, match="empty/train holds no rows"):
        open_mixture(mixture([a, directory(tmp_path / "empty", [], 1)], [1, 1]), "train")
    with pytest.raises(ValueError, match="named twice"):
        mixture([a, a], [1, 1])
    with pytest.raises(DataPositionError, match="longer rows"):
        MixtureOrder([1, 1], [0.5, 0.5], 0).rows((1 << 32) - 1, 2)


def test_a_mixture_is_not_a_row_order(tmp_path: Path) -> None:
    rows = open_mixture(mixture([directory(tmp_path / n, [32] * 4, 11) for n in "ab"], [3, 1]), "train")
    assert isinstance(rows, MixtureRows)
    assert isinstance(training_order(rows, 0), MixtureOrder)
