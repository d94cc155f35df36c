"""Packing: rows are exact, best fit is dense."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packed.packing import Document, EncodedCorpus, best_fit
from data.packed.shards import packed_rows


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_places_each_document_once(lengths: list[int]) -> None:
    rows = best_fit(lengths, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 32 for row in rows)
    half_empty = [row for row in rows if sum(lengths[i] for i in row) <= 16]
    assert len(half_empty) <= 1, "two rows that fit together were not joined"


def test_best_fit_prefers_the_tightest_row() -> None:
    # 6 and 5 open rows with 4 and 5 left; the 4 belongs in the first, the 5 in the second.
    assert best_fit([5, 6, 4, 5], 10) == [[1, 2], [0, 3]]


def test_rows_have_exact_boundaries() -> None:
    def document(n: int, value: int) -> Document:
        return Document(np.full(n, value), np.ones(n, np.uint8), np.full(n, 1, np.int8))

    corpus = EncodedCorpus.of([document(5, 7), document(3, 8), document(8, 9)], vocab_size=400)
    first, second = packed_rows(corpus, [[2], [0, 1]], 8)
    assert first.tokens_L.tolist() == [9] * 8
    assert first.document_lengths.tolist() == [8], "a full row has no padding document"
    assert second.tokens_L.tolist() == [7] * 5 + [8] * 3
    (padded,) = packed_rows(corpus, [[0]], 8)
    assert padded.tokens_L.tolist() == [7] * 5 + [0] * 3
    assert padded.document_lengths.tolist() == [5, 3]
    assert padded.loss_mask_L.tolist() == [1] * 5 + [0] * 3
    assert padded.label_L.tolist() == [1] * 5 + [-1] * 3
