"""Graphite's plaintext protocol against a strict parser of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from agent.assembly import Agent
from agent.frame import Frame
from agent.serializers.document import Identity
from agent.serializers.paths import node, row_paths
from agent.table import COUNTER_MAX, NAN, Labels
from tests.serializers.writing import BARE, DISK, TIME_NS, TIMES, Writer, collected, known

LINE = re.compile(r"([\w.-]+) (-?\d+(?:\.\d+)?(?:e[+-]?\d+)?) (-?\d+)", re.ASCII)


class Sample(NamedTuple):
    path: str
    text: str
    seconds: int


def samples(text: str) -> list[Sample]:
    found = []
    for line in text.split("\n"):
        match = LINE.fullmatch(line)
        assert match, line
        assert all(match[1].split(".")), line
        found.append(Sample(match[1], match[2], int(match[3])))
    assert len({one.path for one in found}) == len(found)
    return found


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


def test_every_known_value_of_this_host_is_there_and_no_other(real: tuple[Agent, Frame]) -> None:
    agent, frame = real
    writer = Writer("graphite", ())
    writer.frame, writer.serializer = frame, agent.serializer("graphite")
    found = [(one.path, float(one.text)) for one in samples(writer.text())]
    seconds = {one.seconds for one in samples(writer.text())}
    assert seconds == {frame.time_unix_ns // 10**9}
    host = re.sub(r"[^a-zA-Z0-9_-]", "_", agent.identity.host)
    rows: dict[tuple[str, Labels], list[str]] = {}
    taken: set[str] = set()
    expected = []
    for table in frame.tables.values():  # paths by the order of the rows
        for labels in table.labels[: table.count]:
            nodes = [re.sub(r"[^a-zA-Z0-9_-]", "_", label or "") or "_" for label in labels]
            path = free = ".".join(["hostprobe", host, table.spec.name, *nodes])
            number = 1
            while free in taken:
                number += 1
                free = f"{path}-{number}"
            taken.add(free)
            rows.setdefault((table.spec.name, labels), []).append(free)
    turns: dict[tuple[str, Labels, str], int] = {}
    for one in known(frame, agent.identity):
        paths = rows.get((one.table, one.labels))
        if one.table == "frame":
            path = f"hostprobe.{host}.frame"
        elif paths is None:
            path = f"hostprobe.{host}.left_out.{one.labels[0]}"
        else:  # rows that have the same labels have the same columns known, one after the other
            turn = turns.get((one.table, one.labels, one.column), 0)
            turns[one.table, one.labels, one.column] = turn + 1
            path = paths[turn]
        expected.append((f"{path}.{one.column}", float(one.value)))
    assert sorted(found) == sorted(expected)
    assert len(expected) > 200


def test_lines_to_the_letter() -> None:
    writer = Writer("graphite")
    writer.begin()
    writer.put(TIMES, ((), (None, COUNTER_MAX), (0.5, 12.0, NAN)))
    writer.put(DISK, (("sd a", None), (1, None), (NAN, 1e-05)), (("größe.x", ""), (None, 5), (3.0, NAN)))
    writer.put(BARE, (("nothing",), (), ()))
    seconds = TIME_NS // 10**9
    assert writer.text().split("\n") == [
        f"hostprobe.web-1.frame.sequence 1 {seconds}",
        f"hostprobe.web-1.frame.time_unix_seconds 1795217867.1234567 {seconds}",
        f"hostprobe.web-1.frame.degraded_tables 0 {seconds}",
        f"hostprobe.web-1.times.load1 0.5 {seconds}",
        f"hostprobe.web-1.times.events_total 18446744073709551615 {seconds}",
        f"hostprobe.web-1.times.threads 12 {seconds}",
        f"hostprobe.web-1.disk.sd_a._.reads_total 1 {seconds}",
        f"hostprobe.web-1.disk.sd_a._.wait_seconds 0.00001 {seconds}",
        f"hostprobe.web-1.disk.gr__e_x._.in_progress 3 {seconds}",
        f"hostprobe.web-1.disk.gr__e_x._.busy_seconds_total 0.005 {seconds}",
    ]


@pytest.mark.parametrize(("time_ns", "seconds"), [(0, 0), (10**9 - 1, 0), (-1, -1), (TIME_NS, TIME_NS // 10**9)])
def test_times_are_seconds_that_have_begun(time_ns: int, seconds: int) -> None:
    writer = Writer("graphite")
    writer.begin(time_ns)
    assert {one.seconds for one in samples(writer.text())} == {seconds}


def test_labels_and_hosts_are_one_node_each() -> None:
    labels = [None, "", " \0\n", " \0", "a.b c=d,e", 'q"\\', "\udcff", "🦀", "x" * 5000]
    writer = Writer("graphite", identity=Identity("web.1 \n", "i", {"a b": "c d"}))
    writer.begin()
    writer.put(DISK, *((labels_, (1, 1), (1.0, 1.0)) for labels_ in [(label, label) for label in labels]))
    found = samples(writer.text())
    assert len(found) == 3 + 4 * len(labels)
    assert {one.path.count(".") for one in found if ".disk." in one.path} == {5}
    assert all(one.path.startswith("hostprobe.web_1__.") for one in found)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a b", "a.b", "a_b"], ["a_b", "a_b-2", "a_b-3"]),
        (["a b", "a_b-2", "a_b", "a/b"], ["a_b", "a_b-2", "a_b-3", "a_b-4"]),
        (["a b", "a_b", "a_b-2"], ["a_b", "a_b-2", "a_b-2-2"]),
        (["a", "a", "a-2", "a"], ["a", "a-2", "a-2-2", "a-3"]),
        (["", None, "_"], ["_", "_-2", "_-3"]),
    ],
)
def test_rows_that_would_have_the_same_path_are_numbered(labels: list[str | None], expected: list[str]) -> None:
    paths = row_paths(BARE, "h", [(label,) for label in labels])
    assert paths == [f"hostprobe.h.bare.{text}." for text in expected]


def test_paths_of_many_equal_rows_take_no_time_that_grows_with_their_square() -> None:
    assert len(set(row_paths(BARE, "h", [("x",)] * 20_000))) == 20_000


@pytest.mark.parametrize(("text", "expected"), [("web-1", "web-1"), ("web.1", "web_1"), ("", "_"), ("ä b\n", "__b_")])
def test_node(text: str, expected: str) -> None:
    assert node(text) == expected
