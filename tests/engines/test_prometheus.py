"""Debian's Prometheus: it scrapes the agent's pages, and takes its remote writes, of which it refuses some."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.engines.agent_process import PATIENT, Hostprobe, milliseconds, needs_root
from tests.engines.process import LOCALHOST, free_ports, http, patiently
from tests.engines.stores import Prometheus

PASSWORD = "p4ssword-of-nobody"
SCRAPED = ("prometheus", "openmetrics", "private")
REFUSED = ("without-certificate", "wrong-password")
# What a label's value has to have escaped, and what no label can hold as it is.
MOUNT_POINTS = (b'a "quoted" one', b"back\\slash", b"two\nlines", b"no utf-8 \xff\xfe", "größer ☃".encode())


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
        for time, sequence in sequences.items():
            found.setdefault(int(sequence), []).append(values[time])
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
    mounts = [os.fsencode(folder) + b"/" + name for name in MOUNT_POINTS]
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
        targets = {one["labels"]["job"]: one for one in store.targets()}
        assert {result["metric"]["job"]: result["value"][1] for result in store.query("up")} == {
            **dict.fromkeys(SCRAPED, "1"),
            **dict.fromkeys(REFUSED, "0"),
        }
    return Scraped(store, targets, {frame["sequence"]: frame for frame in agent.frames()}, os.fsencode(folder))


def in_own_namespace(mounts: Sequence[bytes]) -> Sequence[str]:
    """Runs a command where a tmpfs is mounted at each of some paths, which nobody else sees."""
    script = "count=$1; shift; while [ $count -gt 0 ]; do mount -t tmpfs -o size=1m odd \"$1\" || exit; "
    script += "shift; count=$((count - 1)); done; exec \"$@\""
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
    in_time_order = [value for _, value in sorted(series(scraped.store, f'hostprobe_frame_sequence{{job="{job}"}}').items())]
    assert in_time_order == sorted(in_time_order)
    seen = sequences(scraped.store, job)
    assert seen == [seen[0] + number for number in range(len(seen))]
    (result,) = scraped.store.query(f'hostprobe_frame_sequence{{job="{job}"}}[1h]')
    frame = scraped.frames[int(seen[0])]
    assert {"env": "test", "job": job, "host": frame["host"], "run": frame["instance"]}.items() <= result["metric"].items()


@pytest.mark.parametrize("job", SCRAPED)
@pytest.mark.parametrize(
    ("metric", "labels", "value"),
    [
        ("hostprobe_memory_total_bytes", "", lambda frame: frame["memory"]["total_bytes"]),
        ("hostprobe_memory_available_bytes", "", lambda frame: frame["memory"]["available_bytes"]),
        ("hostprobe_host_boot_time_unix_seconds", "", lambda frame: frame["host_table"]["boot_time_unix_seconds"]),
        ("hostprobe_cpu_user_seconds_total", "", lambda frame: frame["cpu"]["user_seconds_total"]),
        ("hostprobe_cpu_context_switches_total", "", lambda frame: frame["cpu"]["context_switches_total"]),
        ("hostprobe_cpu_core_idle_seconds_total", ',core="0"', lambda frame: frame["cpu_core"][0]["idle_seconds_total"]),
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
@pytest.mark.parametrize("name", MOUNT_POINTS, ids=str)
def test_odd_mount_points(scraped: Scraped, job: str, name: bytes) -> None:
    """Each comes as it is, or, where it is no UTF-8, with an escape."""
    mountpoint = (scraped.folder + b"/" + name).decode(errors="surrogateescape")
    shown = mountpoint.encode(errors="backslashreplace").decode()
    labels = f",mountpoint={json.dumps(shown, ensure_ascii=False)}"
    found = scraped.values(job, "hostprobe_filesystem_size_bytes", labels)
    assert len(found) >= 6
    assert {value for held in found.values() for value in held} == {1 << 20}


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
