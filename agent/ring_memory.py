"""The memory of a ring's block: when its pages are taken, and whose they are."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np


def anonymous(size: int) -> mmap.mmap:
    """Memory whose pages are taken when they are first written, and count as the process's own.

    A ring that is emptied starts anew at its beginning, so a healthy sink's ring stays small.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, size)
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            block.madvise(mmap.MADV_NOHUGEPAGE)
    return block


def populate(block: memoryview, is_file: bool) -> None:
    """Takes all pages of a block now; its content stays."""
    pages = np.frombuffer(block, dtype=np.uint8)[:: mmap.PAGESIZE]
    if is_file:
        pages.sum()
    else:
        pages |= 0  # to read one would only map the page of zeros
