"""Convert our SentencePiece BPE to a `tokenizers` BPE (tokenizer.json) with the same ids for every text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data.format.encode import CONTROL_SURFACES
from data.format.tokenizer import DialogueTokenizer, Piece


def tokenizer_json(tokenizer: DialogueTokenizer) -> str:
    """The content of tokenizer.json.

    The control tokens are registered as special so that a rendered chat template can be tokenized as one string.
    Unlike in the SentencePiece model, text can therefore spell a control token: the template has to escape texts.
    """
    pieces = tokenizer.pieces()
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, surface) for i, surface in enumerate(CONTROL_SURFACES)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": CONTROL_SURFACES[tokenizer.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: i for i, piece in enumerate(pieces)},
            "merges": merges(pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def tokenizer_config(max_length: int) -> dict[str, Any]:
    """tokenizer_config.json: encoding adds no tokens, decoding does not change spaces."""
    pad, unk, bos, _, end = CONTROL_SURFACES
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": bos,
        "eos_token": end,
        "pad_token": pad,
        "unk_token": unk,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
    }


def merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """All pairs of pieces whose concatenation is a piece, best score of the result first.

    SentencePiece has no list of merges: it merges any two neighbors that form a piece, the best score first.
    """
    rank = {piece.text: -piece.score for piece in pieces if piece.kind == "normal"}
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for text, order in rank.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                found.append((order, ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _added_token(token_id: int, surface: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": surface, **flags}
