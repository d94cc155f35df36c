"""Batches: targets and masks against the plain definition, token by token."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.packed.batch import collate
from data.packed.packing import Document, EncodedCorpus
from data.packed.shards import PackedDataset, packed_rows
from tests.written_data import write_shards

WriteRows = Callable[..., Path]


def test_collate_is_the_definition(write_rows: WriteRows) -> None:
    dataset = PackedDataset(write_rows(n_rows=9, row_length=16, rows_per_shard=4))
    indices = [8, 0, 3, 3]
    batch = collate(dataset, indices)
    assert (batch.tokens_T.dtype, batch.targets_T.dtype) == (torch.int64, torch.int64)
    assert (batch.has_target_T.dtype, batch.loss_mask_T.dtype) == (torch.bool, torch.bool)
    assert (batch.label_T.dtype, batch.document_lengths.dtype) == (torch.int8, torch.int32)
    assert batch.row_length == 16
    assert int(batch.document_lengths.sum()) == len(batch.tokens_T) == 4 * 16
    t = 0
    for i in indices:
        row, position = dataset.row(i), 0
        for length in row.document_lengths.tolist():
            for k in range(length):
                is_padding = row.tokens_L[position] == 0
                has_target = k + 1 < length and not is_padding
                assert batch.tokens_T[t] == row.tokens_L[position]
                assert batch.has_target_T[t] == has_target
                assert batch.targets_T[t] == (row.tokens_L[position + 1] if has_target else 0)
                assert batch.loss_mask_T[t] == (has_target and bool(row.loss_mask_L[position + 1]))
                assert batch.label_T[t] == row.label_L[position]
                position, t = position + 1, t + 1
    assert t == len(batch.tokens_T)


def test_repeated_context_is_no_target_of_any_stage(tmp_path: Path) -> None:
    tokens = np.array([2, 3, 11, 4, 3, 12, 13, 4])
    trained = np.array([0, 0, 0, 0, 0, 0, 1, 1], np.uint8)
    label = np.array([-1] * 7 + [1], np.int8)
    documents = [Document(tokens, trained, label), Document(tokens, trained, label, 0, 5, n_repeated=4)]
    rows = packed_rows(EncodedCorpus.of(documents, 400), [[0, 1]], 16)
    write_shards(tmp_path, rows, row_length=16, vocab_size=400, rows_per_shard=1, tokenizer_sha256="t")
    batch = collate(PackedDataset(tmp_path), [0])
    assert batch.targets_T.tolist() == [3, 11, 4, 3, 12, 13, 4, 0, 0, 0, 0, 3, 12, 13, 4, 0]
    assert batch.has_target_T.tolist() == [target != 0 for target in batch.targets_T.tolist()]
    assert batch.loss_mask_T.tolist() == [False] * 5 + [True] * 2 + [False] * 6 + [True] * 2 + [False]


def test_answers_are_exactly_the_trained_tokens(write_rows: WriteRows) -> None:
    dataset = PackedDataset(write_rows(n_rows=5))
    batch = collate(dataset, np.arange(5))
    assert int(batch.loss_mask_T.sum()) == sum(int(dataset.row(i).loss_mask_L.sum()) for i in range(5))


def test_to_moves_every_tensor(write_rows: WriteRows) -> None:
    moved = collate(PackedDataset(write_rows()), [0, 1]).to(torch.device("meta"))
    assert all(
        getattr(moved, name).device.type == "meta"
        for name in ("tokens_T", "targets_T", "has_target_T", "loss_mask_T", "label_T", "document_lengths")
    )
    assert moved.row_length == 16
