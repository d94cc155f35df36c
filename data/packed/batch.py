"""A batch of packed rows as flat tensors: next-token targets that never cross a document, and their masks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch

from data.format.tokenizer import DialogueTokenizer
from data.packed.packing import NO_DIALOGUE
from data.packed.sampler import Rows

_PAD_ID = DialogueTokenizer.pad_id


class PackedRows(Rows, Protocol):
    """Numbered rows of packed documents: shards on disk (data.packed.shards) or synthetic ones
    (data.packed.synthetic)."""

    def gather(self, row_indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """tokens_RL int64, loss_mask_RL uint8, label_RL int8, and the concatenated documents of all rows
        (data.packed.packing.DOCUMENT), with each row's padding as its last document."""
        ...


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """R concatenated rows, T = R * row_length positions.

    `tokens_T`, `targets_T` int64 (the pad id without target); `has_target_T` bool: the next token is in the same
    document, is not padding and not repeated context (the loss of pre-training); `loss_mask_T` bool: has a target in
    the shards' loss mask (the loss of SFT); `label_T` int8: continuation label at the token, -1 for none;
    `document_lengths` int32, sum T, padding included as documents; `documents`: DOCUMENT, in host memory.
    """

    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    has_target_T: torch.Tensor
    loss_mask_T: torch.Tensor
    label_T: torch.Tensor
    document_lengths: torch.Tensor
    documents: np.ndarray
    row_length: int

    @property
    def sequence_lengths(self) -> list[int]:
        """Document lengths without padding."""
        lengths: list[int] = self.documents["length"][self.documents["dialogue"] != NO_DIALOGUE].tolist()
        return lengths

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on a device, `document_lengths` included."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: to_device(v, device) for name, v in values.items() if isinstance(v, torch.Tensor)}
        return PackedBatch(**{**values, **moved})


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An asynchronous copy to the device, through pinned memory: a copy from pageable memory waits for the GPU's
    queue."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def collate(dataset: PackedRows, row_indices: Sequence[int] | np.ndarray) -> PackedBatch:
    """The rows of `dataset` with these numbers, in this order."""
    tokens_RL, loss_mask_RL, label_RL, documents = dataset.gather(row_indices)
    tokens_T = tokens_RL.reshape(-1)
    targets_T = np.append(tokens_T[1:], _PAD_ID)
    ends = np.cumsum(documents["length"], dtype=np.int64)
    targets_T[ends - 1] = _PAD_ID  # the last token of a document has no target
    for number in np.flatnonzero(documents["n_repeated"]):
        start = ends[number] - documents["length"][number]
        targets_T[start : start + documents["n_repeated"][number] - 1] = _PAD_ID
    has_target_T = targets_T != _PAD_ID
    loss_mask_T = has_target_T & np.append(loss_mask_RL.reshape(-1)[1:] != 0, False)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T),
        targets_T=torch.from_numpy(targets_T),
        has_target_T=torch.from_numpy(has_target_T),
        loss_mask_T=torch.from_numpy(loss_mask_T),
        label_T=torch.from_numpy(label_RL.reshape(-1)),
        document_lengths=torch.from_numpy(documents["length"].copy()),
        documents=documents,
        row_length=dataset.row_length,
    )
