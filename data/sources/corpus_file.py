"""The files of a corpus as it is distributed: plain, compressed, or inside a tar or zip archive, read in place."""

import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.sources.source import SourceError, find_files

_ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar", ".zip")
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus: `place` is what a message calls it, `name` its path in the archive, or its name on disk."""

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
    return find_files(path, (*_ARCHIVES, *suffixes, *(f"{suffix}.gz" for suffix in suffixes)), pattern="**/*")


def read_corpus_files(paths: list[Path], suffixes: tuple[str, ...]) -> Iterator[CorpusFile]:
    """Every file with one of these suffixes, archives in their own order. Raises SourceError where one is damaged."""
    for path in paths:
        found = False
        try:
            for file in _files_of(path, suffixes):
                found = True
                yield file
        except _DAMAGE as error:
            raise SourceError(f"{path}: cannot be read ({error}); the file is missing or damaged") from None
        if not found:
            raise SourceError(f"{path}: an archive without any {' or '.join(suffixes)} file; is it of another corpus?")


def _files_of(path: Path, suffixes: tuple[str, ...]) -> Iterator[CorpusFile]:
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(suffixes):
                    yield CorpusFile(f"{path}/{name}", name, archive.read(name))
    elif path.name.endswith(_ARCHIVES):
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() and member.name.endswith(suffixes) else None
                if stream is not None:
                    yield CorpusFile(f"{path}/{member.name}", member.name.removeprefix("./"), stream.read())
    else:
        content = path.read_bytes()
        is_compressed = path.suffix == ".gz"
        name = path.name.removesuffix(".gz")
        yield CorpusFile(str(path), name, gzip.decompress(content) if is_compressed else content)
