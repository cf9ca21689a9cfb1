"""The tables beside a frame's own, for formats without a header."""

from __future__ import annotations

import math

import pytest

from agent import __version__
from agent.assembly import catalogue
from agent.frame import Frame
from agent.serializers.document import Identity
from agent.serializers.frame_tables import FRAME_TABLES, FrameTables
from agent.table import Table
from tests.serializers.writing import BARE, DISK, IDENTITY, SECOND_NS, SPECS, TIME_NS, TIMES


def names(tables: list[Table]) -> list[str]:
    return [table.spec.name for table in tables]


@pytest.fixture
def frame() -> Frame:
    """The second one: a table was due only in the first, another one failed, and there are rows left out."""
    frame = Frame(SPECS)
    for second in range(2):
        frame.begin(TIME_NS, second * SECOND_NS // 4)
        frame.open(TIMES)
        frame.open(DISK).claim([("vda", None), ("vdb", None), ("vdc", None)], row_limit=1)
        if second == 0:
            frame.open(BARE).claim([("x",), ("y",)], row_limit=1, left_out=4)
    frame.discard([TIMES])
    return frame


def test_the_frames_own_figures(frame: Frame) -> None:
    first, *_ = FrameTables(IDENTITY).of(frame, (), ("times", "disk"))
    assert (first.count, list(first.labels)) == (1, [("web-1", "6f0c", __version__)])
    assert first.gauges.tolist() == [[2.0, 1795217867.1234567, 0.25, 2.0]]


def test_the_first_frame_has_no_interval() -> None:
    frame = Frame(SPECS)
    frame.begin(0, 0)
    (first,) = FrameTables(IDENTITY).of(frame, (), ())
    assert first.gauges[0, :2].tolist() == [1.0, 0.0]
    assert math.isnan(first.gauges[0, 2])


@pytest.mark.parametrize(
    ("tables", "left_out", "is_state", "expected", "dropped"),
    [
        ((), (), False, ["frame", "disk", "left_out"], {"disk": 2}),
        ((), (), True, ["frame", "disk", "bare", "left_out"], {"disk": 2, "bare": 5}),
        (("bare",), (), True, ["frame", "bare", "left_out"], {"bare": 5}),
        (("bare",), (), False, ["frame"], {}),
        ((), ("disk",), False, ["frame"], {}),
        ((), ("disk",), True, ["frame", "bare", "left_out"], {"bare": 5}),
        (("times",), (), True, ["frame"], {}),
    ],
)
def test_which_tables_there_are(
    frame: Frame,
    tables: tuple[str, ...],
    left_out: tuple[str, ...],
    is_state: bool,
    expected: list[str],
    dropped: dict[str, int],
) -> None:
    own = FrameTables(IDENTITY)
    for _ in range(2):
        found = own.of(frame, tables, left_out, is_state)
        assert sorted(names(found)) == sorted(expected)
        assert names(found)[0] == "frame"
        if dropped:
            last = found[-1]
            assert last.spec.name == "left_out"
            assert {
                name: rows for (name,), (rows,) in zip(last.labels, last.gauges[: last.count], strict=True)
            } == dropped
        own.of(frame, (), (), True)  # whatever was asked in between


def test_uname_is_there_where_it_is_wanted_and_known(frame: Frame) -> None:
    found = FrameTables(IDENTITY, has_uname=True).of(frame, (), ())
    assert names(found) == ["frame", "uname", "disk", "left_out"]
    assert (list(found[1].labels), found[1].gauges.tolist()) == ([IDENTITY.uname], [[1.0]])
    assert names(FrameTables(Identity("h", "i", {}), has_uname=True).of(frame, (), ())) == ["frame", "disk", "left_out"]


def test_no_table_of_a_probe_has_their_names() -> None:
    assert {spec.name for spec in FRAME_TABLES}.isdisjoint(spec.name for spec in catalogue())


@pytest.mark.parametrize("spec", [*FRAME_TABLES, *catalogue()], ids=lambda spec: spec.name)
def test_no_label_has_a_columns_name(spec: object) -> None:
    """Influx couldn't tell a tag from a field of the same name."""
    assert set(spec.labels).isdisjoint(column.name for column in spec.columns)  # type: ignore[attr-defined]
