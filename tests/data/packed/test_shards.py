"""Shards on disk: exact contents, a fingerprint of contents only, and damage that is always named."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.packed.dialogue_table import DIALOGUES_FILE, dialogue_table
from data.packed.packing import Document, EncodedCorpus
from data.packed.shards import MANIFEST_FILE, PackedDataset, PackedRow, ShardError, packed_rows
from tests.written_data import write_shards

WriteRows = Callable[..., Path]
MakeRows = Callable[..., list[PackedRow]]


def same(a: PackedRow, b: PackedRow) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("tokens_L", "loss_mask_L", "label_L", "documents")
    )


def test_rows_come_back_exactly(write_rows: WriteRows, make_rows: MakeRows) -> None:
    dataset = PackedDataset(write_rows(n_rows=7, rows_per_shard=3))
    assert (len(dataset), dataset.n_rows, dataset.row_length, dataset.vocab_size) == (7, 7, 16, 400)
    for i, row in enumerate(make_rows(7, 16)):
        assert same(dataset.row(i), row)
        assert dataset.row(i).document_lengths.sum() == 16
    tokens, _, _, documents = dataset.gather([6, 0, 3])
    assert np.array_equal(tokens[1], dataset.row(0).tokens_L)
    assert np.array_equal(documents, np.concatenate([dataset.row(i).documents for i in (6, 0, 3)]))
    for outside in (7, -1):
        with pytest.raises(IndexError, match="outside"):
            dataset.row(outside)


def test_documents_leave_out_the_padding(write_rows: WriteRows) -> None:
    for seed in range(4):
        dataset = PackedDataset(write_rows(n_rows=7, rows_per_shard=3, seed=seed, name=f"d{seed}"))
        expected = []
        for number in range(len(dataset)):
            row, start = dataset.row(number), 0
            for length in row.document_lengths.tolist():
                expected += [length] if row.tokens_L[start] != 0 else []
                start += length
        assert dataset.documents()["length"].tolist() == expected
        assert sum(expected) == dataset.n_tokens


def test_fingerprint_is_of_contents_only(write_rows: WriteRows) -> None:
    first = PackedDataset(write_rows(rows_per_shard=3, name="a"))
    assert PackedDataset(write_rows(rows_per_shard=2, name="b")).fingerprint == first.fingerprint
    assert PackedDataset(write_rows(rows_per_shard=100, name="c")).fingerprint == first.fingerprint
    assert PackedDataset(write_rows(seed=1, name="d")).fingerprint != first.fingerprint
    assert first.n_tokens == sum(int(np.count_nonzero(first.row(i).tokens_L)) for i in range(7))


@pytest.mark.parametrize("changed", ["tokens", "trained", "label", "boundary", "dialogue", "tokenizer"])
def test_fingerprint_sees_every_stream(tmp_path: Path, changed: str) -> None:
    def fingerprint(name: str, change: bool) -> str:
        tokens, trained, label = np.arange(10, 18), np.zeros(8, np.uint8), np.full(8, -1, np.int8)
        if change and changed == "tokens":
            tokens[3] = 99
        if change and changed == "trained":
            trained[3] = 1
        if change and changed == "label":
            label[3] = 0
        edge = 5 if change and changed == "boundary" else 4
        dialogue = int(change and changed == "dialogue")
        documents = [Document(tokens[s], trained[s], label[s], dialogue) for s in (slice(0, edge), slice(edge, 8))]
        rows = packed_rows(EncodedCorpus.of(documents, 400), [[0, 1]], 8)
        digest = "other" if change and changed == "tokenizer" else "t"
        manifest = write_shards(
            tmp_path / name, rows, row_length=8, vocab_size=400, rows_per_shard=1, tokenizer_sha256=digest
        )
        return str(manifest["fingerprint"])

    assert fingerprint("a", change=False) != fingerprint("b", change=True)


def test_documents_name_their_dialogue(tmp_path: Path) -> None:
    """Which it is, who took part, from which message on; a damaged table is named as any shard is."""
    documents = [
        Document(np.arange(10, 18), np.zeros(8, np.uint8), np.full(8, -1, np.int8), dialogue=1),
        Document(np.arange(20, 26), np.zeros(6, np.uint8), np.full(6, -1, np.int8), 1, first_message=63, n_repeated=4),
    ]
    rows = packed_rows(EncodedCorpus.of(documents, 400), [[0], [1]], 8)
    table = dialogue_table(["a", "b\nc"], [[0], [0, 3]])
    write_shards(tmp_path, rows, row_length=8, vocab_size=400, rows_per_shard=1, tokenizer_sha256="t", dialogues=table)
    dataset = PackedDataset(tmp_path)
    assert dataset.documents().tolist() == [(8, 1, 0, 0), (6, 1, 63, 4)]
    assert dataset.row(1).documents.tolist() == [(6, 1, 63, 4), (2, -1, 0, 0)]
    assert dataset.dialogues.to_pydict() == {"id": ["a", "b\nc"], "participants": [[0], [0, 3]]}
    path = tmp_path / DIALOGUES_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"dialogues\.parquet: \d+ bytes, the manifest says"):
        PackedDataset(tmp_path)


def test_large_vocabularies_use_32_bits(tmp_path: Path) -> None:
    document = Document(np.array([2, 65_535, 70_000, 4]), np.zeros(4, np.uint8), np.zeros(4, np.int8))
    rows = packed_rows(EncodedCorpus.of([document], 80_000), [[0]], 4)
    write_shards(tmp_path, rows, row_length=4, vocab_size=80_000, rows_per_shard=1, tokenizer_sha256="t")
    assert PackedDataset(tmp_path).row(0).tokens_L.tolist() == [2, 65_535, 70_000, 4]


@pytest.mark.parametrize("stream", ["tokens", "trained", "label", "documents"])
def test_damage_is_named(write_rows: WriteRows, stream: str) -> None:
    directory = write_rows()
    path = directory / f"shard_00001.{stream}.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match=rf"shard_00001\.{stream}\.bin: \d+ bytes, the manifest says {len(whole)}"):
        PackedDataset(directory, verify="sizes")
    path.write_bytes(whole[:5] + bytes([whole[5] ^ 1]) + whole[6:])
    with pytest.raises(ShardError, match=rf"shard_00001\.{stream}\.bin: its contents changed"):
        PackedDataset(directory)
    path.unlink()
    with pytest.raises(ShardError, match=rf"shard_00001\.{stream}\.bin: missing"):
        PackedDataset(directory)


def test_a_damaged_manifest_is_named(write_rows: WriteRows, tmp_path: Path) -> None:
    path = write_rows() / MANIFEST_FILE
    whole = path.read_text()
    for text, reason in [(whole[:50], "not JSON"), (json.dumps({"format": "x"}), "format is 'x'"), ("[]", "'list'")]:
        path.write_text(text)
        with pytest.raises(ShardError, match=rf"manifest\.json: .*{reason}"):
            PackedDataset(path.parent)
    with pytest.raises(ShardError, match="no such directory"):
        PackedDataset(tmp_path / "nowhere")


def test_half_written_is_never_whole(make_rows: MakeRows, tmp_path: Path) -> None:
    """Without its manifest, which is written last, a directory cannot be opened."""

    def dies() -> Iterator[PackedRow]:
        yield from make_rows(4, 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, dies(), row_length=16, vocab_size=400, rows_per_shard=3, tokenizer_sha256="t")
    assert (tmp_path / "shard_00000.tokens.bin").is_file()
    with pytest.raises(ShardError, match="half-written"):
        PackedDataset(tmp_path)
