"""Prometheus remote write 1.0: a WriteRequest, not yet compressed. Several in a row are one with the series of all.

Each sample has the frame's time. The labels `job` (hostprobe) and `instance` (the host) stand in for those that
Prometheus gives to a target that it scrapes. A series that was there and isn't any more, though its table is, has a
staleness marker as its last sample.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from agent.extras import needed
from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.casts import CastBlock, CastSerializer, Layout, Point
from agent.serializers.document import Identity
from agent.serializers.formats import Names
from agent.serializers.names import naming
from agent.serializers.prometheus import label_name
from agent.serializers.series import plain, told_apart
from agent.table import Labels, TableSpec

_Pairs = tuple[tuple[str, str], ...]  # a series' labels, sorted by name

_DOUBLE = struct.Struct("<d")
_STALE = struct.pack("<Q", 0x7FF0000000000002)  # StaleNaN of prometheus/model/value; no NaN is sure to keep its bits
_STALE_MARK = os.urandom(7) + b"\x41"  # stands for it: nobody can put it into a label beforehand
_LONGEST = 10  # bytes of a varint: negative numbers have so many
_PACKAGE = "prometheus"
_NEEDS = "the format remote_write needs protobuf"
# Of prometheus/prompb/remote.proto and types.proto: (number, name, type, repeated, message).
_MESSAGES: dict[str, tuple[tuple[int, str, str, bool, str], ...]] = {
    "Label": ((1, "name", "STRING", False, ""), (2, "value", "STRING", False, "")),
    "Sample": ((1, "value", "DOUBLE", False, ""), (2, "timestamp", "INT64", False, "")),
    "TimeSeries": ((1, "labels", "MESSAGE", True, "Label"), (2, "samples", "MESSAGE", True, "Sample")),
    "WriteRequest": ((1, "timeseries", "MESSAGE", True, "TimeSeries"),),
}


def write_request_class() -> Any:
    """The class of the message WriteRequest.

    Raises:
        UsageError: protobuf isn't installed.
    """
    pool = needed("google.protobuf.descriptor_pool", "remote_write", _NEEDS).DescriptorPool()
    descriptors = needed("google.protobuf.descriptor_pb2", "remote_write", _NEEDS)
    factory = needed("google.protobuf.message_factory", "remote_write", _NEEDS)
    file = descriptors.FileDescriptorProto(name="remote.proto", package=_PACKAGE, syntax="proto3")
    kinds = descriptors.FieldDescriptorProto
    for message, fields in _MESSAGES.items():
        declared = file.message_type.add(name=message)
        for number, name, kind, is_repeated, type_name in fields:
            declared.field.add(
                number=number,
                name=name,
                type=getattr(kinds, f"TYPE_{kind}"),
                label=kinds.LABEL_REPEATED if is_repeated else kinds.LABEL_OPTIONAL,
                type_name=f".{_PACKAGE}.{type_name}" if type_name else None,
            )
    pool.Add(file)
    return factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.WriteRequest"))


class RemoteWriteSerializer(CastSerializer):
    """Writes frames as WriteRequests.

    Args:
        specs: the tables that may come.
        identity: its tags are labels of every series.
        rates: whether derived columns are written.
        names: whose names the metrics have.
    """

    def __init__(
        self, specs: Iterable[TableSpec], identity: Identity, rates: bool = True, names: Names = "hostprobe"
    ) -> None:
        self._request = write_request_class()
        # Of each message one stays: without any, its class would be made anew for each layout, and a class is a cycle.
        self._series = self._request().timeseries.add()
        self._label, self._sample = self._series.labels.add(), self._series.samples.add()
        tags = {label_name(name): value for name, value in identity.tags.items()}
        self._labels = tags | {"job": "hostprobe", "instance": identity.host}
        self._there: dict[str, set[_Pairs]] = {}  # the series of each table
        self._gone: list[_Pairs] = []
        super().__init__(specs, identity, rates, naming(names), has_uname=names == "node_exporter")

    def write(self, frame: Frame, buffer: Buffer, tables: Collection[str] = (), left_out: Collection[str] = ()) -> None:
        super().write(frame, buffer, tables, left_out)
        if self._gone:
            payload = bytes(buffer.data) + self._ends(_milliseconds(frame))
            buffer.clear()
            buffer.make_room(len(payload))
            self._encoder.encode_into(msgspec.Raw(payload), buffer.data)

    def form(self, frame: Frame) -> int:
        return len(self._timestamp(frame))

    def cast(self, block: CastBlock, labels: Sequence[Labels], points: Sequence[Point], form: int) -> bytes:
        request = self._request()
        places = {label: place for place, label in enumerate(block.spec.labels)}
        repeats = told_apart(labels)
        there: set[_Pairs] = set()
        timestamp = 1 << 7 * (form - 1) if form < _LONGEST else -1  # takes as many bytes
        for point in points:
            row = labels[point.row]
            names = {name: plain(row[places[label]]) for name, label in point.family.labels}
            names |= dict(point.source.labels) | repeats[point.row]
            pairs = {**self._labels, **names, "__name__": point.family.name}
            shown = tuple(sorted((name, value) for name, value in pairs.items() if value))
            there.add(shown)
            _add(request, shown, point.mark, timestamp)
        self._gone += self._there.get(block.spec.name, there) - there
        self._there[block.spec.name] = there
        text: bytes = request.SerializeToString()
        return text

    def _ends(self, milliseconds: int) -> bytes:
        """The last samples of the series that are gone."""
        request = self._request()
        for pairs in sorted(self._gone):
            _add(request, pairs, _STALE_MARK, milliseconds)
        self._gone.clear()
        text: bytes = request.SerializeToString()
        return text.replace(_STALE_MARK, _STALE)

    def stamp(self, data: npt.NDArray[np.uint8], layout: Layout, frame: Frame, bits: npt.NDArray[np.int64]) -> None:
        stamp = np.frombuffer(self._timestamp(frame), dtype=np.uint8)
        # Behind a sample's value comes the tag of its timestamp, and then that.
        data[layout.slots[:, 7:] + 2 + np.arange(len(stamp))] = stamp

    def _timestamp(self, frame: Frame) -> bytes:
        """The frame's time in milliseconds as a sample has it, without its tag."""
        self._sample.timestamp = _milliseconds(frame)
        text: bytes = self._sample.SerializeToString()
        return text[1:]


def _milliseconds(frame: Frame) -> int:
    return frame.time_unix_ns // 1_000_000 or 1  # 0 isn't written


def _add(request: Any, pairs: _Pairs, mark: bytes, timestamp: int) -> None:
    series = request.timeseries.add()
    for name, value in pairs:
        series.labels.add(name=name, value=value)
    series.samples.add(value=_DOUBLE.unpack(mark)[0], timestamp=timestamp)
