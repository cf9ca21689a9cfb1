"""The metrics reference, derived from the tables' declarations: one function a format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from agent.serializers.document import key_of
from agent.serializers.families import Naming
from agent.serializers.names import hostprobe, node_exporter, opentelemetry
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
        parts.append(f"| column | {' | '.join(_NAMES)} |\n|---{'|---' * len(_NAMES)}|")
        named = [of(spec) for of in _NAMES.values()]
        for column in spec.columns:
            cells = [f"`{column.name}`", *(names.get(column.name, "") for names in named)]
            parts[-1] += f"\n| {' | '.join(cells)} |"
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
tell is null, never 0, and left out where a format has no null.

JSON and MessagePack call columns as they stand here, below the name of their table. The second list of each table
has the names of the other formats, with the labels that the series have. `names = "node_exporter"` gives those that
stand below node_exporter, and Prometheus' for all others; remote write has the same as Prometheus. Influx: measurement,
tags and field. Graphite and StatsD: behind `hostprobe.HOST.`; DogStatsD has `hostprobe.TABLE.COLUMN`, and labels as
tags. More in [formats.md](formats.md)."""


def _by(naming: Naming) -> Callable[[TableSpec], dict[str, str]]:
    """What a naming calls each column: its series with their labels, those of the row without a value."""

    def names(spec: TableSpec) -> dict[str, str]:
        found: dict[str, str] = {}
        for family in naming(spec, True):
            for source in family.sources:
                labels = [name for name, _ in family.labels] + [f'{name}="{value}"' for name, value in source.labels]
                series = f"`{family.name}{{{','.join(labels)}}}`" if labels else f"`{family.name}`"
                found[source.column] = f"{found[source.column]} {series}" if source.column in found else series
        return found

    return names


def _by_path(spec: TableSpec) -> dict[str, str]:
    path = ".".join([spec.name, *(label.upper() for label in spec.labels)])
    return {column.name: f"`{path}.{column.name}`" for column in spec.columns}


def _by_field(spec: TableSpec) -> dict[str, str]:
    return {column.name: f"`{','.join((spec.name, *spec.labels))} {column.name}`" for column in spec.columns}


_NAMES: dict[str, Callable[[TableSpec], dict[str, str]]] = {
    "Prometheus": _by(hostprobe.families),
    "node_exporter": lambda spec: {
        column: name for column, name in _by(node_exporter.families)(spec).items() if name.startswith("`node_")
    },
    "OpenTelemetry": _by(opentelemetry.families),
    "Influx": _by_field,
    "Graphite, StatsD": _by_path,
}


def _kind(column: Column) -> str:
    return f"{column.kind.value}, derived" if column.derived else column.kind.value
