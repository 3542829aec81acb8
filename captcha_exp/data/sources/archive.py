"""Images in a zip or tar archive, which is not unpacked.

An archive is read from its start to its end: once for the names, hashes and tables, once for the images.
"""

import contextlib
import hashlib
import io
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from captcha_exp.data import images
from captcha_exp.data.images import MAX_FILE_BYTES, InvalidImage, too_large
from captcha_exp.data.sources.files import (
    TABLE_SUFFIXES,
    Content,
    Files,
    FolderFiles,
    Listing,
)
from captcha_exp.errors import UserError, one_line

SUFFIXES = ".zip, .tar, .tar.gz, .tar.bz2, .tar.xz"
MAX_RATIO = 200  # of the bytes in an archive to its own; images are compressed already
FREE_BYTES = 2**30  # that any archive may have in it
MAX_MEMBERS = 5_000_000


def open_files(path: Path) -> Files:
    """Return the files of a folder or an archive.

    Raises:
        UserError: the path is neither, or an archive is damaged or unreasonably large.
    """
    is_file = os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for names that are too long
    return ArchiveFiles(path) if is_file else FolderFiles(path)


@dataclass(frozen=True)
class _Member:
    """A member of an archive that is not a folder."""

    name: str
    problem: str  # why it cannot be read, if it cannot
    size: int  # in bytes, as the archive says
    open: Callable[[], IO[bytes] | None]


class ArchiveFiles:
    """A zip or tar archive."""

    def __init__(self, path: Path) -> None:
        """Read the names, hashes and tables; raises as `open_files`."""
        self.path = path
        self._listing = Listing()
        self._hashes: dict[str, str | InvalidImage] = {}
        self._tables: dict[str, bytes] = {}
        self._repeated: set[str] = set()
        for name, content in self._contents(lambda _: True):
            if self._listing.add(name, partial(_start_of, content)):
                self._hashes[name] = _sha256_of(content)
            elif PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES and isinstance(content, bytes):
                self._tables[name] = content
        self._listing.ignored += [f"{name} (another member of this name)" for name in self._repeated]
        self._listing.ignored.sort()

    def list(self) -> Listing:
        return self._listing

    def locate(self, named: str, table: Path) -> str | None:
        folder = self._relative(table.parent) if self.is_table(table) else ""
        for text in (named, named.replace("\\", "/")):  # Windows path separators
            for name in (posixpath.normpath(text), posixpath.normpath(posixpath.join(folder, text))):
                if name in self._hashes or name in self._listing.unreadable:
                    return name
        return None

    def open(self, table: Path) -> IO[bytes]:
        if self.is_table(table):
            return io.BytesIO(self._tables[self._relative(table)])
        return table.open("rb")  # beside the archive

    def is_table(self, table: Path) -> bool:
        return table.is_relative_to(self.path) and self._relative(table) in self._tables

    def sha256(self, name: str) -> str:
        digest = self._hashes.get(name, InvalidImage("is not in the archive"))
        if isinstance(digest, InvalidImage):
            raise digest
        return digest

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Content]]:
        wanted = set(names)
        for name, content in self._contents(lambda name: name in names):
            wanted.discard(name)
            yield name, content
        for name in sorted(wanted):
            yield name, InvalidImage("is not in the archive any more")

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def _contents(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Content]]:
        """Yield the names and contents of the wanted members, in their order, each name once.

        Members that are not read become `unreadable`.

        Raises:
            UserError: the archive is damaged, or unpacks to far more than itself, as an attack does.
        """
        seen: set[str] = set()
        total, limit = 0, max(FREE_BYTES, MAX_RATIO * self.path.stat().st_size)
        try:
            for member in self._open():
                total += member.size
                if total > limit or len(seen) >= MAX_MEMBERS:
                    raise UserError(
                        f"data.path={self.path}: unpacks to more than {limit / 2**30:,.0f} GiB or "
                        f"{MAX_MEMBERS:,} files; unpack what you trust of it into a folder"
                    )
                if member.problem:
                    self._listing.unreadable[member.name] = member.problem
                elif member.name in seen:  # the first one counts
                    self._repeated.add(member.name)
                elif is_wanted(member.name):
                    yield member.name, _read_member(member)
                seen.add(member.name)
        except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
            reason = one_line(error) or "it ends too early"
            raise UserError(f"data.path={self.path}: is a damaged archive: {reason}; make it again") from None
        except (NotImplementedError, RuntimeError) as error:
            raise UserError(f"data.path={self.path}: cannot be read: {one_line(error)}") from None

    def _open(self) -> Iterator[_Member]:
        if zipfile.is_zipfile(self.path):
            return _zip_members(self.path)
        with contextlib.suppress(OSError, EOFError, zlib.error, tarfile.TarError):
            if tarfile.is_tarfile(self.path):
                return _tar_members(self.path)
        if self.path.name.lower().endswith(tuple(SUFFIXES.split(", "))):
            raise UserError(
                f"data.path={self.path}: is a damaged archive: it is empty or ends too early; make it again"
            )
        raise UserError(f"data.path={self.path}: is neither a folder nor an archive ({SUFFIXES})")


def _start_of(content: Content) -> bytes:
    return content[: images.SIGNATURE_BYTES] if isinstance(content, bytes) else b""


def _sha256_of(content: Content) -> str | InvalidImage:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else content


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            problem, name = _check_name(info.filename), info.filename
            if info.flag_bits & 1:
                problem = "is encrypted; make the archive without a password"
            elif stat.S_ISLNK(info.external_attr >> 16):
                problem = "is a link in the archive, which is not followed"
            yield _Member(_normalize(name), problem, info.file_size, partial(archive.open, info))


def _tar_members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, "r|*") as archive:  # a stream: members are read in order
        for info in archive:
            if info.isdir():
                continue
            problem, name = _check_name(info.name), info.name
            if info.issym() or info.islnk():
                problem = "is a link in the archive, which is not followed"
            elif not info.isfile():
                problem = "is not a regular file"
            yield _Member(_normalize(name), problem, info.size, partial(archive.extractfile, info))


def _normalize(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _check_name(name: str) -> str:
    """Return why a member with this name is not read; "" if it is."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0]:
        return "has a path outside the archive"
    return ""


def _read_member(member: _Member) -> Content:
    """Return the content of a member; a tar archive that ends too early raises tarfile.ReadError."""
    try:
        file = member.open()
        assert file is not None  # a regular file
        with file:
            content = file.read(MAX_FILE_BYTES + 1)
    except (zlib.error, zipfile.BadZipFile, EOFError) as error:
        return InvalidImage(f"is damaged in the archive: {one_line(error)}")
    return too_large(len(content)) if len(content) > MAX_FILE_BYTES else content
