"""The files of a source of labeled images: those of a folder, or of an archive (`archive`)."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Protocol, TypeAlias

from captcha_exp.data import images
from captcha_exp.data.images import InvalidImage, read_bytes
from captcha_exp.errors import UserError
from captcha_exp.runtime.paths import root_dir

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

Content: TypeAlias = bytes | InvalidImage
"""what is in a file, or why it cannot be read"""


@dataclass
class Listing:
    """The names of the files of a source, relative to it, with /."""

    images: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  # not images; folders end in /
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason

    def add(self, name: str, read_start: Callable[[], bytes]) -> bool:
        """Add a file to the images if its name, or without an image suffix its start, is that of one."""
        is_image = images.is_image_name(name) or (
            not PurePosixPath(name).name.startswith(".") and images.has_signature(read_start())
        )
        (self.images if is_image else self.ignored).append(name)
        return is_image


def unwrap(content: Content) -> bytes:
    """Return the content of a file.

    Raises:
        InvalidImage: it cannot be read.
    """
    if isinstance(content, InvalidImage):
        raise content
    return content


class ImageFiles(Protocol):
    """Files that are read by name."""

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file.

        Raises:
            InvalidImage: the file cannot be read.
        """
        ...

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Content]]:
        """Yield the name and the content of each of these files, in any order."""
        ...


class Files(ImageFiles, Protocol):
    """A folder or an archive with images and tables."""

    path: Path

    def list(self) -> Listing:
        """List the files."""
        ...

    def locate(self, named: str, table: Path) -> str | None:
        """Return the name of the file that a table names: relative to the source or the table, or absolute.

        None if there is none.
        """
        ...

    def open(self, table: Path) -> IO[bytes]:
        """Open a table, which for an archive is its path followed by the name of a member."""
        ...

    def is_table(self, table: Path) -> bool:
        """Return whether a table exists."""
        ...


class FolderFiles:
    """A folder with its subfolders."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def list(self) -> Listing:
        """List the files; links to folders are not followed.

        Raises:
            UserError: the folder cannot be read.
        """
        found = Listing()
        output_dirs = {root_dir() / "outputs", root_dir() / "mlruns"}  # inside the folder with data.path=.

        def on_error(error: OSError) -> None:
            if Path(error.filename) == self.path:
                raise UserError(f"data.path={self.path}: cannot be read as a folder: {error.strerror}")
            reason = f"is a folder that cannot be read: {error.strerror}"
            found.unreadable[self._relative(Path(error.filename))] = reason

        for parent, subfolders, files in os.walk(self.path, onerror=on_error):
            here = Path(parent)
            for name in list(subfolders):
                if (here / name).is_symlink():
                    reason = "is a symbolic link to a folder, which is not followed"
                    found.unreadable[self._relative(here / name)] = reason
                    subfolders.remove(name)
                elif name.startswith(".") or here / name in output_dirs:
                    found.ignored.append(self._relative(here / name) + "/")
                    subfolders.remove(name)
            for name in files:
                found.add(self._relative(here / name), partial(_read_start, here / name))
        found.ignored.sort()
        return found

    def locate(self, named: str, table: Path) -> str | None:
        for text in (named, named.replace("\\", "/")):  # Windows path separators
            name = PurePosixPath(text)
            is_inside = not name.is_absolute() and name.parts and ".." not in name.parts
            if is_inside and os.path.lexists(self.path / name):
                return name.as_posix()
            for path in (self.path / text, table.parent / text):
                try:
                    path = Path(os.path.realpath(path.parent), path.name)  # a link to an image keeps its name
                except ValueError:  # a NUL in the name
                    break
                if path != self.path and path.is_relative_to(self.path) and os.path.lexists(path):
                    return self._relative(path)
        return None

    def open(self, table: Path) -> IO[bytes]:
        return table.open("rb")

    def is_table(self, table: Path) -> bool:
        return table.is_file()

    def sha256(self, name: str) -> str:
        return hashlib.sha256(read_bytes(self.path / name)).hexdigest()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Content]]:
        for name in names:
            try:
                yield name, read_bytes(self.path / name)
            except InvalidImage as reason:
                yield name, reason

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()


def joined_name(number: int, name: str) -> str:
    """Return the name in several folders of a file of one of them."""
    return f"{number}/{name}"


def folder_number(name: str) -> int:
    """Return the number of the folder that a file of several folders is in."""
    return int(name.partition("/")[0])


class JoinedFiles:
    """Several folders or archives; the name of a file begins with the number of its folder, from 1."""

    def __init__(self, folders: Sequence[Files]) -> None:
        self._folders = folders

    def sha256(self, name: str) -> str:
        return self._folders[folder_number(name) - 1].sha256(name.partition("/")[2])

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Content]]:
        by_folder: dict[int, list[str]] = defaultdict(list)
        for name in names:
            by_folder[folder_number(name)].append(name.partition("/")[2])
        for number, inside in by_folder.items():
            for name, content in self._folders[number - 1].read(inside):
                yield joined_name(number, name), content


def _read_start(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe might block
            return b""
        with path.open("rb") as file:
            return file.read(images.SIGNATURE_BYTES)
    except OSError:
        return b""
