"""The files of a corpus as it is distributed: plain, compressed, or inside a tar or zip archive, read in place."""

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from data.sources.line_reader import open_unpacked
from data.sources.record import SourceError
from data.sources.source import find_files

_ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file of a corpus: `place` is what a message calls it, `name` its path in the archive, or its name on disk. The
    stream is open until the next file is asked for."""

    place: str
    name: str
    stream: IO[bytes]


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus, read: `place` and `name` as of OpenFile."""

    place: str
    name: str
    content: bytes

    @property
    def stem(self) -> str:
        """Its name without folders and without what follows the first full stop."""
        return self.name.rsplit("/", 1)[-1].split(".", 1)[0]

    def text(self) -> str:
        """Its content as UTF-8 (a byte order mark goes). Raises SourceError naming the byte that is none."""
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{self.place}: byte {error.start} is not UTF-8; the file is damaged") from None


def find_corpus_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The file `path`, or what lies under the directory `path`: archives and, compressed or not, files so named."""
    return find_files(path, (*suffixes, *(f"{suffix}.gz" for suffix in suffixes), *_ARCHIVES), pattern="**/*")


def is_plain(path: Path) -> bool:
    """Whether a file's bytes are those of its records: not compressed, and no archive."""
    return path.suffix != ".gz" and not path.name.endswith(_ARCHIVES)


def read_corpus_files(paths: list[Path], suffixes: tuple[str, ...]) -> Iterator[CorpusFile]:
    """Every file with one of these suffixes, archives in their own order. Raises SourceError where one is damaged."""
    for path in paths:
        with damage_told(path):
            for file in open_corpus_files(path, suffixes):
                yield CorpusFile(file.place, file.name, file.stream.read())


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Raises SourceError naming the file where reading it fails inside the block."""
    try:
        yield
    except _DAMAGE as error:
        raise SourceError(f"{path}: cannot be read ({error}); the file is missing or damaged") from None


def open_corpus_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[OpenFile]:
    """The file itself, unpacked, or those of an archive with one of these suffixes; read them inside `damage_told`."""
    if not path.name.endswith(_ARCHIVES):
        with open_unpacked(path) as stream:
            yield OpenFile(str(path), path.name.removesuffix(".gz"), stream)
        return
    found = False
    for file in _members(path, suffixes):
        found = True
        yield file
    if not found:
        raise SourceError(f"{path}: an archive without any {' or '.join(suffixes)} file; is it of another corpus?")


def _members(path: Path, suffixes: tuple[str, ...]) -> Iterator[OpenFile]:
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(suffixes):
                    with archive.open(name) as stream:
                        yield OpenFile(f"{path}/{name}", name, stream)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and member.name.endswith(suffixes) else None
            if content is not None:
                yield OpenFile(f"{path}/{member.name}", member.name.removeprefix("./"), content)
