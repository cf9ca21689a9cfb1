"""hostprobe's own names in the style of Prometheus: `hostprobe_<table>_<column>`, key labels as labels."""

from __future__ import annotations

from agent.serializers.families import Family, Source
from agent.table import Column, TableSpec

PREFIX = "hostprobe"

# Every target of Prometheus has a label of this name already.
_LABELS = {"instance": "run"}
# `_count` is the end of a histogram's names.
_COLUMNS = {"logical_count": "logical_cpus"}
# Its name would be that of agent_probe.failures_total, whose sum it is.
_UNNAMED = {("agent", "probe_failures_total")}


def families(spec: TableSpec, rates: bool) -> list[Family]:
    """One family a column, by its own name."""
    return [
        family(spec, column)
        for column in spec.columns
        if (rates or not column.derived) and (spec.name, column.name) not in _UNNAMED
    ]


def family(spec: TableSpec, column: Column) -> Family:
    """A column by its own name."""
    labels = tuple((_LABELS.get(label, label), label) for label in spec.labels)
    name = f"{PREFIX}_{spec.name}_{_COLUMNS.get(column.name, column.name)}"
    return Family(name, column.kind, column.unit, column.help, (Source(column.name),), labels)
