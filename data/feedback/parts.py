"""Partitions a log on disk by user, so that memory is that of one part however long the log is."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from data.clean.stable_hash import stable_hash


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log and its place; `order` is the sort key of its user."""

    order: tuple[int, str]
    file: str
    number: int
    content: bytes


class UserParts:
    """The lines of a log by user, as a context manager: first `add` all lines, then read the `users` of each part."""

    def __init__(self, directory: Path, n_parts: int) -> None:
        self._directory, self._n_parts = directory, n_parts

    def __enter__(self) -> "UserParts":
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir()
        with ExitStack() as opened:
            self._files = [opened.enter_context(open(self._path(part), "wb")) for part in range(self._n_parts)]
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self._directory / f"{part:03d}"

    def add(self, user: str, file_number: int, number: int, content: bytes) -> None:
        """Append a line, with user and place, to the user's part."""
        part = _order(user)[0] * self._n_parts >> 64
        fields = (json.dumps(user).encode(), file_number, number, content.rstrip(b"\r\n"))
        self._files[part].write(b"%s\t%d\t%d\t%s\n" % fields)

    def users(self, part: int, files: Sequence[Path]) -> Iterator[tuple[str, list[Line]]]:
        """The users of a part with their lines, in an order that does not depend on the number of parts."""
        self._files[part].close()
        lines = []
        with open(self._path(part), "rb") as file:
            for stored in file:
                user, file_number, number, content = stored.rstrip(b"\n").split(b"\t", 3)
                lines.append(Line(_order(json.loads(user)), str(files[int(file_number)]), int(number), content))
        lines.sort(key=_order_of)  # stable: a user's lines stay in log order
        for (_, name), group in groupby(lines, key=_order_of):
            yield name, list(group)
        self._path(part).unlink()


def user_of(record: dict[str, Any]) -> str:
    """The user of a record, or "" if it names none, which is not a valid event."""
    user = record.get("user")
    return user if isinstance(user, str) else ""


def _order(user: str) -> tuple[int, str]:
    return stable_hash("feedback", user), user


def _order_of(line: Line) -> tuple[int, str]:
    return line.order
