"""The control socket of a running agent, and of one that is no more."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from agent.control import ControlSocket, LogLine, ProbeState, SinkState, State, ask
from agent.daemon import control_path
from agent.errors import HostprobeError, UsageError
from tests.processes import ended, environment, started, until, usage_error

STATE = State(
    version="0.1.0",
    pid=7,
    host="web-1",
    instance="6f0c",
    config="/etc/hostprobe/hostprobe.toml",
    uptime_seconds=12.5,
    cpu_seconds=0.5,
    resident_bytes=None,
    interval_seconds=10.0,
    frames=2,
    missed_cycles=0,
    problems=[],
    reloads=1,
    reload_failures=0,
    reload_error="",
    sinks=[SinkState("main", "stdout", "closed", 1, 0, 1, 8000, 0, 0.001)],
    probes=[ProbeState("cpu", True, 0, 0.0001), ProbeState("load", None, 0, None)],
    latest=[LogLine(1, "warning", "probe fails", {"probe": "load"})],
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "control.sock")


@pytest.fixture
def agents() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that are killed if the test ends before they do."""
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for one in running:
        with one:
            one.kill()


def test_each_connection_is_answered_with_the_state_of_its_moment(path: str) -> None:
    counts = iter(range(100))
    control = ControlSocket(path, lambda: msgspec.structs.replace(STATE, frames=next(counts)))
    assert [ask(path) for _ in range(3)] == [msgspec.structs.replace(STATE, frames=frames) for frames in range(3)]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    control.close()
    assert not os.path.exists(path)
    with pytest.raises(HostprobeError, match="no agent runs with this control socket"):
        ask(path)


def test_whoever_connects_and_hangs_up_or_says_nothing_holds_up_nobody_for_long(path: str) -> None:
    control = ControlSocket(path, lambda: STATE)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.connect(path)
    assert ask(path) == STATE
    control.close()


def test_a_state_that_can_not_be_told_ends_no_thread(path: str) -> None:
    answers = iter([RuntimeError("no"), None])

    def state() -> State:
        error = next(answers)
        if error is not None:
            raise error
        return STATE

    control = ControlSocket(path, state)
    with pytest.raises(HostprobeError, match="no agent of this version"):
        ask(path)
    assert ask(path) == STATE
    control.close()


def test_the_socket_of_a_dead_process_is_replaced_and_of_a_living_one_not(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    control = ControlSocket(path, lambda: STATE)
    assert ask(path) == STATE
    with pytest.raises(UsageError, match=r"control\.sock: .*expected a control socket of its own"):
        ControlSocket(path, lambda: STATE)
    assert ask(path) == STATE
    control.close()


def test_a_file_that_is_no_socket_stays(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(UsageError, match=r"control\.sock: "):
        ControlSocket(path, lambda: STATE)
    assert Path(path).read_text() == "precious"


def test_the_socket_of_a_successor_stays(path: str) -> None:
    control = ControlSocket(path, lambda: STATE)
    os.unlink(path)
    successor = ControlSocket(path, lambda: STATE)
    control.close()
    assert ask(path) == STATE
    successor.close()


def test_what_answers_otherwise_is_one_line(path: str) -> None:
    with socket.create_server(path, family=socket.AF_UNIX) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(HostprobeError, match="what answers is no agent of this version"):
            ask(path)
        thread.join()


@pytest.mark.parametrize(
    ("configured", "given", "expected"),
    [
        ("", {}, ""),
        ("/a/b", {"RUNTIME_DIRECTORY": "/run/hostprobe"}, "/a/b"),
        ("", {"RUNTIME_DIRECTORY": "/run/hostprobe"}, "/run/hostprobe/control.sock"),
        ("", {"RUNTIME_DIRECTORY": "/run/hostprobe:/run/other"}, "/run/hostprobe/control.sock"),
    ],
)
def test_where_it_is(configured: str, given: dict[str, str], expected: str) -> None:
    assert control_path(configured, given) == expected


def test_a_place_where_no_socket_can_be_is_found_out_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, fault in (
        (tmp_path / "no/x.sock", "its directory is absent"),
        (tmp_path / "file", "something else is there"),
        (tmp_path / ("x" * 108), "longer than 107 bytes"),
    ):
        told = environment(HOSTPROBE__AGENT__CONTROL_SOCKET=str(place))
        assert usage_error("check", env=told) == f"{place}: {fault}: expected a place for a control socket"


def test_an_agent_tells_how_it_does(path: str, tmp_path: Path, agents: list[subprocess.Popen[bytes]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = server.getsockname()[1]
    config = tmp_path / "hostprobe.toml"
    config.write_text(
        f'[agent]\ninterval = "10ms"\nhostname = "web-1"\n[sinks.main]\ntype = "stdout"\n'
        f'[sinks.peer]\ntype = "tcp"\naddress = "127.0.0.1:{dead}"\n'
    )
    told = environment(RUNTIME_DIRECTORY=str(tmp_path))
    agent = started("run", "--config", config, env=told, stdout=subprocess.DEVNULL)
    agents.append(agent)
    until(lambda: os.path.exists(path) and ask(path).latest and ask(path).frames > 20, agent)
    state = ask(path)
    assert (state.pid, state.host, state.config) == (agent.pid, "web-1", str(config))
    assert state.interval_seconds >= 0.01
    assert (state.problems, state.reloads, state.reload_error) == ([], 0, "")
    main, peer = state.sinks
    assert (main.name, main.type, main.circuit, main.dropped_frames) == ("main", "stdout", "closed", 0)
    assert main.sent_frames > 0
    assert peer.failures > 0
    assert peer.sent_frames == 0
    assert peer.backlog_frames > 0
    assert all(probe.up for probe in state.probes if probe.name != "agent")
    assert state.latest[-1].fields["sink"] == "peer"
    config.write_text("[agent")
    agent.send_signal(signal.SIGHUP)
    until(lambda: ask(path).reload_failures == 1, agent)
    assert str(config) in ask(path).reload_error
    agent.terminate()
    ended(agent)
    assert not os.path.exists(path)


def test_a_second_agent_says_that_the_socket_is_taken(path: str, agents: list[subprocess.Popen[bytes]]) -> None:
    told = environment(HOSTPROBE__AGENT__CONTROL_SOCKET=path)
    agents.append(started("run", "--interval", "1h", env=told, stdout=subprocess.DEVNULL))
    until(lambda: os.path.exists(path) and ask(path).frames == 0, agents[0])
    message = usage_error("run", "--interval", "1h", env=told)
    assert message == f"{path}: Address already in use: expected a control socket of its own"
    assert ask(path).pid == agents[0].pid
