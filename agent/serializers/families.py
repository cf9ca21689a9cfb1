"""Family and Source: what a table's columns are called where each value is a series of its own.

A naming (a module of `agent/serializers/names/`) turns a table's declaration into families; the
formats write those. So a name is said once, whichever format it ends up in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from agent.table import Kind, TableSpec

Label = tuple[str, str]
"""A label's or attribute's name, and its value or what its value is taken from."""


class Source(NamedTuple):
    """A column that gives a family one series for each row of its table.

    Attributes:
        column: its name in the table.
        labels: constant ones, beside those of the row.
        per: the shown values are divided by it.
        only: a key label and its value: other rows have no series of it.
    """

    column: str
    labels: tuple[Label, ...] = ()
    per: int = 1
    only: Label | None = None


class Family(NamedTuple):
    """Series of one name, kind and unit, all of one table.

    Attributes:
        name: as it is written; a counter's with all that belongs to it, such as `_total`.
        unit: as the naming writes units.
        sources: in the order in which their series are written.
        labels: the name of each key label that the series have, and the table's key label it is taken from.
        additive: gauges only: sums over the rows mean something (OpenTelemetry's UpDownCounter).
        untyped: the vocabulary doesn't say whether it is a counter.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    sources: tuple[Source, ...]
    labels: tuple[Label, ...] = ()
    additive: bool = False
    untyped: bool = False


Naming = Callable[[TableSpec, bool], list[Family]]
"""The families of a table; without those of derived columns where the second argument is False."""
