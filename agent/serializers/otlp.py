"""OTLP metrics: an ExportMetricsServiceRequest. Several in a row are one with the resources of all.

Counters are cumulative monotonic sums. They began at the host's boot, the agent's own at its start; those of a row that
came later, or whose value fell, with the frame before. The names are those of names/opentelemetry.py.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from agent import __version__
from agent.extras import needed
from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.casts import CastBlock, CastSerializer, Layout, Point
from agent.serializers.document import Identity
from agent.serializers.families import Family, Label
from agent.serializers.frame_tables import FRAME
from agent.serializers.names import opentelemetry
from agent.serializers.series import plain, told_apart
from agent.table import Kind, Labels, TableSpec

Series = tuple[Labels, str, tuple[Label, ...]]
"""One of a table's: its row, its name, and what it has beside the row's labels."""

_OWN_TABLES = ("agent", "agent_probe", "agent_sink")
_PACKAGE = "opentelemetry.proto"
_NEEDS = "the format otlp needs opentelemetry-proto"
# Before a point's value are a tag, the 8 bytes of its time, a tag, and in sums those of its start and a tag.
_TIME_BEFORE = 9
_START_BEFORE = 18
_TIME_MARK = 0x4D4D4D4D4D4D4D4D
_CUMULATIVE = 2  # AggregationTemporality of metrics.proto


class OtlpSerializer(CastSerializer):
    """Writes frames as OTLP.

    Args:
        specs: the tables that may come.
        identity: the host and the run are attributes of the resource, and so are the tags.
        rates: whether derived columns are written.
    """

    only_int64 = True

    def __init__(self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True) -> None:
        needed("google.protobuf.message", "otlp", "the format otlp needs protobuf")
        self._metrics = needed(f"{_PACKAGE}.metrics.v1.metrics_pb2", "otlp", _NEEDS)
        self._service = needed(f"{_PACKAGE}.collector.metrics.v1.metrics_service_pb2", "otlp", _NEEDS)
        self._identity = identity
        self._starts: dict[str, dict[Labels, int]] = {}  # of the rows of each table
        self._held: dict[str, dict[Series, tuple[int, int]]] = {}  # of each table's counters their starts and bits
        self._time_unix_ns = 0
        self._time_before_unix_ns = 0
        self._sums: _Sums | None = None
        super().__init__(specs, identity, rates, opentelemetry.families)

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        if frame.time_unix_ns != self._time_unix_ns:
            self._time_before_unix_ns, self._time_unix_ns = self._time_unix_ns, frame.time_unix_ns
            if self._time_unix_ns < self._time_before_unix_ns:
                self._set_back(self._time_unix_ns)
        super().write(frame, buffer, tables, left_out)

    def letter(self, point: Point) -> str:
        return "q" if point.is_integer else "d"

    def around(self, texts: Sequence[bytes]) -> tuple[bytes, bytes]:
        """The request, its one resource, and the scope around all metrics, as the library writes them."""
        request = self._service.ExportMetricsServiceRequest()
        resource = request.resource_metrics.add(schema_url=opentelemetry.SCHEMA_URL)
        identity = self._identity
        attributes = {
            **identity.tags,
            "host.name": identity.host,
            "os.type": platform.system().lower(),
            "service.name": "hostprobe",
            "service.instance.id": identity.instance,
            "service.version": __version__,
        }
        for name, value in attributes.items():
            resource.resource.attributes.add(key=name).value.string_value = value
        scope = resource.scope_metrics.add(schema_url=opentelemetry.SCHEMA_URL)
        scope.scope.name, scope.scope.version = "hostprobe", __version__
        for text in texts:
            scope.MergeFromString(text)
        before, _, behind = request.SerializeToString().partition(b"".join(texts))
        return before, behind

    def cast(self, block: CastBlock, labels: Sequence[Labels], points: Sequence[Point], form: int) -> bytes:
        scope = self._metrics.ScopeMetrics()
        spec = block.spec
        keys = () if spec is FRAME else spec.labels  # its labels are attributes of the resource
        attributes = [
            [*zip(keys, map(plain, row), strict=False), *repeat.items()]
            for row, repeat in zip(labels, told_apart(labels), strict=True)
        ]
        self._note_rows(spec.name, labels)
        family = None
        for point in points:
            if point.family is not family:
                family = point.family
                data = _data(scope.metrics.add(name=family.name, unit=family.unit, description=family.help), family)
                renamed = {label: name for name, label in family.labels}
            value = data.data_points.add(time_unix_nano=_TIME_MARK)
            if _is_sum(family):
                value.start_time_unix_nano = _TIME_MARK
            mark = int.from_bytes(point.mark, "little")
            if point.is_integer:
                value.as_int = mark
            else:
                value.as_double = np.uint64(mark).view(np.float64)
            for label, held in attributes[point.row]:
                name = renamed.get(label, label)
                _put(value.attributes.add(key=name).value, name, held)
            for name, held in point.source.labels:
                _put(value.attributes.add(key=name).value, name, held)
        text: bytes = scope.SerializeToString()
        return text

    def stamp(self, data: npt.NDArray[np.uint8], layout: Layout, frame: Frame, bits: npt.NDArray[np.int64]) -> None:
        if self._sums is None or self._sums.layout is not layout:
            if self._sums is not None:
                self._keep(self._sums)
            self._sums = _Sums(layout, bits, self._starts, self._held)
        sums = self._sums
        fell = sums.is_monotonic & (bits < sums.bits)  # floats above 0 compare as their bits do
        if fell.any():
            sums.starts[fell[sums.indexes]] = self._time_before_unix_ns
        sums.bits = bits
        data[sums.time_slots] = np.array([frame.time_unix_ns], dtype="<i8").view(np.uint8)
        data[sums.start_slots] = sums.starts.view(np.uint8).reshape(-1, 8)

    def _note_rows(self, name: str, labels: Sequence[Labels]) -> None:
        """Rows that are there at a table's first time began with the host or the agent, later ones just now."""
        held = self._starts.get(name)
        began = self._time_before_unix_ns
        if held is None:
            held = {}
            began = self._identity.started_unix_ns if name in _OWN_TABLES else self._identity.boot_unix_ns or 0
            began = min(began, self._time_unix_ns)
        self._starts[name] = {row: held.get(row, began) for row in labels}

    def _set_back(self, time_unix_ns: int) -> None:
        """The clock was set back: what would have begun in the future began now, and keeps that start."""
        self._time_before_unix_ns = time_unix_ns
        if self._sums is not None:
            np.minimum(self._sums.starts, time_unix_ns, out=self._sums.starts)
        for rows in self._starts.values():
            rows |= {row: min(began, time_unix_ns) for row, began in rows.items()}
        for name, held in self._held.items():
            self._held[name] = {series: (min(began, time_unix_ns), bits) for series, (began, bits) in held.items()}

    def _keep(self, sums: _Sums) -> None:
        """Keeps what the next layouts may have again, but of no row that has gone."""
        bits, starts = sums.bits.tolist(), sums.starts.tolist()
        for place, index in enumerate(sums.indexes.tolist()):
            name, series = sums.series[index]
            self._held.setdefault(name, {})[series] = starts[place], bits[index]
        for name, held in self._held.items():
            rows = self._starts[name]
            self._held[name] = {series: kept for series, kept in held.items() if series[0] in rows}


class _Sums:
    """When the sums of a layout began.

    Attributes:
        bits: (n,) those of all values when they were last known.
        is_monotonic: (n,) which of the values are counters.
        indexes: (s,) which are sums.
        starts: (s,) int64, ns since 1970; 0 where unknown.
        time_slots, start_slots: (n, 8) and (s, 8) their bytes in the text.
        series: the table of each value, and which it is in it.
    """

    def __init__(
        self,
        layout: Layout,
        bits: npt.NDArray[np.int64],
        starts: Mapping[str, Mapping[Labels, int]],
        held: Mapping[str, Mapping[Series, tuple[int, int]]],
    ) -> None:
        self.layout = layout
        self.bits = bits.copy()
        families = [point.family for _, point, _ in layout.points]
        self.series = [(name, (row, point.family.name, point.source.labels)) for name, point, row in layout.points]
        self.is_monotonic = np.array([family.kind is Kind.COUNTER for family in families])
        self.indexes = np.flatnonzero([_is_sum(family) for family in families])
        self.starts = np.zeros(len(self.indexes), dtype="<i8")
        for place, index in enumerate(self.indexes.tolist()):
            name, series = self.series[index]
            began = starts[name][series[0]], self.bits[index]
            self.starts[place], self.bits[index] = held.get(name, {}).get(series, began)
        self.time_slots = layout.slots - _TIME_BEFORE
        self.start_slots = layout.slots[self.indexes] - _START_BEFORE


def _is_sum(family: Family) -> bool:
    return family.kind is Kind.COUNTER or family.additive


def _data(metric: Any, family: Family) -> Any:
    """The part of a metric that takes its points."""
    if not _is_sum(family):
        return metric.gauge
    metric.sum.aggregation_temporality = _CUMULATIVE
    metric.sum.is_monotonic = family.kind is Kind.COUNTER
    return metric.sum


def _put(value: Any, name: str, text: str) -> None:
    if name in opentelemetry.INTEGERS and text.isdecimal():
        value.int_value = int(text)
    else:
        value.string_value = text
