"""The metrics reference, derived from the tables' declarations: one function a format."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from agent.serializers.json_lines import key_of
from agent.table import Column, TableSpec


def text(specs: Sequence[TableSpec]) -> str:
    """A line a column, for grep: its full name, kind, unit and help."""
    rows = [(f"{spec.name}.{c.name}", c.kind.value, c.unit, c.help) for spec in specs for c in spec.columns]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def markdown(specs: Sequence[TableSpec]) -> str:
    """docs/metrics.md."""
    parts = [_HEAD]
    for spec in specs:
        shape = f"A row for each {' '.join(f'`{label}`' for label in spec.labels)}." if spec.labels else "One object."
        if key_of(spec) != spec.name:
            shape += f" In a JSON line its key is `{key_of(spec)}`."
        parts.append(f"## {spec.name}\n\n{spec.help} {shape}\n\n| column | kind | unit | meaning |\n|---|---|---|---|")
        parts[-1] += "".join(f"\n| `{c.name}` | {_kind(c)} | {c.unit} | {c.help} |" for c in spec.columns)
    return "\n\n".join(parts)


def json(specs: Sequence[TableSpec]) -> str:
    """An array of tables with their columns."""
    tables = [
        {
            "table": spec.name,
            "help": spec.help,
            "labels": spec.labels,
            "optional": sorted(spec.optional),
            "columns": [
                {"name": c.name, "kind": c.kind, "unit": c.unit, "derived": c.derived, "help": c.help}
                for c in spec.columns
            ],
        }
        for spec in specs
    ]
    return msgspec.json.format(msgspec.json.encode(tables), indent=2).decode()


_HEAD = """# Metrics

Written by `hostprobe metrics --format markdown` from the declarations in the code.

Counters only grow while the host runs, and are the kernel's own figures in base units. Gauges are values of
the moment. Derived ones (rates and ratios) are computed from this frame and the one before, and are left out with
`agent.rates = false`; where a counter fell, or there is no frame before, they are null. What the host does not
tell is null, never 0."""


def _kind(column: Column) -> str:
    return f"{column.kind.value}, derived" if column.derived else column.kind.value
