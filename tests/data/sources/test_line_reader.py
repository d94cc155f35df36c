"""Lines in parts: together every line once, in order, at its place and under its number; long lines are never held."""

import gzip
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sources.line_reader import MAX_LINE_BYTES, LineReader, LongLine, share
from data.sources.record import SourceError
from data.sources.source import read_lines

LINES = st.lists(st.sampled_from(["", " ", "x", "hé", "\u2028日本", "a\r", "long" * 9]), max_size=12)


def numbered(path: Path, part: int = 0, n_parts: int = 1) -> list[tuple[int, int, bytes]]:
    with open(path, "rb") as stream:
        reader = LineReader(stream, *share(path.stat().st_size, part, n_parts))
        return [(offset, reader.number, line) for offset, line in reader]


@given(lines=LINES, ends=st.booleans(), mark=st.booleans(), n_parts=st.integers(1, 40))
def test_parts_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: bool, mark: bool, n_parts: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "f.jsonl"
    content = ("\ufeff" * mark + "\n".join(lines) + "\n" * ends).encode()
    path.write_bytes(content)
    expected, offset = [], 0
    for number, line in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", content), start=1):
        shown = line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
        if shown.strip():
            expected.append((offset, number, shown))
        offset += len(line)
    assert [line for part in range(n_parts) for line in numbered(path, part, n_parts)] == expected
    zipped = path.with_name("f.jsonl.gz")
    zipped.write_bytes(gzip.compress(content))
    assert list(read_lines(path)) == list(read_lines(zipped)) == [(number, line) for _, number, line in expected]


def test_a_line_over_the_limit_is_told_by_its_length(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    longest = b"m" * MAX_LINE_BYTES
    path.write_bytes(b"a\n" + longest + b"\n" + b"n" * (6 * MAX_LINE_BYTES) + b"\nb\n" + longest + b"nn")
    tracemalloc.start()
    whole = []
    for _, line in read_lines(path):
        whole.append((line[:3].strip(), len(line), line.n_bytes if isinstance(line, LongLine) else None))
        del line
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole == [
        (b"a", 2, None),
        (b"mmm", MAX_LINE_BYTES + 1, None),
        (b"nnn", 2_000, 6 * MAX_LINE_BYTES),
        (b"b", 2, None),
        (b"mmm", 2_000, MAX_LINE_BYTES + 2),
    ]
    assert peak < 4 * MAX_LINE_BYTES
    for n_parts in (2, 3, 7):
        parts = [place for part in range(n_parts) for place in numbered(path, part, n_parts)]
        assert parts == numbered(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.jsonl: cannot be read"):
        list(read_lines(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 9)[:-9])
    with pytest.raises(SourceError, match="damaged"):
        list(read_lines(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(ValueError, match="part 3 of 3"):
        share(9, 3, 3)
