"""State of the sequences that a runner decodes, one row each, in tensors on the model's device.

A step reads and advances it there: the token to feed, its position, the sampling parameters, how many tokens are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.inference.sampling import Sampling

FORBIDDEN, STOP = 1, 2
"""Bits of `Rows.flags_RV`: a token that is never sampled; one that ends the reply."""

_FIELDS = np.dtype(
    [
        ("token", "i4"), ("length", "i4"), ("n_left", "i4"), ("n_drawn", "i4"), ("seed", "i4", 2),
        ("temperature", "f4"), ("top_k", "i4"), ("top_p", "f4"),
    ]
)  # fmt: skip
_GREEDY_BELOW = 1e-30  # logits that are not equal differ by more
_NUCLEUS = 64  # most likely tokens that make up top_p, for most replies


@dataclass(frozen=True)
class RowStart:
    """A sequence that takes a row: its sampling parameters, the reply's tokens so far, and how many more to draw."""

    sampling: Sampling
    n_drawn: int
    n_left: int


def on_device(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python numbers, copied to the device without waiting for it."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _field(number: int, dtype: torch.dtype = torch.int32) -> property:
    return property(lambda rows: rows.state_FR[number].view(dtype))


class Rows:
    """State of R rows, or of a selection of them.

    state_FR: the fields below, a row of a tensor each, with floats as the bits of int32. length: tokens of the sequence
    with the one to feed, whose position is length - 1; 0 for an idle row. n_drawn: position of the next token in its
    reply. flags_RV: FORBIDDEN and STOP of each token.
    """

    token_R = _field(0)
    length_R = _field(1)
    n_left_R = _field(2)
    n_drawn_R = _field(3)
    temperature_R = _field(6, torch.float32)
    top_k_R = _field(7)
    top_p_R = _field(8, torch.float32)

    def __init__(self, n_rows: int, vocab_size: int, device: torch.device | str = "cpu"):
        self.state_FR = torch.zeros(_FIELDS.itemsize // 4, n_rows, dtype=torch.int32, device=device)
        self.flags_RV = torch.zeros(n_rows, vocab_size, dtype=torch.uint8, device=device)
        self.samplings: list[Sampling | None] = [None] * n_rows
        self._flags_V: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}

    def __len__(self) -> int:
        return self.state_FR.shape[1]

    @property
    def seed_R(self) -> Tensor:
        """Int64 seeds."""
        low_R, high_R = self.state_FR[4:6].long()
        return (low_R & 0xFFFFFFFF) | (high_R << 32)

    @property
    def all_greedy(self) -> bool:
        """Whether the most likely token is the one to sample in all rows."""
        return all(s is None or s.temperature <= _GREEDY_BELOW for s in self.samplings)

    @property
    def filtered(self) -> list[int]:
        """Rows with top_k or top_p."""
        return [row for row, s in enumerate(self.samplings) if s is not None and (s.top_k > 0 or s.top_p < 1)]

    @property
    def n_sorted(self) -> int:
        """How many of the most likely tokens the filters need, or are likely to need."""
        rules = [s for s in self.samplings if s is not None]
        largest = max((s.top_k for s in rules), default=0)
        return max(min(largest, self.flags_RV.shape[1]), _NUCLEUS if any(s.top_p < 1 for s in rules) else 0)

    def assign(self, starts: dict[int, RowStart]) -> None:
        """Give rows to sequences; they are idle until `begin`."""
        if not starts:
            return
        values_N = np.zeros(len(starts), _FIELDS)
        for value, (row, start) in zip(values_N, starts.items(), strict=True):
            s = start.sampling
            self.samplings[row] = s
            value["n_left"], value["n_drawn"] = start.n_left, start.n_drawn
            digest = hashlib.blake2b(str(s.seed).encode(), digest_size=8).digest()
            value["seed"] = np.frombuffer(digest, "<i4")
            largest = float(np.finfo(np.float32).max)
            value["temperature"] = 0 if s.temperature <= _GREEDY_BELOW else min(float(s.temperature), largest)
            value["top_k"] = min(s.top_k, 2**31 - 1)
            value["top_p"] = s.top_p
            self.flags_RV[row] = self._flags(s)
        values_FN = on_device(values_N.view(np.int32).reshape(len(starts), -1).T, torch.int32, self.state_FR.device)
        self.state_FR[:, self._index(list(starts))] = values_FN

    def clear(self, rows: Sequence[int]) -> None:
        """Make rows idle."""
        if rows:
            self.length_R[self._index(rows)] = 0
            for row in rows:
                self.samplings[row] = None

    def select(self, rows: Sequence[int]) -> Rows:
        """These rows: a view if they are the first ones, else a copy."""
        part = object.__new__(Rows)
        index: Tensor | slice = slice(len(rows)) if list(rows) == list(range(len(rows))) else self._index(rows)
        part.state_FR, part.flags_RV = self.state_FR[:, index], self.flags_RV[index]
        part.samplings = [self.samplings[row] for row in rows]
        return part

    def update(self, rows: Sequence[int], part: Rows) -> None:
        """Write back the state of a selection of these rows."""
        if part.state_FR.data_ptr() != self.state_FR.data_ptr():
            self.state_FR[:, self._index(rows)] = part.state_FR

    def _index(self, rows: Sequence[int]) -> Tensor:
        return on_device(list(rows), torch.int64, self.state_FR.device)

    def _flags(self, sampling: Sampling) -> Tensor:
        """The flags of a vocabulary, kept for each set of ids: the requests of a server share a few."""
        key = (sampling.forbidden_ids, sampling.stop_ids)
        if key not in self._flags_V:
            flags_V = torch.zeros(self.flags_RV.shape[1], dtype=torch.uint8)
            for ids, flag in zip(key, (FORBIDDEN, STOP), strict=True):
                flags_V[list(ids)] |= flag
            if len(self._flags_V) >= 64:
                self._flags_V.clear()
            self._flags_V[key] = flags_V.to(self.flags_RV.device)
        return self._flags_V[key]
