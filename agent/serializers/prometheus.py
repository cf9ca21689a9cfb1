"""Prometheus' text exposition 0.0.4, and OpenMetrics 1.0.

A payload is a state: it tells also of the tables whose probes weren't due in its cycle. What is unknown is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from agent.serializers.document import Identity
from agent.serializers.families import Family
from agent.serializers.formats import Names
from agent.serializers.names import naming
from agent.serializers.rows import Rows, expression, tuple_of
from agent.serializers.series import Block, Group, SeriesSerializer, by_column, plain, told_apart
from agent.table import Kind, Labels, Table, TableSpec

_TOTAL = "_total"


class PrometheusSerializer(SeriesSerializer):
    """Writes frames as text exposition 0.0.4: HELP, TYPE and samples, family by family.

    Args:
        specs: the tables that may come.
        identity: its tags are labels of every sample.
        rates: whether derived columns are written.
        names: whose names the metrics have.
    """

    is_state = True

    def __init__(
        self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True, names: Names = "hostprobe"
    ) -> None:
        self._families = naming(names)
        self.has_uname = names == "node_exporter"
        super().__init__(specs, identity, rates)

    def block(self, spec: TableSpec) -> Block:
        families = self._families(spec, self._rates)
        columns = {column.name: column for column in spec.columns}
        sources = [source for family in families for source in family.sources]

        def result(guarded: bool) -> str:
            return tuple_of([expression(spec, columns[s.column], s.per, guarded=guarded, only=s.only) for s in sources])

        rows = Rows(result)

        def values(table: Table, previous: Table | None) -> list[float | None]:
            return by_column(rows.of(table))

        return Block(values, lambda labels: self._groups(spec, families, labels))

    def _groups(self, spec: TableSpec, families: Sequence[Family], labels: Sequence[Labels]) -> Iterable[Group]:
        tags = {label_name(name): value for name, value in self._identity.tags.items()}
        repeats = told_apart(labels)
        for form, same in groupby(families, key=lambda family: family.labels):
            places = [(name, spec.labels.index(label)) for name, label in form]
            pairs = [
                tags | {name: plain(row[place]) for name, place in places} | repeat
                for row, repeat in zip(labels, repeats, strict=True)
            ]
            shown = [label_text(pair) for pair in pairs]
            for family in same:
                name = self.sample_name(family)
                cells = []
                for source in family.sources:
                    texts = [label_text(pair | dict(source.labels)) for pair in pairs] if source.labels else shown
                    cells += [(f"{name}{text} ".encode(), b"\n") for text in texts]
                yield Group(self.header(family).encode(), cells)

    def sample_name(self, family: Family) -> str:
        """The name in front of a family's samples."""
        return family.name

    def header(self, family: Family) -> str:
        """The lines before a family's first sample."""
        kind = "untyped" if family.untyped else family.kind.value
        return f"# HELP {family.name} {_escaped(family.help)}\n# TYPE {family.name} {kind}\n"


class OpenMetricsSerializer(PrometheusSerializer):
    """Writes frames as OpenMetrics 1.0: a counter's family is named without `_total`, and the text ends with EOF."""

    end = b"\n# EOF"

    def header(self, family: Family) -> str:
        if family.untyped or (family.kind is Kind.COUNTER and not family.name.endswith(_TOTAL)):
            name, kind = family.name, "unknown"
        else:
            name, kind = family.name.removesuffix(_TOTAL), family.kind.value
        return f"# TYPE {name} {kind}\n# HELP {name} {escaped(family.help)}\n"


def label_text(labels: dict[str, str]) -> str:
    """Labels as they stand behind a name; nothing where there are none."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{escaped(value)}"' for name, value in labels.items()) + "}"


def label_name(tag: str) -> str:
    """A tag's name with what a label's may not have replaced by underscores; two at its start are Prometheus' own."""
    name = re.sub("^__+", "_", re.sub("[^a-zA-Z0-9_]", "_", tag))
    return f"_{name}" if name[:1].isdigit() or not name else name


def escaped(text: str) -> str:
    """A text as it stands between quotes."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escaped(help: str) -> str:
    return help.replace("\\", "\\\\").replace("\n", "\\n")
