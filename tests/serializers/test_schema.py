"""The schema of one line: valid itself, and strict about what a line may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator

from agent.assembly import catalogue
from agent.frame import Frame
from agent.pool import Buffer
from agent.serializers.document import Identity
from agent.serializers.json_lines import JsonSerializer
from agent.serializers.schema import line_schema
from agent.table import COUNTER_MAX, Kind

SPECS = list(catalogue())
SCHEMA = line_schema(SPECS)
VALIDATOR = Draft202012Validator(SCHEMA)


def full_line() -> dict[str, Any]:
    """A line with every table that there is, and two rows in those with labels."""
    frame = Frame(SPECS)
    frame.begin(1_795_217_867_123_456_789, 0)
    for spec in SPECS:
        table = frame.open(spec)
        if spec.labels:
            table.claim([tuple(f"{label}{row}" for label in spec.labels) for row in range(3)], row_limit=2)
        for row in range(table.count):
            table.put_counters(row, [COUNTER_MAX] * len(spec.counters))
            table.put_gauges(row, [1.0] * len(spec.gauges))
    buffer = Buffer()
    JsonSerializer(SPECS, Identity(host="h", instance="i", tags={"a": "b"})).write(frame, buffer)
    line: dict[str, Any] = json.loads(bytes(buffer.data))
    return line


LINE = full_line()


def test_the_schema_is_a_schema_and_is_json() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(msgspec.json.encode(SCHEMA)) == SCHEMA


def test_a_line_with_every_table_validates() -> None:
    VALIDATOR.validate(LINE)
    assert LINE.keys() | {"degraded"} == SCHEMA["properties"].keys()


def test_each_column_has_its_description_and_type() -> None:
    for spec in SPECS:
        key = "host_table" if spec.name == "host" else spec.name
        table = SCHEMA["properties"][key]
        assert table["description"] == spec.help
        properties = table["items"]["properties"] if spec.labels else table["properties"]
        assert list(properties) == [*spec.labels, *(column.name for column in spec.columns)]
        for column in spec.columns:
            declared = properties[column.name]
            assert column.help in declared["description"]
            assert column.unit in declared["description"]
            assert "null" in declared["type"]
            assert ("minimum" in declared) == (column.kind is Kind.COUNTER or column.unit == "ratio")


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(line: Any) -> None:
        for key in path[:-1]:
            line = line[key]
        del line[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(line: Any) -> None:
        for key in path[:-1]:
            line = line[key]
        line[path[-1]] = value

    return change


RIGHT = {
    "a table is absent": drop("cpu"),
    "no tags": put({}, "tags"),
    "first frame": put(None, "interval_seconds"),
    "unknown counter": put(None, "cpu", "forks_total"),
    "unknown gauge": put(None, "load", "load1"),
    "no rates": drop("cpu", "usage_ratio"),
    "no rows": put([], "disk_io"),
    "nothing dropped": drop("disk_io_rows_dropped"),
    "largest counter": put(2**64 - 1, "cpu", "forks_total"),
    "ratio of one": put(1, "cpu", "usage_ratio"),
}
WRONG = {
    "another version": put("hostprobe/2", "schema"),
    "no sequence": drop("sequence"),
    "sequence from 0": put(0, "sequence"),
    "no host": drop("host"),
    "host that is no name": put({}, "host"),
    "time without nanoseconds": put("2026-11-20T23:37:47Z", "time"),
    "time of somewhere": put("2026-11-20T23:37:47.123456789+01:00", "time"),
    "interval of nothing": put(0, "interval_seconds"),
    "interval backwards": put(-1.5, "interval_seconds"),
    "tag that is no text": put(42, "tags", "rack"),
    "unknown table": put({}, "gpu"),
    "extra column": put(1, "cpu", "cores"),
    "extra column of a row": put(1, "disk_io", 0, "colour"),
    "missing counter": drop("cpu", "forks_total"),
    "missing gauge": drop("load", "load1"),
    "missing label": drop("disk_io", 0, "device"),
    "missing column of a row": drop("disk_io", 1, "reads_total"),
    "label that is no text": put(3, "cpu_core", 0, "core"),
    "negative counter": put(-1, "cpu", "forks_total"),
    "counter of more than 64 bits": put(2**64, "cpu", "forks_total"),
    "counter with a fraction": put(1.5, "cpu", "forks_total"),
    "counter as text": put("1", "cpu", "forks_total"),
    "negative seconds": put(-0.5, "cpu", "user_seconds_total"),
    "ratio of 1.5": put(1.5, "cpu", "usage_ratio"),
    "negative ratio": put(-0.1, "memory", "used_ratio"),
    "bytes with a fraction": put(0.5, "memory", "total_bytes"),
    "object for rows": put({}, "disk_io"),
    "rows for an object": put([], "cpu"),
    "no rows dropped": put(0, "disk_io_rows_dropped"),
    "rows dropped of a table without rows": put(1, "cpu_rows_dropped"),
}


@pytest.mark.parametrize("change", RIGHT.values(), ids=RIGHT)
def test_right_lines_are_accepted(change: Callable[[dict[str, Any]], None]) -> None:
    line = deepcopy(LINE)
    change(line)
    VALIDATOR.validate(line)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_lines_are_rejected(change: Callable[[dict[str, Any]], None]) -> None:
    line = deepcopy(LINE)
    change(line)
    assert not VALIDATOR.is_valid(line)
