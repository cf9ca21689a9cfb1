"""What hostprobe says under node_exporter's names is what node_exporter says, on the same host at the same moment."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import config
from agent.assembly import Agent, catalogue
from agent.logs import Log
from agent.pool import Buffer
from agent.serializers.frame_tables import FRAME_TABLES
from agent.serializers.names.node_exporter import families
from tests.engines.node_exporter import NodeExporter
from tests.engines.process import REPOSITORY, http

PAGE = (REPOSITORY / "docs/node_exporter.md").read_text()
COLLECTORS = (
    *("cpu", "meminfo", "loadavg", "diskstats", "netdev", "netclass", "filesystem"),
    *("pressure", "sockstat", "netstat", "vmstat", "stat", "time", "uname"),
)
NEWER = {"node_pressure_irq_stalled_seconds_total"}  # where the kernel has it; Debian's version hasn't
UNLISTED = "netclass"  # of this one the page tells only what hostprobe has
CLAIMED = {
    family.name
    for spec in (*FRAME_TABLES, *catalogue())
    for family in families(spec, True)
    if family.name.startswith("node_")
}

STILL = re.compile(
    r"node_(memory_(MemTotal|SwapTotal|CommitLimit)_bytes|boot_time_seconds|uname_info|network_(mtu|speed)_bytes"
    r"|filesystem_(size_bytes|files|readonly))"
)
GROWING = re.compile(r"node_(.*_total|vmstat_.*|netstat_(?!Tcp_CurrEstab).*|time_seconds)")
ROUNDING = 1e-12  # relative: both turn the kernel's units into seconds, by a product here and a quotient there
BACKWARDS_SECONDS = 0.1  # the kernel's idle and iowait of a CPU may fall a little
# How far a gauge may be outside what it is before and after: there are some 50 ms between. Others not at all.
SLACKS = {
    "node_(memory|sockstat|filesystem)_.*_bytes": 2 * 2**20,
    "node_sockstat_.*_mem": 512,
    "node_load.*": 0.1,
    "node_(procs_.*|disk_io_now|sockstat_TCP_(orphan|tw)|netstat_Tcp_CurrEstab|filesystem_files_free)": 16,
}
ROUNDS_MAX = 50
# What one of them leaves out: Debian's node_exporter by its flags, its maker's, or hostprobe as the page has it.
HIDDEN = {
    "device": re.compile(r"lo|(z?ram|loop|fd|(h|s|v|xv)d[a-z]|nvme\d+n\d+p)\d+"),
    "mountpoint": re.compile(r"/(dev|proc|run|sys|mnt|media|var/lib/docker/.+|var/lib/containers/storage/.+)($|/.*)"),
}

ITSELF = ("node_scrape_", "node_exporter_")

Series = tuple[str, frozenset[tuple[str, str]]]


class Exposition(NamedTuple):
    """What was scraped: the values of series, and by name the TYPE and the HELP."""

    values: dict[Series, float]
    kinds: dict[str, str]
    helps: dict[str, str]

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.values}


class Moment(NamedTuple):
    """Ours, and theirs right before and after."""

    before: Exposition
    ours: Exposition
    after: Exposition


def parsed(text: str) -> Exposition:
    exposition = Exposition({}, {}, {})
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.startswith("node_") and not name.startswith(ITSELF):
                # An empty label is none in Prometheus: today's node_exporter says device_error="" of each mount.
                series = name, frozenset((label, value) for label, value in labels.items() if value)
                assert series not in exposition.values, series
                exposition.values[series] = value
                exposition.kinds[name] = family.type
                exposition.helps[name] = family.documentation
    return exposition


def scraped(exporter: NodeExporter, *collectors: str) -> Exposition:
    status, body = http(f"{exporter.url}/metrics?" + "&".join(f"collect[]={name}" for name in collectors))
    assert status == 200, body
    return parsed(body.decode())


@pytest.fixture(scope="module", params=["prometheus-node-exporter", "node_exporter"])
def exporter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeExporter]:
    if request.param == "prometheus-node-exporter":
        yield request.getfixturevalue("node_exporter")
        return
    with NodeExporter(tmp_path_factory.mktemp("node_exporter"), request.param) as newer:
        yield newer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of the page."""
    start = PAGE.index("    [sinks.main]")
    path = tmp_path_factory.mktemp("configuration") / "hostprobe.toml"
    path.write_text(textwrap.dedent(PAGE[start : PAGE.index("\n\n## ", start)]))
    return path


@pytest.fixture(scope="module")
def moments(exporter: NodeExporter, path: Path) -> Iterator[Iterator[Moment]]:
    agent = Agent(config.load(str(path), environment={}), Log("warning", "json"), sinks=False)
    serializer = agent.serializer("prometheus", "node_exporter")

    def take() -> Iterator[Moment]:
        while True:
            before = scraped(exporter, *COLLECTORS)
            agent.cycle.collect()
            after = scraped(exporter, *COLLECTORS)
            buffer = Buffer()
            serializer.write(agent.cycle.frame, buffer)
            yield Moment(before, parsed(buffer.data.decode() + "\n"), after)

    with closing(agent):
        yield take()


@pytest.fixture(scope="module")
def moment(moments: Iterator[Moment]) -> Moment:
    return next(moments)


def is_hidden(series: Series) -> bool:
    return any(label in HIDDEN and HIDDEN[label].fullmatch(value) for label, value in series[1])


def is_second_mount(series: Series, ours: Exposition) -> bool:
    """Whether the device is shown where it is mounted first."""
    name, labels = series
    device = dict(labels).get("device", "")
    shown = {dict(other)["device"] for known, other in ours.values if known == name} if "/" in device else set()
    return "mountpoint" in dict(labels) and device in shown


def is_as_theirs(series: Series, moment: Moment) -> bool:
    before, ours, after = (exposition.values[series] for exposition in moment)
    name, labels = series
    if STILL.fullmatch(name):
        return before == ours == after
    low, high = min(before, after), max(before, after)
    if GROWING.fullmatch(name):
        slack = BACKWARDS_SECONDS if ("mode", "idle") in labels or ("mode", "iowait") in labels else 0
        return low * (1 - ROUNDING) - slack <= ours <= high * (1 + ROUNDING) + slack
    slack = next((slack for names, slack in SLACKS.items() if re.fullmatch(names, name)), 0)
    return low - slack <= ours <= high + slack


def test_every_name_that_it_takes_is_one_of_theirs(moment: Moment) -> None:
    assert moment.ours.names
    assert moment.ours.names <= CLAIMED
    shared = moment.ours.names - NEWER
    assert shared <= moment.after.names
    assert {name: moment.ours.kinds[name] for name in shared} == {name: moment.after.kinds[name] for name in shared}


def test_help_is_theirs(moment: Moment) -> None:
    shared = moment.ours.names & moment.after.names
    assert {name: moment.ours.helps[name] for name in shared} == {name: moment.after.helps[name] for name in shared}


def test_every_series_is_one_of_theirs_with_the_same_labels(moment: Moment) -> None:
    unknown = [series for series in moment.ours.values if series not in moment.after.values and not is_hidden(series)]
    assert [series for series in unknown if series[0] not in NEWER] == []


def test_no_claimed_series_is_missing(moment: Moment) -> None:
    missing = [
        (series, value)
        for series, value in moment.after.values.items()
        if series[0] in CLAIMED and series not in moment.ours.values
    ]
    for series, value in missing:
        if series[0] == "node_network_speed_bytes":
            assert value < 0, f"{series}: a link whose speed is known"
        else:
            assert is_hidden(series) or is_second_mount(series, moment.ours), series


def test_values_are_theirs(moments: Iterator[Moment]) -> None:
    """What holds still and what grows at every moment, and each gauge at one of them: a host is never quite quiet."""
    pending: dict[Series, object] = {}
    for number, moment in zip(range(ROUNDS_MAX), moments, strict=False):
        compared = moment.ours.values.keys() & moment.before.values.keys() & moment.after.values.keys()
        assert len(compared) > 100
        wrong = {
            series: [exposition.values[series] for exposition in moment]
            for series in compared
            if not is_as_theirs(series, moment)
        }
        moving = {series for series in wrong if not STILL.fullmatch(series[0]) and not GROWING.fullmatch(series[0])}
        assert {series: values for series, values in wrong.items() if series not in moving} == {}
        known = wrong if number == 0 else pending
        pending = {series: wrong[series] for series in moving & known.keys()}
        if not pending:
            return
    pytest.fail(f"after {ROUNDS_MAX} rounds: {pending}")


def test_the_page_lists_what_has_no_column(exporter: NodeExporter) -> None:
    theirs = scraped(exporter, *(name for name in COLLECTORS if name != UNLISTED)).names
    section = PAGE[PAGE.index("## What has no column") : PAGE.index("## Differences")]
    always, some = set(), set()
    for _, everywhere, somewhere, *_ in (line.split("|")[1:] for line in section.splitlines() if line[:3] == "| `"):
        always |= set(re.findall(r"`(node_\w+)`", everywhere))
        some |= set(re.findall(r"`(node_\w+)`", somewhere))
    assert not (always | some) & CLAIMED
    assert always <= theirs - CLAIMED <= always | some


def test_the_configuration_of_the_page_has_the_names(path: Path, moment: Moment) -> None:
    command = [sys.executable, "-m", "agent", "once", "--wait", "0", "--format", "prometheus", "--config", str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert parsed(done.stdout).kinds == moment.ours.kinds
