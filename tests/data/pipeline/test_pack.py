"""Groups cover a side's tokens, each of about the size asked for, and every document falls in one of them."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packed.packing import DOCUMENT, EncodedCorpus
from data.pipeline.pack import Group, _documents_from, groups_of


@settings(max_examples=200)
@given(total=st.integers(0, 1_000), pack_tokens=st.integers(1, 400))
def test_groups_cover_a_side(total: int, pack_tokens: int) -> None:
    groups = groups_of({"train": total, "heldout": 0}, pack_tokens)
    of_train = [group for group in groups if group.side == "train"]
    assert [token for group in of_train for token in range(group.first, group.end)] == list(range(total))
    assert groups[-1] == Group("heldout", 0, 0), "an empty side has an empty group, and so a manifest"
    sizes = [group.end - group.first for group in of_train]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 1.5 * pack_tokens + 1


@settings(max_examples=200)
@given(units=st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=5), pack_tokens=st.integers(1, 60))
def test_every_document_is_in_one_group_and_whole(units: list[list[int]], pack_tokens: int) -> None:
    corpora, begins, token = [], [], 0
    for lengths in units:
        begins.append(token)
        tokens = np.arange(token, token + sum(lengths))
        token += sum(lengths)
        documents = np.array([(length, 0, 0, 0) for length in lengths], DOCUMENT)
        corpora.append(EncodedCorpus(tokens, tokens.astype(np.uint8), tokens.astype(np.int8), documents))
    packed: list[int] = []
    lengths_packed: list[int] = []
    for group in groups_of({"train": token}, pack_tokens):
        for corpus, begin in zip(corpora, begins, strict=True):
            part = _documents_from(corpus, begin, group)
            assert len(part.tokens) == len(part.loss_mask) == len(part.label) == part.lengths.sum()
            packed += part.tokens.tolist()
            lengths_packed += part.lengths.tolist()
    assert packed == list(range(token))
    assert lengths_packed == [length for lengths in units for length in lengths]


def test_groups_are_read_back_as_one_dataset(tmp_path: Path) -> None:
    """Shards of different sizes in the middle of a dataset, which groups leave."""
    from data.packed.dialogue_table import dialogue_table
    from data.packed.packing import Document, best_fit
    from data.packed.shards import PackedDataset, join_groups, packed_rows, write_group

    rng = np.random.default_rng(0)
    settings_ = {"row_length": 16, "vocab_size": 400, "rows_per_shard": 3}
    fingerprints = set()
    for rows_per_shard in (3, 100):
        settings_["rows_per_shard"] = rows_per_shard
        rng, groups, expected = np.random.default_rng(0), [], []
        for number in range(4):
            documents = [
                Document(rng.integers(5, 400, n), np.ones(n, np.uint8), np.zeros(n, np.int8))
                for n in rng.integers(1, 17, 5 * number)
            ]
            corpus = EncodedCorpus.of(documents, 400)
            rows = list(packed_rows(corpus, best_fit(corpus.lengths, 16), 16))
            folder = tmp_path / f"{rows_per_shard}_{number}"
            folder.mkdir()
            groups.append((folder, write_group(folder, rows, **settings_)))
            expected += rows
        directory = tmp_path / f"joined_{rows_per_shard}"
        for _ in range(2):  # again, as after an interruption
            join_groups(directory, groups, [dialogue_table(["a"], [[]])], **settings_, tokenizer_sha256="t")
        dataset = PackedDataset(directory)
        fingerprints.add(dataset.fingerprint)
        assert len(dataset) == len(expected)
        for number, row in enumerate(expected):
            found = dataset.row(number)
            assert found.tokens_L.tolist() == row.tokens_L.tolist()
            assert found.document_lengths.tolist() == row.document_lengths.tolist()
        order = rng.permutation(len(expected))
        assert dataset.gather(order)[0].tolist() == [expected[i].tokens_L.tolist() for i in order]
    assert len(fingerprints) == 1
