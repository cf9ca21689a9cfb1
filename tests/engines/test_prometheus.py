"""Debian's Prometheus: it scrapes the agent's pages, and takes its remote writes, of which it refuses some."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from agent.delivery import Drop
from tests.engines.agent_process import Hostprobe, SteppedAgent, milliseconds, needs_root
from tests.engines.process import LOCALHOST, free_ports, http, patiently
from tests.engines.stores import Prometheus
from tests.workers import events, until

PASSWORD = "p4ssword-of-nobody"
SCRAPED = ("prometheus", "openmetrics", "private")
REFUSED = ("without-certificate", "wrong-password")
MOUNT_POINTS = (b'a "quoted" one', b"back\\slash", b"two\nlines", "größer ☃".encode())
NO_UTF_8 = (b"no utf-8 \xff", b"no utf-8 \xfe")


def series(store: Prometheus, selector: str) -> dict[int, float]:
    """All samples of the one series that a selector matches: time in milliseconds, value."""
    (result,) = store.query(f"{selector}[1h]")
    return {round(seconds * 1000): float(value) for seconds, value in result["values"]}


# Scraped -------------------------------------------------------------------------------------


class Certificates:
    """Files: an authority, a certificate of 127.0.0.1 by it, and one of a client."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        authority = trustme.CA()
        self.authority = self._write("ca.pem", authority.cert_pem.bytes())
        self.server = self._pair("server", authority.issue_cert(LOCALHOST))
        self.client = self._pair("client", authority.issue_cert("scraper@hosts.example"))

    def _pair(self, name: str, leaf: trustme.LeafCert) -> tuple[str, str]:
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return self._write(f"{name}.pem", chain), self._write(f"{name}.key", leaf.private_key_pem.bytes())

    def _write(self, name: str, content: bytes) -> str:
        path = self._folder / name
        path.write_bytes(content)
        path.chmod(0o600)
        return str(path)


@dataclass
class Scraped:
    """What a Prometheus has of an agent that is no more.

    Attributes:
        targets: by job, while it still ran.
        frames: the agent's own, by their sequence.
        folder: where its file systems were mounted.
    """

    store: Prometheus
    targets: Mapping[str, Mapping[str, Any]]
    frames: Mapping[int, Mapping[str, Any]]
    folder: bytes

    def values(self, job: str, metric: str, labels: str = "") -> dict[int, list[float]]:
        """What was scraped of a series, by the sequence that came with it."""
        sequences = series(self.store, f'hostprobe_frame_sequence{{job="{job}"}}')
        values = series(self.store, f'{metric}{{job="{job}"{labels}}}')
        assert values.keys() == sequences.keys()
        found: dict[int, list[float]] = {}
        for at_ms, sequence in sequences.items():
            found.setdefault(int(sequence), []).append(values[at_ms])
        return found


@pytest.fixture(scope="module")
def scraped(prometheus: Callable[..., Prometheus], tmp_path_factory: pytest.TempPathFactory) -> Scraped:
    """One agent with three pages, which is scraped four times in each of its cycles until each job has six frames."""
    needs_root()
    folder = tmp_path_factory.mktemp("scraped")
    ports = dict(zip(SCRAPED, free_ports(3), strict=True))
    certificates = Certificates(folder)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o600)
    mounts = [os.fsencode(folder) + b"/" + name for name in (*MOUNT_POINTS, *NO_UTF_8)]
    for mount in mounts:
        os.mkdir(mount)
    certificate, key = certificates.server
    sinks = {name: {"type": "prometheus", "address": f"{LOCALHOST}:{port}"} for name, port in ports.items()}
    sinks["prometheus"] |= {"format": "prometheus"}
    sinks["openmetrics"] |= {"format": "openmetrics"}
    sinks["private"] |= {
        "format": "openmetrics",
        "basic": {"user": "scraper", "password": {"file": str(folder / "password")}},
        "tls": {"certificate": certificate, "key": key, "client_ca": certificates.authority},
    }
    agent = Hostprobe(
        folder, sinks, probes={"filesystem": {"exclude_types": ["proc", "sysfs"]}}, prefix=in_own_namespace(mounts)
    )
    store = prometheus(configuration={"scrape_configs": list(jobs(ports, certificates))})
    with agent:
        patiently(lambda: all(len(sequences(store, job)) >= 6 for job in SCRAPED), "each job has six frames")
        expected = dict.fromkeys(SCRAPED, "1") | dict.fromkeys(REFUSED, "0")
        patiently(lambda: ups(store) == expected, f"up is {expected}")
        targets = {one["labels"]["job"]: one for one in store.targets()}
    return Scraped(store, targets, {frame["sequence"]: frame for frame in agent.frames()}, os.fsencode(folder))


def ups(store: Prometheus) -> dict[str, str]:
    """By job, whether its last scrape went well."""
    return {result["metric"]["job"]: result["value"][1] for result in store.query("up")}


def in_own_namespace(mounts: Sequence[bytes]) -> Sequence[str]:
    """Runs a command where a tmpfs is mounted at each of some paths, which nobody else sees."""
    # The agent reads the mounts of process 1, whose namespace it takes for the host's: here it is process 1 itself.
    script = """
count=$1; shift
for path; do
    [ $count -gt 0 ] || break
    mount -t tmpfs -o size=1m odd "$path" || exit
    shift; count=$((count - 1))
done
mount --bind /proc/$$ /proc/1 && exec "$@"
"""
    paths = [os.fsdecode(mount) for mount in mounts]
    return ["unshare", "--mount", "--propagation=private", "sh", "-c", script, "sh", str(len(paths)), *paths]


def jobs(ports: Mapping[str, int], certificates: Certificates) -> Iterator[dict[str, Any]]:
    certificate, key = certificates.client
    authority = {"ca_file": certificates.authority}
    client = {**authority, "cert_file": certificate, "key_file": key}
    private = {
        "private": (PASSWORD, client),
        "without-certificate": (PASSWORD, authority),
        "wrong-password": (PASSWORD[:-1], client),
    }
    for job in (*SCRAPED, *REFUSED):
        port = ports.get(job, ports["private"])
        plain = {
            "job_name": job,
            "scrape_interval": "250ms",
            "scrape_timeout": "250ms",
            "static_configs": [{"targets": [f"{LOCALHOST}:{port}"]}],
        }
        if job not in private:
            yield plain
        else:
            password, tls = private[job]
            basic = {"username": "scraper", "password": password}
            yield {**plain, "scheme": "https", "basic_auth": basic, "tls_config": tls}


def sequences(store: Prometheus, job: str) -> list[float]:
    """The different ones that a job has seen, in their order."""
    found = store.query(f'hostprobe_frame_sequence{{job="{job}"}}[1h]')
    return sorted({float(value) for result in found for _, value in result["values"]})


@pytest.mark.parametrize("job", SCRAPED)
def test_a_target_is_up(scraped: Scraped, job: str) -> None:
    target = scraped.targets[job]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["scrapeUrl"].startswith("https:" if job == "private" else "http:")


def test_whoever_is_not_allowed_gets_nothing(scraped: Scraped) -> None:
    errors = {job: scraped.targets[job]["lastError"] for job in REFUSED}
    assert "certificate required" in errors["without-certificate"]
    assert errors["wrong-password"] == "server returned HTTP status 401 Unauthorized"
    assert [sequences(scraped.store, job) for job in REFUSED] == [[], []]


@pytest.mark.parametrize("job", SCRAPED)
def test_the_sequence_grows_by_one(scraped: Scraped, job: str) -> None:
    """Who scrapes more often than a cycle lasts sees every frame."""
    in_time_order = [
        value for _, value in sorted(series(scraped.store, f'hostprobe_frame_sequence{{job="{job}"}}').items())
    ]
    assert in_time_order == sorted(in_time_order)
    seen = sequences(scraped.store, job)
    assert seen == [seen[0] + number for number in range(len(seen))]
    (result,) = scraped.store.query(f'hostprobe_frame_sequence{{job="{job}"}}[1h]')
    frame = scraped.frames[int(seen[0])]
    assert {"env": "test", "job": job, "host": frame["host"], "run": frame["instance"]}.items() <= result[
        "metric"
    ].items()


@pytest.mark.parametrize("job", SCRAPED)
@pytest.mark.parametrize(
    ("metric", "labels", "value"),
    [
        ("hostprobe_memory_total_bytes", "", lambda frame: frame["memory"]["total_bytes"]),
        ("hostprobe_memory_available_bytes", "", lambda frame: frame["memory"]["available_bytes"]),
        ("hostprobe_host_boot_time_unix_seconds", "", lambda frame: frame["host_table"]["boot_time_unix_seconds"]),
        ("hostprobe_cpu_user_seconds_total", "", lambda frame: frame["cpu"]["user_seconds_total"]),
        ("hostprobe_cpu_context_switches_total", "", lambda frame: frame["cpu"]["context_switches_total"]),
        (
            "hostprobe_cpu_core_idle_seconds_total",
            ',core="0"',
            lambda frame: frame["cpu_core"][0]["idle_seconds_total"],
        ),
        ("hostprobe_frame_time_unix_seconds", "", lambda frame: frame["time_unix_ns"] / 1e9),
    ],
)
def test_values_are_those_of_the_frame(
    scraped: Scraped, job: str, metric: str, labels: str, value: Callable[[Mapping[str, Any]], float]
) -> None:
    found = scraped.values(job, metric, labels)
    assert len(found) >= 6
    assert found == {sequence: [value(scraped.frames[sequence])] * len(held) for sequence, held in found.items()}


@pytest.mark.parametrize("job", SCRAPED)
@pytest.mark.parametrize("name", MOUNT_POINTS, ids=ascii)
def test_odd_mount_points(scraped: Scraped, job: str, name: bytes) -> None:
    assert sizes(scraped, job, (scraped.folder + b"/" + name).decode()) == {1 << 20}


def test_mount_points_that_are_no_utf_8(scraped: Scraped) -> None:
    """They have escapes, so that two series stay two, as docs/formats.md has it."""
    for name in NO_UTF_8:
        path = (scraped.folder + b"/" + name).decode(errors="backslashreplace")
        assert sizes(scraped, "prometheus", path) == {1 << 20}


def sizes(scraped: Scraped, job: str, mountpoint: str) -> set[float]:
    """All that were scraped of a file system."""
    found = scraped.values(job, "hostprobe_filesystem_size_bytes", f",mountpoint={json.dumps(mountpoint)}")
    assert len(found) >= 6
    return {value for held in found.values() for value in held}


def test_kinds_are_understood(scraped: Scraped) -> None:
    """By the name of a counter's family one sees which format was read: OpenMetrics' has no _total."""
    for job, metric in (("prometheus", "hostprobe_cpu_forks_total"), ("openmetrics", "hostprobe_cpu_forks")):
        assert metadata(scraped.store, job, metric) == [("counter", "Processes and threads created.")]
        assert [kind for kind, _ in metadata(scraped.store, job, "hostprobe_load_load1")] == ["gauge"]


def metadata(store: Prometheus, job: str, metric: str) -> list[tuple[str, str]]:
    """The kind and the help of a metric, as a target's last scrape said them."""
    parameters = {"match_target": f'{{job="{job}"}}', "metric": metric}
    status, body = http(f"{store.url}/api/v1/targets/metadata", parameters=parameters)
    assert status == 200, body
    return [(one["type"], one["help"]) for one in json.loads(body)["data"]]


# Written ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def receiver(prometheus: Callable[..., Prometheus]) -> Prometheus:
    return prometheus()


def test_nothing_is_missing_where_prometheus_was_away(receiver: Prometheus, tmp_path: Path) -> None:
    sinks = {"store": {"type": "remote_write", "url": receiver.write_url}}
    with Hostprobe(tmp_path, sinks, {"interval": "200ms", "hostname": "away"}) as agent:
        patiently(lambda: len(agent.frames()) >= 5, "five frames before")
        receiver.stop()
        patiently(lambda: agent.events("sink fails, its ring holds the frames"), "it was missed")
        meanwhile = len(agent.frames())
        patiently(lambda: len(agent.frames()) >= meanwhile + 3, "three frames meanwhile")
        receiver.start()
        patiently(lambda: agent.events("sink delivers again"), "it is back")
        later = len(agent.frames())
        patiently(lambda: len(agent.frames()) >= later + 5, "five frames after")
    frames = agent.frames()
    assert [frame["sequence"] for frame in frames] == list(range(1, len(frames) + 1))
    own = '{instance="away"}'
    for metric, value in (
        ("hostprobe_frame_sequence", lambda frame: frame["sequence"]),
        ("hostprobe_cpu_user_seconds_total", lambda frame: frame["cpu"]["user_seconds_total"]),
        ("hostprobe_memory_total_bytes", lambda frame: frame["memory"]["total_bytes"]),
        ("hostprobe_host_boot_time_unix_seconds", lambda frame: frame["host_table"]["boot_time_unix_seconds"]),
    ):
        assert series(receiver, metric + own) == {milliseconds(frame): value(frame) for frame in frames}
    (count,) = receiver.query(f"count_over_time(hostprobe_frame_sequence{own}[1h])")
    assert count["metric"].items() >= {"job": "hostprobe", "instance": "away", "env": "test", "host": "away"}.items()
    assert count["value"][1] == str(len(frames))
    assert len(agent.events("sink fails, its ring holds the frames")) == 1
    assert agent.events("sink's peer refuses frames, they are dropped") == []


class SetClock(SteppedAgent):
    """Its frames have the times that a test gives them, as if the host's clock was set.

    Args:
        batch: how many frames are delivered at once; so many are waited for.
    """

    def __init__(self, folder: Path, store: Prometheus, hostname: str, batch: int) -> None:
        batches = {"records": batch, "linger": "1h"}
        super().__init__(folder, {"type": "remote_write", "url": store.write_url, "batch": batches}, hostname)
        self._batch = batch
        self._store = store
        self._selector = f'hostprobe_frame_sequence{{instance="{hostname}"}}'
        self._began_seconds = int(time.time()) - 600
        self._now_seconds = 0

    def clock(self) -> SimpleNamespace:
        """Stands in for the module `time` in the cycle."""
        return SimpleNamespace(
            time_ns=lambda: self._now_seconds * 1_000_000_000,
            monotonic_ns=time.monotonic_ns,
            perf_counter_ns=time.perf_counter_ns,
        )

    def run(self, *seconds: int) -> None:
        """A frame for each of some times, in batches that are settled one after the other."""
        for number, at in enumerate(seconds, 1):
            self._now_seconds = self._began_seconds + at
            self.step()
            if number % self._batch == 0:
                until(lambda: self.worker.frames[2] == 0, "all are settled")

    def stored(self) -> list[tuple[int, int]]:
        """What Prometheus has: seconds and sequence."""
        found = series(self._store, self._selector)
        return [(at_ms // 1000 - self._began_seconds, int(sequence)) for at_ms, sequence in found.items()]


@pytest.fixture
def set_clock(receiver: Prometheus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], SetClock]:
    def build(hostname: str, batch: int) -> SetClock:
        built = SetClock(tmp_path, receiver, hostname, batch)
        monkeypatch.setattr("agent.cycle.time", built.clock())
        return built

    return build


def refusals(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Why frames were refused, as the log says; it says nothing else."""
    logged = events(capsys)
    assert {one["event"] for one in logged} <= {"sink's peer refuses frames, they are dropped"}
    return [one["reason"] for one in logged]


def test_frames_out_of_order_are_dropped_alone(
    receiver: Prometheus, set_clock: Callable[[str, int], SetClock], capsys: pytest.CaptureFixture[str]
) -> None:
    """A batch with two that are older than what was stored before it: Prometheus refuses it whole."""
    with set_clock("disorder", 5) as agent:
        agent.run(0, 1, 2, 3, 4)
        assert refusals(capsys) == []
        agent.run(5, -10, 6, -9, 7)
        assert agent.worker.frames == (8, 2, 0)
        assert agent.worker.ring.drops[Drop.REJECTED] == 2
        assert refusals(capsys) == [f"remote_write {receiver.write_url}: 400 Bad Request: out of order sample"]
        agent.run(8, 9, 10, 11, 12)
        assert agent.worker.frames == (13, 2, 0)
        assert refusals(capsys) == []
        before, after = [(at, at + 1) for at in range(5)], [(at, at + 3) for at in range(8, 13)]
        assert agent.stored() == [*before, (5, 6), (6, 8), (7, 10), *after]


def test_a_clock_that_was_set_back(
    receiver: Prometheus, set_clock: Callable[[str, int], SetClock], capsys: pytest.CaptureFixture[str]
) -> None:
    """Frames are refused until it is as late again as it was: one line says so, however many they are."""
    with set_clock("clock", 1) as agent:
        agent.run(0, 1, 2, 3, 4, 5)
        agent.run(2, 3, 4)  # a second that Prometheus has another sample of, at last
        assert refusals(capsys) == [f"remote_write {receiver.write_url}: 400 Bad Request: out of order sample"]
        agent.run(5)
        agent.run(6, 7, 8)
        assert agent.worker.frames == (9, 4, 0)
        assert agent.worker.ring.drops[Drop.REJECTED] == 4
        agent.run(7)  # within the same minute, of which it was told already
        agent.run(9)
        assert refusals(capsys) == []
        assert agent.worker.frames == (10, 5, 0)
        assert agent.stored() == [*((at, at + 1) for at in range(6)), (6, 11), (7, 12), (8, 13), (9, 15)]


def test_a_clock_that_was_set_back_within_a_batch(set_clock: Callable[[str, int], SetClock]) -> None:
    """What was counted as sent is stored."""
    with set_clock("within", 5) as agent:
        agent.run(0, 1, -5, 2, 3)
        sent, dropped, _ = agent.worker.frames
        assert (len(agent.stored()), dropped) == (sent, 1)
