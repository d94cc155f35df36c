"""Memory-mapped shards of packed rows: tokens, loss masks and labels, under a manifest that is written last.

For each shard a directory holds `shard_00000.tokens.bin` (uint16, or uint32 above 65,536 pieces), `.trained.bin` (the
loss mask, uint8) and `.label.bin` (int8), each n_rows x row_length, and `.documents.bin` (n_rows + 1 offsets into the
documents, int32, then the documents as DOCUMENT; a row's padding is its last document), all little-endian. Several
processes may write groups of rows, which are then joined in order. `dialogues.parquet` lists the dialogue of each
document number.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data.format.dialogue import NO_LABEL
from data.packed.dialogue_table import DIALOGUES_FILE, read_dialogue_table, write_dialogue_table
from data.packed.packing import DOCUMENT, NO_DIALOGUE, EncodedCorpus, token_dtype
from recipes.files import atomic_file, file_sha256, sync_path, write_json

MANIFEST_FILE = "manifest.json"
FORMAT = "dramatis-packed-2"
STREAMS = ("tokens", "trained", "label", "documents")  # `trained` holds the loss mask
_PAD_ID = 0
_ROWS_AT_ONCE = 512


class ShardError(ValueError):
    """Packed data that is missing, incomplete or altered; the message names the file."""


class FormatError(ShardError):
    """Packed data of another format version."""


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row: `tokens_L`, `loss_mask_L` uint8, `label_L` int8, and its documents (DOCUMENT), whose lengths sum to
    L."""

    tokens_L: np.ndarray
    loss_mask_L: np.ndarray
    label_L: np.ndarray
    documents: np.ndarray

    @property
    def document_lengths(self) -> np.ndarray:
        """The number of tokens of each document, int32."""
        return np.asarray(self.documents["length"])

    @property
    def n_padding(self) -> int:
        """The number of padding positions at its end."""
        last = self.documents[-1]
        return int(last["length"]) if last["dialogue"] == NO_DIALOGUE else 0


def packed_rows(corpus: EncodedCorpus, rows: Iterable[Sequence[int]], row_length: int) -> Iterator[PackedRow]:
    """Concatenate the documents of each row and pad the end, as a document of its own."""
    starts = np.concatenate([[0], np.cumsum(corpus.lengths, dtype=np.int64)])
    for numbers in rows:
        documents = corpus.documents[list(numbers)]
        spans = [slice(int(starts[i]), int(starts[i + 1])) for i in numbers]
        pad = row_length - int(documents["length"].sum())
        padding = np.array([(pad, NO_DIALOGUE, 0, 0)] * (pad > 0), DOCUMENT)
        assert pad >= 0, "a row holds more than its length"
        yield PackedRow(
            np.concatenate([*(corpus.tokens[s] for s in spans), np.full(pad, _PAD_ID, corpus.tokens.dtype)]),
            np.concatenate([*(corpus.loss_mask[s] for s in spans), np.zeros(pad, np.uint8)]),
            np.concatenate([*(corpus.label[s] for s in spans), np.full(pad, NO_LABEL, np.int8)]),
            np.concatenate([documents, padding]),
        )


def write_group(
    directory: Path, rows: Iterable[PackedRow], *, row_length: int, vocab_size: int, rows_per_shard: int
) -> dict[str, Any]:
    """Write rows as shards for `join_groups`, which takes the returned figures. Holds some rows in memory."""
    contents = {stream: hashlib.sha256() for stream in STREAMS}
    shards: list[dict[str, Any]] = []
    n_padding = 0
    iterator = iter(rows)
    while (first := next(iterator, None)) is not None:
        of_shard = chain([first], islice(iterator, rows_per_shard - 1))
        shard, padding = _write_shard(directory, len(shards), of_shard, vocab_size, contents)
        shards.append(shard)
        n_padding += padding
    n_rows = sum(shard["n_rows"] for shard in shards)
    return {
        "n_rows": n_rows,
        "n_tokens": n_rows * row_length - n_padding,
        "contents": [contents[stream].hexdigest() for stream in STREAMS],
        "shards": shards,
    }


def _write_shard(
    directory: Path, number: int, rows: Iterator[PackedRow], vocab_size: int, contents: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """Write a shard and update the digests `contents`; returns its manifest entry and its padding."""
    n_padding = 0
    n_documents: list[int] = []  # of each row
    documents: list[np.ndarray] = []
    digests = {stream: hashlib.sha256() for stream in STREAMS}
    n_bytes = dict.fromkeys(STREAMS, 0)
    with ExitStack() as opened:
        paths = {stream: directory / _shard_name(number, stream) for stream in STREAMS}
        files = {stream: opened.enter_context(atomic_file(path)) for stream, path in paths.items()}

        def write(stream: str, array: np.ndarray) -> None:
            files[stream].write(array.data)
            digests[stream].update(array.data)
            n_bytes[stream] += array.nbytes

        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            for stream, array in _token_streams(chunk, vocab_size).items():
                write(stream, array)
                contents[stream].update(array.data)
            n_padding += sum(row.n_padding for row in chunk)
            n_documents += [len(row.documents) for row in chunk]
            documents += [row.documents for row in chunk]
            # without the shard-specific offsets; the lengths imply them
            contents["documents"].update(_raw(np.concatenate([row.documents for row in chunk])).data)
        write("documents", np.cumsum([0, *n_documents]).astype("<i4"))
        write("documents", _raw(np.concatenate(documents)))
    entries = {
        stream: {"name": path.name, "bytes": n_bytes[stream], "sha256": digests[stream].hexdigest()}
        for stream, path in paths.items()
    }
    return {"n_rows": len(n_documents), "files": entries}, n_padding


def _raw(documents: np.ndarray) -> np.ndarray:
    """DOCUMENT records as plain int32, for hashing and writing."""
    return np.ascontiguousarray(documents).view("<i4")


def join_groups(
    directory: Path,
    groups: Sequence[tuple[Path, dict[str, Any]]],
    dialogues: Iterable[pa.Table],
    *,
    row_length: int,
    vocab_size: int,
    rows_per_shard: int,
    tokenizer_sha256: str,
    statistics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Move the shards of groups (their folders, and what `write_group` returned) into one directory, in order, and
    write the table of their dialogues and the manifest, which is returned. Can be repeated after an interruption."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    for folder, group in groups:
        for shard in group["shards"]:
            files = {}
            for stream, entry in shard["files"].items():
                name = _shard_name(len(shards), stream)
                source, target = folder / entry["name"], directory / name
                if source.exists():
                    os.replace(source, target)
                files[stream] = {**entry, "name": name}
            shards.append({**shard, "files": files})
    table = directory / DIALOGUES_FILE
    n_dialogues = write_dialogue_table(table, dialogues)
    sync_path(directory)
    digests = [digest for _, group in groups for digest in group["contents"]]
    manifest = {
        "format": FORMAT,
        "fingerprint": _fingerprint(tokenizer_sha256, row_length, digests),
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "row_length": row_length,
        "n_rows": sum(group["n_rows"] for _, group in groups),
        "n_tokens": sum(group["n_tokens"] for _, group in groups),
        "n_dialogues": n_dialogues,
        "rows_per_shard": rows_per_shard,
        "statistics": statistics or {},
        "dialogues": {"name": table.name, "bytes": table.stat().st_size, "sha256": file_sha256(table)},
        "shards": shards,
    }
    write_json(directory / MANIFEST_FILE, manifest)
    return manifest


def _shard_name(number: int, stream: str) -> str:
    return f"shard_{number:05d}.{stream}.bin"


def _token_streams(rows: Sequence[PackedRow], vocab_size: int) -> dict[str, np.ndarray]:
    """The stored arrays, one value a token."""
    dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
    return {
        "tokens": np.concatenate([row.tokens_L for row in rows]).astype(dtype, copy=False),
        "trained": np.concatenate([row.loss_mask_L for row in rows]).astype(np.uint8, copy=False),
        "label": np.concatenate([row.label_L for row in rows]).astype(np.int8, copy=False),
    }


def _fingerprint(tokenizer_sha256: str, row_length: int, digests: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([FORMAT, tokenizer_sha256, str(row_length), *digests]).encode()).hexdigest()


class PackedDataset:
    """Read access to a directory of shards. `verify="hashes"` hashes every file once; `"sizes"` reads only the
    manifest, for large data."""

    def __init__(self, directory: Path | str, verify: Literal["hashes", "sizes"] = "hashes") -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self.n_rows: int = self.manifest["n_rows"]
        self.n_tokens: int = self.manifest["n_tokens"]
        self.row_length: int = self.manifest["row_length"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.fingerprint: str = self.manifest["fingerprint"]
        self._first_rows = np.cumsum([0, *(shard["n_rows"] for shard in self.manifest["shards"])])
        for shard in self.manifest["shards"]:
            for entry in shard["files"].values():
                _check_file(self.directory / entry["name"], entry, verify)
        _check_file(self.directory / DIALOGUES_FILE, self.manifest["dialogues"], verify)
        self._shards = [self._open(shard) for shard in self.manifest["shards"]]

    def _open(self, shard: dict[str, Any]) -> dict[str, np.ndarray]:
        tokens = np.dtype(token_dtype(self.vocab_size)).newbyteorder("<")
        dtypes = {"tokens": tokens, "trained": np.dtype(np.uint8), "label": np.dtype(np.int8)}
        arrays: dict[str, np.ndarray] = {}
        for stream, dtype in dtypes.items():
            path = self.directory / shard["files"][stream]["name"]
            arrays[stream] = np.memmap(path, dtype=dtype, mode="r", shape=(shard["n_rows"], self.row_length))
        path = self.directory / shard["files"]["documents"]["name"]
        numbers = np.memmap(path, dtype="<i4", mode="r")
        arrays["offsets"], documents = numbers[: shard["n_rows"] + 1], numbers[shard["n_rows"] + 1 :]
        if arrays["offsets"][0] != 0 or arrays["offsets"][-1] * DOCUMENT.itemsize != documents.nbytes:
            raise ShardError(f"{path}: its document offsets do not match its documents; run data.prepare again")
        arrays["documents"] = documents.view(DOCUMENT)
        return arrays

    def __len__(self) -> int:
        return self.n_rows

    def documents(self) -> np.ndarray:
        """All documents (DOCUMENT) in row order, without padding."""
        found = np.concatenate([np.zeros(0, DOCUMENT), *(np.asarray(shard["documents"]) for shard in self._shards)])
        return np.asarray(found[found["dialogue"] != NO_DIALOGUE])

    @cached_property
    def dialogues(self) -> pa.Table:
        """The table of data/packed/dialogue_table.py."""
        return read_dialogue_table(self.directory / DIALOGUES_FILE)

    def row(self, i: int) -> PackedRow:
        """Row i."""
        tokens, loss_mask, label, documents = self.gather([i])
        return PackedRow(tokens[0], loss_mask[0], label[0], documents)

    def gather(self, row_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows in the requested order: tokens (R, L) int64, loss_mask (R, L) uint8, label (R, L) int8, and their
        concatenated documents (DOCUMENT), with each row's padding as its last document."""
        indices = np.asarray(row_indices, dtype=np.int64)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.n_rows:
            raise IndexError(f"row {indices.min()} or {indices.max()} is outside 0..{self.n_rows - 1}")
        shape = (len(indices), self.row_length)
        tokens, loss_mask, label = np.empty(shape, np.int64), np.empty(shape, np.uint8), np.empty(shape, np.int8)
        documents = [np.zeros(0, DOCUMENT)]
        numbers = np.searchsorted(self._first_rows, indices, "right") - 1
        locals_ = indices - self._first_rows[numbers]
        for k, (number, local) in enumerate(zip(numbers.tolist(), locals_.tolist(), strict=True)):
            shard = self._shards[number]
            tokens[k], loss_mask[k], label[k] = shard["tokens"][local], shard["trained"][local], shard["label"][local]
            documents.append(shard["documents"][shard["offsets"][local] : shard["offsets"][local + 1]])
        return tokens, loss_mask, label, np.concatenate(documents)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a directory of shards. Raises ShardError if it is missing or incomplete, and FormatError for
    another format version."""
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise ShardError(f"{directory}: no such directory; make it with: python -m data.prepare <recipe>")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShardError(f"{path}: missing, so this data is half-written; run data.prepare again") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ShardError(f"{path}: not JSON ({error}); run data.prepare again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        kind = FormatError if str(found).startswith(FORMAT.rstrip("0123456789")) else ShardError
        raise kind(
            f"{path}: format is {found!r}, expected {FORMAT!r}: it was written by another version; run data.prepare "
            "again, into another run_dir if trained models use this one"
        )
    return manifest


def _check_file(path: Path, entry: dict[str, Any], verify: str) -> None:
    try:
        size = path.stat().st_size
    except OSError:
        raise ShardError(f"{path}: missing although the manifest lists it; run data.prepare again") from None
    if size != entry["bytes"]:
        raise ShardError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; run data.prepare again")
    if verify == "hashes" and file_sha256(path) != entry["sha256"]:
        raise ShardError(f"{path}: its contents changed since it was written (sha256); run data.prepare again")
