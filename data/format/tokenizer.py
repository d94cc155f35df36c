"""The tokenizer: lossless SentencePiece BPE (decode(encode(text)) == text for every Unicode string) whose control
tokens no text can produce. Trains, loads and lists vocabularies."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.format.encode import CONTROL_SURFACES

MODEL_FILE = "tokenizer.model"
_SENTENCEPIECE_SPACE = "\u2581"
_FIRST_BYTE_ID = len(CONTROL_SURFACES)
SMALLEST_VOCABULARY = len(CONTROL_SURFACES) + 256
_LARGEST = re.compile(r"set it to a value <= (\d+)")  # in SentencePiece's error

PieceKind = Literal["normal", "control", "byte"]


class TokenizerError(ValueError):
    """A tokenizer file that is missing, foreign or damaged, or a vocabulary that cannot be trained.

    `largest_vocab_size`: the largest vocabulary that the texts support, if that is the problem.
    """

    largest_vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One vocabulary entry. Spaces are plain spaces; a byte piece is written `<0x0A>`. Merges are by descending
    score."""

    text: str
    score: float
    kind: PieceKind


class DialogueTokenizer:
    """Encodes text, never to control ids, and decodes ids. Use `load`; the constructor takes the model's bytes."""

    pad_id = 0
    unk_id = 1
    bos_id = 2
    message_id = 3
    end_id = 4
    forbidden_in_reply = (pad_id, unk_id, bos_id, message_id)

    def __init__(self, model_bytes: bytes, source: str = "tokenizer") -> None:
        import sentencepiece

        self.model_bytes = model_bytes
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except Exception as error:  # RuntimeError, OSError or SentencePiece's own, depending on the version
            raise TokenizerError(f"{source}: not a SentencePiece model, or damaged ({error})") from None
        self.vocab_size: int = self._processor.vocab_size()
        found = tuple(self._processor.id_to_piece(i) for i in range(min(_FIRST_BYTE_ID, self.vocab_size)))
        if found != CONTROL_SURFACES:
            raise TokenizerError(
                f"{source}: ids 0 to 4 are {list(found)}, expected {list(CONTROL_SURFACES)}; "
                "this is not a tokenizer made by data.prepare"
            )
        _check_exact(self._processor, source)

    @classmethod
    def load(cls, path: Path | str) -> "DialogueTokenizer":
        """The tokenizer of a model file, or of a directory that holds `tokenizer.model`."""
        path = Path(path)
        file = path / MODEL_FILE if path.is_dir() else path
        try:
            model_bytes = file.read_bytes()
        except FileNotFoundError:
            raise TokenizerError(f"{file}: no such file; expected a tokenizer made by data.prepare") from None
        except OSError as error:
            raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from None
        return cls(model_bytes, source=str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without control ids."""
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on the calling thread."""
        return self._processor.encode(list(texts), num_threads=1) if texts else []

    def decode(self, ids: Sequence[int], show_control: bool = False) -> str:
        """The text of `ids`. Control tokens are dropped, or shown as `<|end|>` etc.; broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside the vocabulary of {self.vocab_size} pieces")
        # Control tokens separate runs even if dropped: bytes on both sides of one are not one character.
        shown = CONTROL_SURFACES if show_control else ("",) * _FIRST_BYTE_ID
        return "".join(
            self._processor.decode(run) if isinstance(run, list) else shown[run] for run in _runs_of_text(ids)
        )

    def pieces(self) -> list[Piece]:
        """The whole vocabulary in id order, for exporters."""
        processor = self._processor
        kinds: list[PieceKind] = [
            "control" if i < _FIRST_BYTE_ID else "byte" if processor.is_byte(i) else "normal"
            for i in range(self.vocab_size)
        ]
        return [Piece(processor.id_to_piece(i), processor.get_score(i), kind) for i, kind in enumerate(kinds)]

    def inside_character(self) -> np.ndarray:
        """True for each id that continues a UTF-8 character: the byte pieces <0x80> to <0xBF>."""
        bytes_of = (int(piece.text[3:5], 16) if piece.kind == "byte" else 0 for piece in self.pieces())
        return np.array([byte & 0xC0 == 0x80 for byte in bytes_of])

    def save(self, path: Path | str) -> None:
        """Write the model to a file, or to `tokenizer.model` of a directory."""
        path = Path(path)
        (path / MODEL_FILE if path.is_dir() else path).write_bytes(self.model_bytes)


def _runs_of_text(ids: Sequence[int]) -> Iterator[list[int] | int]:
    """Maximal runs of text ids, and single control ids."""
    run: list[int] = []
    for i in ids:
        if i >= _FIRST_BYTE_ID:
            run.append(i)
            continue
        if run:
            yield run
            run = []
        yield i
    if run:
        yield run


def _check_exact(processor: Any, source: str) -> None:
    """Reject a foreign model that loses text: one probe for each way in which SentencePiece can."""
    probes = ("a  b ", " a", "\u2581", "\uff21", "\u2581 \n\t", *CONTROL_SURFACES)
    for probe in probes:
        if processor.decode(processor.encode(probe)) != probe:
            raise TokenizerError(f"{source}: loses text ({probe!r} does not survive); train it with data.prepare")


def train_tokenizer(
    texts: Iterable[str],
    out_path: Path | str | None,
    vocab_size: int,
    *,
    sample_characters: int | None = None,
    character_coverage: float = 0.9995,
) -> DialogueTokenizer:
    """Train a BPE vocabulary of exactly `vocab_size` pieces on the first `sample_characters` of `texts`.

    The model depends only on the texts, not on the number of cores. Written to `out_path` unless it is None. Raises
    TokenizerError if the texts cannot fill the vocabulary.
    """
    import sentencepiece

    if vocab_size <= SMALLEST_VOCABULARY:
        raise TokenizerError(f"vocab_size is {vocab_size}: expected more than {SMALLEST_VOCABULARY} (control + bytes)")
    model, failures = io.BytesIO(), list[BaseException]()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting_failure(_sample(texts, sample_characters), failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,  # bytes; SentencePiece silently skips longer texts
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            bos_piece="<bos>",
            control_symbols=list(CONTROL_SURFACES[3:]),
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:  # raised by the iterator (Ctrl-C too); SentencePiece converts it to a RuntimeError
            raise failures[0] from None
        failure = TokenizerError(_training_failure(vocab_size, str(error)))
        if largest := _LARGEST.search(str(error)):
            failure.largest_vocab_size = int(largest[1])
        raise failure from None
    tokenizer = DialogueTokenizer(_with_literal_spaces(model.getvalue()), source="the trained tokenizer")
    if out_path is not None:
        tokenizer.save(out_path)
    return tokenizer


def _training_failure(vocab_size: int, reason: str) -> str:
    if "sentences_.empty()" in reason:
        return f"cannot train a tokenizer of {vocab_size} pieces: there is no text"
    largest = _LARGEST.search(reason)
    if largest:
        return f"vocab_size is {vocab_size}: these texts support at most {largest[1]} pieces; lower it or add text"
    needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", reason)
    if needed:
        return (
            f"vocab_size is {vocab_size}: the characters of these texts alone need {needed[1]} pieces; "
            "raise it, or lower character_coverage"
        )
    return f"cannot train a tokenizer of {vocab_size} pieces: {reason}"


def _with_literal_spaces(model_bytes: bytes) -> bytes:
    """The model with spaces stored as spaces, so that U+2581 in a text is an ordinary character."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(model_bytes)
    for piece in model.pieces:
        piece.piece = piece.piece.replace(_SENTENCEPIECE_SPACE, " ")
    model.normalizer_spec.escape_whitespaces = False
    return model.SerializeToString(deterministic=True)


def _noting_failure(texts: Iterator[str], failures: list[BaseException]) -> Iterator[str]:
    try:
        yield from texts
    except BaseException as failure:
        failures.append(failure)
        raise


def _sample(texts: Iterable[str], sample_characters: int | None) -> Iterator[str]:
    """Texts up to a number of characters, without those that SentencePiece rejects (it stops at a NUL)."""
    characters = 0
    for text in texts:
        if sample_characters is not None and characters >= sample_characters:
            return
        if text and "\0" not in text and _SENTENCEPIECE_SPACE not in text:
            characters += len(text)
            yield text
