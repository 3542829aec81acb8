"""Pages of files in the memory of a process, which a fork does not map in the child.

A child gets the page tables of all memory that was written to, but those of program code and other mapped
files only when it touches them. Until then its resident memory is smaller than that of a new process which
has the same modules, by 100 MiB for torch and MLflow.
"""

import contextlib
import ctypes
import mmap
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

_PRESENT, _OF_FILE = 1 << 63, 1 << 61  # bits of an entry of /proc/self/pagemap
_ENTRY_BYTES = 8
_MADV_POPULATE_READ = 22


def find_file_pages() -> list[tuple[int, int]]:
    """Return address and length of the pages of files in memory; empty where the kernel hides them."""
    pages: list[tuple[int, int]] = []
    with contextlib.suppress(OSError), Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for begin, end in _mapped_files():
            pagemap.seek(begin // mmap.PAGESIZE * _ENTRY_BYTES)
            entries = array("Q", pagemap.read((end - begin) // mmap.PAGESIZE * _ENTRY_BYTES))
            for number, entry in enumerate(entries):
                if not (entry & _PRESENT and entry & _OF_FILE):
                    continue
                address = begin + number * mmap.PAGESIZE
                if pages and sum(pages[-1]) == address:
                    pages[-1] = pages[-1][0], pages[-1][1] + mmap.PAGESIZE
                else:
                    pages.append((address, mmap.PAGESIZE))
    return pages


def _mapped_files() -> Iterator[tuple[int, int]]:
    """Yield the addresses of each mapping of a file."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            yield begin, end


def map_pages(pages: Iterable[tuple[int, int]]) -> None:
    """Map these pages in this process without reading them; does nothing before Linux 5.14."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for address, length in pages:
        madvise(address, length, _MADV_POPULATE_READ)
