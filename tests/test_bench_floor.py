"""The kernel's floor: the sources that the probes read, and a reader that looks at nothing of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import config
from agent.assembly import Agent
from agent.bench.floor import RawReader, Sources, first_cycle, together
from agent.logs import Log
from tests.hosts import saved_host

AgentOf = Callable[..., Agent]


@pytest.fixture
def agent_of() -> Iterator[AgentOf]:
    """`agent_of(template, root)`: an agent without sinks that has collected nothing."""
    agents = []

    def build(template: str = "standard", root: Path | str = "/") -> Agent:
        overrides = {"--root": {"agent": {"root": str(root)}}}
        agents.append(Agent(config.load(None, template, overrides, {}), Log(), sinks=False))
        return agents[-1]

    yield build
    for agent in agents:
        agent.close()


@pytest.fixture
def reader_of() -> Iterator[Callable[[Sources], RawReader]]:
    readers = []

    def build(sources: Sources) -> RawReader:
        readers.append(RawReader(sources))
        return readers[-1]

    yield build
    for reader in readers:
        reader.close()


def system_calls() -> int:
    """Reads of this process until now, as Linux counts them; asking is one."""
    figures = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(figures["syscr"])


@pytest.mark.parametrize("template", ["minimal", "standard", "full"])
@pytest.mark.parametrize("host", ["/", "vm"])
def test_sources_are_the_files_that_the_probes_keep_open(agent_of: AgentOf, template: str, host: str) -> None:
    agent = agent_of(template, "/" if host == "/" else saved_host(host))
    sources = first_cycle(agent)
    assert list(sources) == list(agent.config.probes)
    files = together(sources.values()).files
    kept = {file.path for file in agent.host.files if file.is_open}
    assert sorted(files) == sorted({*kept, "/proc/self/statm"})
    agent.cycle.collect()
    assert {file.path for file in agent.host.files if file.is_open} == kept


def test_sources_of_a_saved_host(agent_of: AgentOf) -> None:
    root = saved_host("vm")
    sources = first_cycle(agent_of("standard", root))
    assert [path.removeprefix(f"{root}/") for path in sources["host"].files] == ["proc/uptime", "proc/stat"]
    assert sources["cpu"] == Sources()  # it shares what the first one has read
    assert [path.removeprefix(f"{root}/") for path in sources["load"].files] == ["proc/loadavg"]
    assert sources["agent"].files == ("/proc/self/statm",)
    names = {Path(path).name for path in sources["sockets"].files}
    assert {"tcp", "tcp6", "udp", "unix", "snmp", "netstat", "sockstat"} <= names
    assert not any(each.dumps or each.places for each in sources.values())


def test_sources_of_this_host(agent_of: AgentOf) -> None:
    sources = first_cycle(agent_of("standard"))
    assert b"/" in sources["filesystem"].places
    assert len(sources["sockets"].dumps) == 4
    assert not {"tcp", "udp"} & {Path(path).name for path in sources["sockets"].files}


def test_a_probe_that_fails_hides_no_other(agent_of: AgentOf, tree: Callable[..., Path]) -> None:
    root = tree({"proc/uptime": "nonsense\n", "proc/loadavg": "0.20 0.18 0.12 1/80 11206\n"})
    agent = agent_of("standard", root)
    sources = first_cycle(agent)
    assert [Path(path).name for path in sources["host"].files] == ["uptime"]
    assert [Path(path).name for path in sources["load"].files] == ["loadavg"]
    assert "host" not in agent.cycle.frame.tables


def test_reading_takes_one_call_a_file(agent_of: AgentOf, reader_of: Callable[[Sources], RawReader]) -> None:
    sources = together(first_cycle(agent_of("standard", saved_host("vm"))).values())
    reader = reader_of(sources)
    assert reader.sources == sources
    start, asked = system_calls(), system_calls()
    reader.read()
    assert system_calls() - asked - (asked - start) == len(sources.files)


def test_what_cannot_be_read_is_left_out(tmp_path: Path, reader_of: Callable[[Sources], RawReader]) -> None:
    here = tmp_path / "here"
    here.write_bytes(b"1\n")
    descriptors = len(os.listdir("/proc/self/fd"))
    reader = reader_of(
        Sources(
            (str(here), str(tmp_path / "absent"), str(tmp_path)),  # a directory opens, and can't be read
            (os.fsencode(tmp_path), b"/no/such/place"),
            ((20, b"no request"), (99, b"")),
        )
    )
    assert reader.sources == Sources((str(here),), (os.fsencode(tmp_path),), ())
    reader.read()
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_dump_is_received_whole(agent_of: AgentOf, reader_of: Callable[[Sources], RawReader]) -> None:
    sources = Sources(dumps=first_cycle(agent_of("standard"))["sockets"].dumps)
    opened = [socket.socketpair(socket.AF_UNIX) for _ in range(400)]  # an answer of some datagrams
    try:
        reader = reader_of(sources)
        assert reader.sources == sources
        reader.read()
        assert reader._socket is not None
        with pytest.raises(BlockingIOError):
            reader._socket.recv(1, socket.MSG_DONTWAIT)
    finally:
        for pair in opened:
            for end in pair:
                end.close()
