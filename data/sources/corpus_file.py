"""The files of a corpus as distributed: plain, compressed, or in a tar or zip archive, read without unpacking to
disk."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data.sources.folder_files import ARCHIVES, find_files, has_suffix, is_hidden
from data.sources.line_reader import open_unpacked
from data.sources.record import SourceError

MAX_PACKED_BYTES = 1 << 30  # limit for packed files that are read whole (zip bombs)
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of a corpus: `place` is its name in messages, `name` its path in the archive or its name on disk. The
    stream is valid until the next file is requested."""

    place: str
    name: str
    stream: IO[bytes]
    is_packed: bool

    def read(self) -> "CorpusFile":
        """The content of the file. Raises SourceError if it unpacks to more than MAX_PACKED_BYTES."""
        content = self.stream.read(MAX_PACKED_BYTES + 1 if self.is_packed else -1)
        if self.is_packed and len(content) > MAX_PACKED_BYTES:
            raise SourceError(
                f"{self.place}: more than {MAX_PACKED_BYTES:,} bytes unpacked; unpack the file, or remove it if it is "
                "not part of the corpus"
            )
        return CorpusFile(self.place, self.name, content)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """The content of a file of a corpus; `place` and `name` as in OpenFile."""

    place: str
    name: str
    content: bytes

    @property
    def stem(self) -> str:
        """Its name without folders and suffixes."""
        return self.name.rsplit("/", 1)[-1].split(".", 1)[0]

    def text(self) -> str:
        """Its content as UTF-8 without byte order mark. An invalid byte becomes a lone surrogate, which dialogues
        reject, so that only the record with the byte is rejected."""
        return self.content.decode("utf-8-sig", "surrogateescape")


def find_corpus_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path`, or the archives and matching files (compressed or not) below the directory `path`."""
    return find_files(path, (*suffixes, *(f"{suffix}.gz" for suffix in suffixes), *ARCHIVES), pattern="**/*")


def is_plain(path: Path) -> bool:
    """Whether the file's bytes are its records: not compressed and not an archive."""
    return path.suffix.lower() != ".gz" and not has_suffix(path.name, ARCHIVES)


def read_corpus_files(paths: list[Path], suffixes: tuple[str, ...]) -> Iterator[CorpusFile]:
    """Every file with one of these suffixes, in the order of each archive. Raises SourceError for a file that is
    damaged or unpacks to more than MAX_PACKED_BYTES."""
    for path in paths:
        with as_source_error(path):
            for file in open_corpus_files(path, suffixes):
                yield file.read()


@contextmanager
def as_source_error(path: Path) -> Iterator[None]:
    """Raise SourceError that names the file if reading it fails inside the block."""
    try:
        yield
    except _DAMAGE as error:
        raise SourceError(f"{path}: cannot be read ({error}); the file is missing or damaged") from None


def open_corpus_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[OpenFile]:
    """The unpacked file, or the files of an archive with one of these suffixes; read them inside `as_source_error`."""
    if not has_suffix(path.name, ARCHIVES):
        with open_unpacked(path) as stream:
            name = path.stem if path.suffix.lower() == ".gz" else path.name
            yield OpenFile(str(path), name, stream, not is_plain(path))
        return
    found = False
    for file in _members(path, suffixes):
        found = True
        yield file
    if not found:
        raise SourceError(f"{path}: an archive without any {' or '.join(suffixes)} file; is it another corpus?")


def _members(path: Path, suffixes: tuple[str, ...]) -> Iterator[OpenFile]:
    if has_suffix(path.name, (".zip",)):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _is_wanted(name, suffixes):
                    with archive.open(name) as stream:
                        yield OpenFile(f"{path}/{name}", name, stream, True)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            is_wanted = member.isfile() and _is_wanted(member.name, suffixes)
            content = archive.extractfile(member) if is_wanted else None
            if content is not None:
                yield OpenFile(f"{path}/{member.name}", member.name.removeprefix("./"), content, True)


def _is_wanted(member: str, suffixes: tuple[str, ...]) -> bool:
    return has_suffix(member, suffixes) and not is_hidden(member)  # macOS archives hold a ._a.jsonl for each a.jsonl
