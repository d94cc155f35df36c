"""A copy of the training state in host memory, taken between steps and written to files in the background."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from train.checkpoint.hashed_file import hashed_file
from train.deepspeed.host_memory import HostMemory


class Snapshot:
    """Files to be written, with copies of their content.

    Replaces DeepSpeed's checkpoint engine during `save_checkpoint` (`save` and the methods after it are that
    protocol). `save_checkpoint` then does no I/O: a full disk cannot leave ranks in different collectives.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory, self._lent = memory, list[Tensor]()
        self._files: list[tuple[Path, Any]] = []
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._failure: Exception | None = None
        self._copied = torch.cuda.Event() if torch.cuda.is_available() else None

    def tensor(self, source: Tensor) -> Tensor:
        """The copy of a tensor; the same copy for the same tensor, so that shared tensors stay shared."""
        key = (source.data_ptr(), source.shape, source.stride(), source.dtype)
        if key not in self._copies:  # the source is kept alive, so that its address is not reused
            self._copies[key] = (source, self.copy(source))
        return self._copies[key][1]

    def copy(self, source: Tensor) -> Tensor:
        """A new copy, of a tensor that may be freed afterwards."""
        self._lent.append(self._memory.copy(source))
        return self._lent[-1]

    def release(self) -> None:
        """Return the buffers to the pool, after `write`."""
        self._files.clear()
        self._memory.give_back(self._lent)
        self._lent.clear()

    def finish(self) -> None:
        """Call after the last copy."""
        self._copies.clear()
        if self._copied:
            self._copied.record()

    def wait(self) -> None:
        """Wait until all copies have arrived."""
        if self._copied:
            self._copied.synchronize()

    def write(self, directory: Path, abandoned: threading.Event) -> dict[Path, str]:
        """Write and fsync the files below `directory`; their hashes. Raises AbandonedError once `abandoned` is set."""
        if self._failure:
            raise self._failure
        self.wait()
        hashes = {}
        torch.serialization.set_crc32_options(False)  # slow, single-threaded; the file is hashed anyway
        for name, content in self._files:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with hashed_file(path, abandoned) as file:
                torch.save(content, cast(IO[bytes], file))
            hashes[path] = file.hash
        return hashes

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self._files.append((Path(path), self._copy_of(state_dict)))
        except (RuntimeError, MemoryError, OSError) as error:
            # raised later, by `write`: other ranks are in a collective now
            self._failure = error

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> None: ...

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def is_decoupled(self) -> bool:
        return False

    def _copy_of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(value.detach())
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy_of(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy_of(item) for item in value)
        return copy.deepcopy(value)
