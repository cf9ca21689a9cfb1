"""Files that have a line of numbers for each device: diskstats and net/dev.

What stands in front of the numbers (the device) seldom changes: it is learned once,
checked at each read by removing it, and NumPy parses what is left in one go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from agent.table import COUNTER_MAX
from probes.procfs import integers

Cells = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

# Between the numbers of two lines when all are parsed at once, so that a line with a number
# too few or too many shows. No counter gets there; what does is parsed line by line.
_MARK = COUNTER_MAX - 1
_MARKED = b" %d " % _MARK
_DIGITS_AND_SPACES = b"0123456789 "


@dataclass(frozen=True, slots=True)
class RowForm:
    """What the lines of such a file look like.

    Attributes:
        split: the device's name and where the numbers start in a line; None for a
            heading and for a damaged line.
        fields: how many numbers of a line are wanted.
        knows: whether a line may have so many numbers; with another count nobody can
            say which is which, and they are unknown.
    """

    split: Callable[[bytes], tuple[bytes, int] | None]
    fields: int
    knows: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Rows:
    """The devices of a text and their numbers.

    Attributes:
        names: a name a row, none twice.
        cells: the numbers, shape (rows, fields of the form); 0 where unknown.
        unknown: shape of `cells`; None where every number is known.
    """

    names: list[bytes]
    cells: Cells
    unknown: Mask | None


@dataclass(frozen=True, slots=True)
class _Layout:
    """Of a text without damage: what precedes its lines, and the numbers of each line."""

    heading: bytes
    prefixes: list[bytes]
    removed_bytes: int
    width: int
    names: list[bytes]
    missing: Mask | None


class RowReader:
    """Parses such a text at each cycle; `names` is the same object while the devices are the same."""

    def __init__(self, form: RowForm) -> None:
        self._form = form
        self._layout: _Layout | None = None
        self._names: list[bytes] = []
        self._text: bytes | None = None
        self._rows: Rows

    def parse(self, text: bytes) -> Rows:
        """The rows of `text`, the same as `parse_rows` finds; the same object where the text is the one before."""
        if text != self._text:
            self._rows = self._parsed(text)
            self._text = text
        return self._rows

    def _parsed(self, text: bytes) -> Rows:
        if self._layout is not None:
            cells = self._parse_at_once(text, self._layout)
            if cells is not None:
                return Rows(self._layout.names, cells, self._layout.missing)
        rows, layout = _parse(text, self._form)
        if rows.names == self._names:
            rows = replace(rows, names=self._names)
        self._names = rows.names
        self._layout = None if layout is None else replace(layout, names=rows.names)
        return rows

    def _parse_at_once(self, text: bytes, layout: _Layout) -> Cells | None:
        """The cells of a text that has the learned layout, else None."""
        if not text.startswith(layout.heading) or not text.endswith(b"\n"):
            return None
        lines = text[len(layout.heading) : -1].split(b"\n")
        if len(lines) != len(layout.prefixes):
            return None
        numbers = _MARKED.join(map(bytes.removeprefix, lines, layout.prefixes)) + _MARKED
        # A line that begins with something else is still as long as it was.
        removed_bytes = len(text) + len(lines) * (len(_MARKED) - 1) - len(numbers)
        if removed_bytes != layout.removed_bytes or numbers.translate(None, _DIGITS_AND_SPACES):
            return None
        cells = np.fromstring(numbers, dtype=np.uint64, sep=" ")
        if len(cells) != len(lines) * (layout.width + 1):
            return None
        cells = cells.reshape(len(lines), layout.width + 1)
        if (cells[:, :-1] >= _MARK).any():
            return None
        if layout.missing is None:
            return cells[:, : self._form.fields]
        padded = np.zeros(layout.missing.shape, dtype=np.uint64)
        padded[:, : layout.width] = cells[:, :-1]
        return padded


def parse_rows(text: bytes, form: RowForm) -> Rows:
    """The rows of a text, line by line.

    A line that names no device is left out, as are one that repeats another's name and a
    last one without a line feed, which has been cut. A number that is none is unknown.
    """
    return _parse(text, form)[0]


def _parse(text: bytes, form: RowForm) -> tuple[Rows, _Layout | None]:
    """The rows, and the layout where no line is damaged and all have as many numbers."""
    rows: dict[bytes, list[int | None]] = {}
    prefixes: list[bytes] = []
    widths: set[int] = set()
    heading_bytes = 0
    *lines, cut = text.split(b"\n")
    intact = not cut
    for line in lines:
        found = form.split(line)
        if found is None or found[0] in rows:
            if rows:
                intact = False
            else:
                heading_bytes += len(line) + 1
            continue
        name, start = found
        words = line[start:].split()
        # Words behind the last that is wanted are a later kernel's numbers, or another line that ran into this one.
        whole = form.knows(len(words)) and all(word.isdigit() for word in words[form.fields :])
        rows[name] = integers(words[: form.fields]) if whole else []
        intact = intact and whole
        prefixes.append(line[:start])
        widths.add(len(words))
    cells, unknown = _as_arrays(list(rows.values()), form.fields)
    names = list(rows)
    layout = None
    if intact and len(widths) == 1:
        width = widths.pop()
        if unknown is None or not unknown[:, :width].any():
            layout = _Layout(
                heading=text[:heading_bytes],
                prefixes=prefixes,
                removed_bytes=heading_bytes + sum(map(len, prefixes)),
                width=width,
                names=names,
                missing=unknown,
            )
    return Rows(names, cells, unknown), layout


def _as_arrays(rows: list[list[int | None]], fields: int) -> tuple[Cells, Mask | None]:
    cells = np.zeros((len(rows), fields), dtype=np.uint64)
    unknown = np.ones(cells.shape, dtype=np.bool_)
    for row, numbers in enumerate(rows):
        for index, number in enumerate(numbers):
            if number is not None and number <= COUNTER_MAX:
                cells[row, index] = number
                unknown[row, index] = False
    return cells, unknown if unknown.any() else None
