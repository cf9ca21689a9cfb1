"""Text exposition and OpenMetrics against Prometheus' own parsers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from agent.assembly import Agent, catalogue
from agent.frame import Frame
from agent.serializers import formats, prometheus
from agent.serializers.document import Identity
from agent.serializers.families import Family, Source
from agent.serializers.frame_tables import FRAME_TABLES
from agent.serializers.names import naming
from agent.serializers.prometheus import label_name
from agent.table import COUNTER_MAX, NAN, Kind, TableSpec
from tests.serializers.writing import (
    DISK,
    TIMES,
    Known,
    Series,
    Writer,
    collected,
    known,
    series,
)

BOTH: list[formats.Name] = ["prometheus", "openmetrics"]
NAMES: list[formats.Names] = ["hostprobe", "node_exporter"]
HOSTPROBE = naming("hostprobe")


def read(format: formats.Name, text: str) -> list[Series]:
    """Every sample, by the parser of the format; it must be text that a scrape ends with a line feed."""
    parse = text_string_to_metric_families if format == "prometheus" else openmetrics_families
    found = []
    for family in parse(text + "\n"):
        for sample in family.samples:
            assert sample.timestamp is None
            found.append(Series(sample.name, tuple(sorted(sample.labels.items())), sample.value))
    return sorted(found)


def floats(expected: list[Series]) -> list[Series]:
    return [one._replace(value=float(one.value)) for one in expected]


@pytest.fixture(scope="module", params=["standard", "full"])
def real(request: pytest.FixtureRequest) -> Iterator[tuple[Agent, Frame]]:
    with collected(request.param) as found:
        yield found


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("names", NAMES)
def test_every_known_value_of_this_host_is_there_and_no_other(
    real: tuple[Agent, Frame], format: formats.Name, names: formats.Names
) -> None:
    agent, frame = real
    writer = Writer(format, ())
    writer.frame, writer.serializer = frame, agent.serializer(format, names)
    text = writer.text()
    values = known(frame, agent.identity)
    if names == "node_exporter":
        values.append(Known("uname", agent.identity.uname, "info", 1))
    expected = series(values, [table.spec for table in frame.tables.values()], naming(names))
    distinct = {(one.name, one.labels) for one in expected}
    if len(distinct) == len(expected):  # two UDP sockets of one port are one series twice
        assert read(format, text) == floats(expected)
    assert Counter(read("prometheus", text)) == Counter(floats(expected))
    assert len(expected) > 200


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize("names", NAMES)
def test_help_and_type_stand_once_before_all_samples_of_their_family(
    real: tuple[Agent, Frame], format: formats.Name, names: formats.Names
) -> None:
    agent, frame = real
    writer = Writer(format, ())
    writer.frame, writer.serializer = frame, agent.serializer(format, names)
    lines = writer.text().split("\n")
    if format == "openmetrics":
        assert lines.pop() == "# EOF"
    told: dict[str, list[str]] = {}
    present = ""
    for line in lines:
        comment = re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line)
        if comment:
            present = comment[2]
            told.setdefault(present, []).append(comment[1])
        else:
            name = re.match("[a-zA-Z_:][a-zA-Z0-9_:]*", line)
            assert name is not None
            assert name[0].removesuffix("_total" if present != name[0] else "") == present, line
            told[present].append("sample")
    first = ["HELP", "TYPE"] if format == "prometheus" else ["TYPE", "HELP"]
    for entries in told.values():
        assert entries[:2] == first
        assert set(entries[2:]) == {"sample"}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("rates", [True, False])
def test_no_two_families_of_all_tables_have_one_name(names: formats.Names, rates: bool) -> None:
    """Nor do they in OpenMetrics, where a counter's family is named without `_total`."""
    families = [family for spec in (*FRAME_TABLES, *catalogue()) for family in naming(names)(spec, rates)]
    for taken in (
        Counter(family.name for family in families),
        Counter(family.name.removesuffix("_total" * (family.kind is Kind.COUNTER)) for family in families),
    ):
        assert [name for name, count in taken.items() if count > 1] == []
    for family in families:
        assert re.fullmatch("[a-z][a-zA-Z0-9_]*", family.name)
        assert not family.name.endswith(("_count", "_sum", "_bucket", "_created"))
        assert all(re.fullmatch("[a-z][a-z0-9_]*", name) for name, _ in family.labels)
        assert not {"instance", "job", "le", "quantile"} & {name for name, _ in family.labels}
        assert family.help
        assert family.sources


def test_every_column_of_all_tables_is_told_but_the_one_that_has_no_name() -> None:
    missing = []
    for names in NAMES:
        for spec in catalogue():
            told = {source.column for family in naming(names)(spec, True) for source in family.sources}
            missing += [(names, spec.name, column.name) for column in spec.columns if column.name not in told]
    assert missing == [(names, "agent", "probe_failures_total") for names in NAMES]


def filled(format: formats.Name = "prometheus", **options: object) -> Writer:
    writer = Writer(format, **options)
    writer.begin()
    writer.put(TIMES, ((), (812_33, COUNTER_MAX), (0.5, 12.0, 0.75)))
    writer.put(DISK, (("vda", "ssd"), (2**53 + 1, 1500), (3.0, 0.25)), (("vdb", None), (None, None), (NAN, 1e-05)))
    return writer


def test_prometheus_to_the_letter() -> None:
    tags = 'env="prod",rack="42"'
    frame = f'{{{tags},host="web-1",run="6f0c",version="VERSION"}}'
    text = re.sub('version="[^"]*"', 'version="VERSION"', filled().text())
    assert text.split("\n") == [
        "# HELP hostprobe_frame_sequence By one a frame, from 1, within a run.",
        "# TYPE hostprobe_frame_sequence gauge",
        f"hostprobe_frame_sequence{frame} 1",
        "# HELP hostprobe_frame_time_unix_seconds When the cycle began, since 1970.",
        "# TYPE hostprobe_frame_time_unix_seconds gauge",
        f"hostprobe_frame_time_unix_seconds{frame} 1795217867.1234567",
        "# HELP hostprobe_frame_degraded_tables Tables that were left out because the sink's ring filled up.",
        "# TYPE hostprobe_frame_degraded_tables gauge",
        f"hostprobe_frame_degraded_tables{frame} 0",
        "# HELP hostprobe_times_load1 Load.",
        "# TYPE hostprobe_times_load1 gauge",
        f"hostprobe_times_load1{{{tags}}} 0.5",
        r"# HELP hostprobe_times_busy_seconds_total Busy,\nin all.",
        "# TYPE hostprobe_times_busy_seconds_total counter",
        f"hostprobe_times_busy_seconds_total{{{tags}}} 812.33",
        "# HELP hostprobe_times_used_ratio Share.",
        "# TYPE hostprobe_times_used_ratio gauge",
        f"hostprobe_times_used_ratio{{{tags}}} 0.75",
        r"# HELP hostprobe_times_events_total Events \\o/.",
        "# TYPE hostprobe_times_events_total counter",
        f"hostprobe_times_events_total{{{tags}}} 18446744073709551615",
        "# HELP hostprobe_times_threads Threads.",
        "# TYPE hostprobe_times_threads gauge",
        f"hostprobe_times_threads{{{tags}}} 12",
        "# HELP hostprobe_disk_reads_total Reads.",
        "# TYPE hostprobe_disk_reads_total counter",
        f'hostprobe_disk_reads_total{{{tags},device="vda",kind="ssd"}} 9007199254740993',
        "# HELP hostprobe_disk_in_progress Now.",
        "# TYPE hostprobe_disk_in_progress gauge",
        f'hostprobe_disk_in_progress{{{tags},device="vda",kind="ssd"}} 3',
        "# HELP hostprobe_disk_busy_seconds_total Busy.",
        "# TYPE hostprobe_disk_busy_seconds_total counter",
        f'hostprobe_disk_busy_seconds_total{{{tags},device="vda",kind="ssd"}} 1.5',
        "# HELP hostprobe_disk_wait_seconds Waiting.",
        "# TYPE hostprobe_disk_wait_seconds gauge",
        f'hostprobe_disk_wait_seconds{{{tags},device="vda",kind="ssd"}} 0.25',
        f'hostprobe_disk_wait_seconds{{{tags},device="vdb",kind=""}} 0.00001',
    ]


def test_openmetrics_names_a_counters_family_without_total_and_ends_with_eof() -> None:
    text = filled("openmetrics").text()
    assert (
        "# TYPE hostprobe_disk_reads counter\n# HELP hostprobe_disk_reads Reads.\nhostprobe_disk_reads_total{" in text
    )
    assert text.endswith("\n# EOF")
    assert read("openmetrics", text) == read("prometheus", filled().text())


@pytest.mark.parametrize("format", BOTH)
def test_helps_with_quotes_and_backslashes_come_back(format: formats.Name) -> None:
    writer = filled(format)
    writer.begin()
    writer.put(TIMES, ((), (81_233, 5), (0.5, 12.0, 0.75)))
    writer.begin()
    writer.put(TIMES, ((), (81_233, 7), (0.5, 12.0, 0.75)))
    writer.frame.derive()
    parse = text_string_to_metric_families if format == "prometheus" else openmetrics_families
    helps = {family.name: family.documentation for family in parse(writer.text() + "\n")}
    assert helps["hostprobe_times_events_per_second"] == 'Events "a" second.'
    assert helps["hostprobe_times_busy_seconds"] == "Busy,\nin all."
    assert helps["hostprobe_times_events"] == r"Events \o/."


@pytest.mark.parametrize("format", BOTH)
@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ('quote " and \\ backslash\\', None),
        ("line\nfeed\ttab\r\0\x1b\x7f", None),
        ("a,b=c {d} e", None),
        ("größe 🦀\u2028", None),
        ("", None),
        (None, ""),
        ("/mnt/\udcff", "/mnt/\\udcff"),
        (" \0", None),
        (" \0\n", None),
        ("null", None),
        ("x" * 5000, None),
    ],
)
def test_labels_come_back_as_they_were(format: formats.Name, label: str | None, shown: str | None) -> None:
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, ((label, "kind"), (7, 1), (2.0, 3.0)))
    expected = label if shown is None else shown
    found = [dict(one.labels)["device"] for one in read(format, writer.text()) if one.name.startswith("hostprobe_disk")]
    assert found == [expected] * 4


@pytest.mark.parametrize("format", BOTH)
def test_tags_are_labels_of_every_sample_and_a_tables_own_labels_are_stronger(format: formats.Name) -> None:
    tags = {"a-b": 'x"\\\n', "1x": "y", "device": "of a tag", "__name__": "z", "ä": "ö", "": "nameless"}
    writer = filled(format, identity=Identity("h", "i", tags))
    for one in read(format, writer.text()):
        labels = dict(one.labels)
        assert labels["a_b"] == 'x"\\\n'
        assert labels["_1x"] == "y"
        assert labels["_name__"] == "z"
        assert labels["_"] in ("ö", "nameless")
        assert ("device", "of a tag") in one.labels or one.name.startswith("hostprobe_disk_")


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("env", "env"),
        ("a-b", "a_b"),
        ("1x", "_1x"),
        ("", "_"),
        ("_x", "_x"),
        ("__name__", "_name__"),
        ("-_x", "_x"),
        ("größe", "gr__e"),
    ],
)
def test_label_names(tag: str, name: str) -> None:
    assert label_name(tag) == name
    assert re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name)


def test_labels_of_a_series_alone_are_not_those_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family's constant labels stay with it, whatever follows it."""

    def families(spec: TableSpec, rates: bool) -> list[Family]:
        if spec is not DISK:
            return []
        mixed = (Source("reads_total", (("mode", "read"),)), Source("in_progress"))
        names = (("device", "device"),)
        return [
            Family("a", Kind.GAUGE, "", "A.", mixed, names),
            Family("b", Kind.GAUGE, "", "B.", (Source("wait_seconds"),), names),
        ]

    monkeypatch.setattr(prometheus, "naming", lambda names: families)
    writer = Writer("prometheus", identity=Identity("h", "i", {}))
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (1, 1), (2.0, 3.0)))
    assert read("prometheus", writer.text()) == [
        Series("a", (("device", "vda"),), 2.0),
        Series("a", (("device", "vda"), ("mode", "read")), 1.0),
        Series("b", (("device", "vda"),), 3.0),
    ]


@pytest.mark.parametrize("value", [0.0, -0.0, -3.0, 2.0**53, 1e23, -1e300, 5e-324, 0.1, 1e-7])
@pytest.mark.parametrize("format", BOTH)
def test_gauges_come_back_to_the_last_bit(format: formats.Name, value: float) -> None:
    writer = Writer(format)
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (1, 1), (value, value)))
    found = {one.name: one.value for one in read(format, writer.text())}
    assert found["hostprobe_disk_in_progress"] == float(int(value) if abs(value) <= 2**53 else value)
    assert found["hostprobe_disk_wait_seconds"] == value


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_no_number_is_absent(value: float) -> None:
    writer = Writer("prometheus")
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (None, None), (value, value)))
    assert "hostprobe_disk" not in writer.text()


# A payload is a state


def state(writer: Writer, **wanted: Sequence[str]) -> dict[str, float]:
    """The reads of each device, and the threads."""
    text = writer.payload(**wanted).decode()
    found = {}
    for one in read("prometheus", text):
        if one.name == "hostprobe_disk_reads_total":
            found[dict(one.labels)["device"]] = one.value
        elif one.name == "hostprobe_times_threads":
            found["threads"] = one.value
    return found


def times(writer: Writer, threads: float) -> None:
    writer.put(TIMES, ((), (1, 1), (0.5, threads)))


def test_tables_that_were_not_due_are_told_with_their_last_values() -> None:
    writer = Writer("prometheus")
    writer.begin()
    times(writer, 1)
    writer.put(DISK, (("vda", "ssd"), (5, 0), ()))
    assert state(writer) == {"threads": 1, "vda": 5}
    for threads in (2, 3):
        writer.begin()
        times(writer, threads)
        assert state(writer) == {"threads": threads, "vda": 5}
        assert state(writer, tables=["disk"]) == {"vda": 5}
        assert state(writer, left_out=["disk"]) == {"threads": threads}
    writer.begin()
    assert state(writer) == {"threads": 3, "vda": 5}
    writer.put(DISK, (("vdb", "ssd"), (6, 0), ()))
    assert state(writer) == {"threads": 3, "vdb": 6}


def test_tables_of_a_probe_that_failed_are_absent_until_it_works_again() -> None:
    writer = Writer("prometheus")
    for reads in (5, 6):
        writer.begin()
        times(writer, 1)
        writer.put(DISK, (("vda", "ssd"), (reads, 0), ()))
    writer.begin()
    times(writer, 2)
    writer.put(DISK, (("vda", "ssd"), (7, 0), ()))
    writer.frame.discard([DISK])
    assert state(writer) == {"threads": 2}
    writer.begin()  # not due
    times(writer, 3)
    assert state(writer) == {"threads": 3}
    writer.begin()
    writer.put(DISK, (("vda", "ssd"), (8, 0), ()))
    assert state(writer) == {"threads": 3, "vda": 8}
    writer.begin()
    assert state(writer) == {"threads": 3, "vda": 8}


def test_rows_that_a_limit_left_out_of_a_table_that_was_not_due_are_told_too() -> None:
    writer = Writer("prometheus")
    writer.begin()
    writer.frame.open(DISK).claim([("vda", "ssd"), ("vdb", "ssd")], row_limit=1)
    for _ in range(2):
        assert 'hostprobe_left_out_rows{env="prod",rack="42",table="disk"} 1' in writer.text()
        writer.begin()


def test_uname_is_told_only_with_the_names_of_node_exporter() -> None:
    texts = {}
    for names in NAMES:
        writer = Writer("prometheus", names=names)
        writer.begin()
        texts[names] = writer.text()
    assert "uname" not in texts["hostprobe"]
    assert (
        'node_uname_info{env="prod",rack="42",domainname="(none)",machine="x86_64",nodename="web-1",release="6.1.0",'
        'sysname="Linux",version="#1 SMP"} 1'
    ) in texts["node_exporter"]
    without = Writer("prometheus", names="node_exporter", identity=Identity("h", "i", {}))
    without.begin()
    assert "uname" not in without.text()
