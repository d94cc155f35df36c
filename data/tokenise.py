"""Dialogues to documents of tokens, in several processes; the result does not depend on how many."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, connection, get_context, parent_process

import numpy as np

from data.dialogue import Dialogue, encode_dialogue, from_json, to_json
from data.packing import EncodedCorpus, cut
from data.tokenizer import DialogueTokenizer

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # of an EncodedCorpus, in its order
_DIALOGUES_PER_PIECE = 256
_PIECES_AHEAD = 4  # pieces in flight for each worker: bounds memory


class TokeniseError(RuntimeError):
    """A worker process died."""


@dataclass(frozen=True, slots=True)
class TokeniseSettings:
    """What the tokens of a dialogue depend on beside its text."""

    row_length: int
    continue_within_seconds: float | None


def tokenise(
    groups: Mapping[str, Sequence[Dialogue]],
    tokenizer: DialogueTokenizer,
    settings: TokeniseSettings,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, EncodedCorpus]:
    """For each group the documents of its dialogues in order, each of at most `row_length` tokens; `advance` hears of
    every piece done."""
    pieces = [
        (name, group[i : i + _DIALOGUES_PER_PIECE])
        for name, group in groups.items()
        for i in range(0, len(group), _DIALOGUES_PER_PIECE)
    ]
    encoded: Iterator[EncodedCorpus]
    if workers <= 1 or len(pieces) <= 1:
        encoded = (_encode_piece(piece, tokenizer, settings) for _, piece in pieces)
    else:
        encoded = _in_processes([piece for _, piece in pieces], tokenizer, settings, min(workers, len(pieces)))
    parts = {name: [EncodedCorpus.of([], tokenizer.vocab_size)] for name in groups}
    for (name, piece), part in zip(pieces, encoded, strict=True):
        parts[name].append(part)
        advance(len(piece))
    return {name: EncodedCorpus.join(of_group) for name, of_group in parts.items()}


def _encode_piece(
    dialogues: Sequence[Dialogue], tokenizer: DialogueTokenizer, settings: TokeniseSettings
) -> EncodedCorpus:
    documents = [
        document
        for dialogue in dialogues
        for document in cut(encode_dialogue(tokenizer, dialogue, settings.continue_within_seconds), settings.row_length)
    ]
    return EncodedCorpus.of(documents, tokenizer.vocab_size)


def _in_processes(
    pieces: Sequence[Sequence[Dialogue]], tokenizer: DialogueTokenizer, settings: TokeniseSettings, workers: int
) -> Iterator[EncodedCorpus]:
    """Pieces in order, computed a few ahead. Dialogues travel as JSON lines, tokens as plain arrays."""
    values = (tokenizer.model_bytes, settings.row_length, settings.continue_within_seconds)
    others = set(active_children())
    executor = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=values)
    pending: list[Future[_Arrays]] = []
    try:
        for piece in pieces:
            with _interrupts_held():  # the first one starts the processes
                pending.append(executor.submit(_work, [to_json(dialogue) for dialogue in piece]))
            if len(pending) >= workers * _PIECES_AHEAD:
                yield EncodedCorpus(*pending.pop(0).result())
        while pending:
            yield EncodedCorpus(*pending.pop(0).result())
    except KeyboardInterrupt:
        for child in set(active_children()) - others:
            child.kill()  # rather than wait for what it is doing
        raise
    except BrokenProcessPool:
        raise TokeniseError(
            "a tokenising process was killed (out of memory?); run again, with fewer workers if it repeats"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT: processes started meanwhile keep it blocked, so that Ctrl-C is the parent's alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[DialogueTokenizer, TokeniseSettings] | None = None


def _start_worker(model_bytes: bytes, row_length: int, continue_within_seconds: float | None) -> None:
    """Load the tokenizer; end with the parent even when it is killed."""
    global _worker
    parent = parent_process()
    assert parent is not None, "only a child process is a worker"
    sentinel = parent.sentinel

    def follow_parent() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    _worker = DialogueTokenizer(model_bytes), TokeniseSettings(row_length, continue_within_seconds)


def _work(lines: list[str]) -> _Arrays:
    assert _worker is not None, "the initializer has run"
    tokenizer, settings = _worker
    part = _encode_piece([from_json(line) for line in lines], tokenizer, settings)
    return part.tokens, part.trained, part.label, part.lengths
