"""Reload by SIGHUP: what stays goes on, what changes is exchanged, what is wrong changes nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.control import ask
from tests.hosts import saved_host
from tests.processes import PATIENCE_SECONDS, ended, environment, output, started, until

RELOADS = 100


class Running:
    """An agent with a configuration that can be rewritten, and what it has written to the file `out`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "hostprobe.toml"
        self.out = folder / "out"
        self.process: subprocess.Popen[bytes]
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(folder / "notify"))
        self.manager.settimeout(PATIENCE_SECONDS)

    def write(self, *, interval: str = "10ms", sockets: str = "", more: str = "", agent: str = "") -> None:
        """Writes the configuration: a file sink `main`, no sockets unless given."""
        text = (
            f'[agent]\ninterval = "{interval}"\nalign = false\n{agent}'
            f"[probes.sockets]\n{sockets or 'enabled = false'}\n"
            f'[sinks.main]\ntype = "file"\npath = "{self.out}"\n{more}'
        )
        new = self.config.with_suffix(".new")
        new.write_text(text)
        new.rename(self.config)

    def start(self) -> None:
        told = environment(NOTIFY_SOCKET=str(self.folder / "notify"))
        self.process = started("run", "--config", self.config, env=told)
        assert self.hears().startswith("READY=1\n")

    def hears(self) -> str:
        return self.manager.recv(4096).decode()

    def reload(self) -> str:
        """SIGHUP, and what the service manager hears when it is done."""
        self.process.send_signal(signal.SIGHUP)
        while not (heard := self.hears()).startswith("RELOADING=1\n"):
            assert heard.startswith("STATUS=")
        ready = self.hears()
        assert ready.startswith("READY=1\nSTATUS=")
        return ready.partition("STATUS=")[2]

    def lines(self) -> list[dict[str, Any]]:
        whole = self.out.read_bytes() if self.out.exists() else b""
        return [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]

    def until_line(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The last line, once it is so."""
        until(lambda: (lines := self.lines()) and condition(lines[-1]), self.process)
        return self.lines()[-1]

    def stop(self) -> str:
        """Ends it; what it said on stderr."""
        self.process.terminate()
        status, _, stderr = ended(self.process)
        assert status == 0
        return stderr


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    one = Running(tmp_path)
    yield one
    one.manager.close()
    if hasattr(one, "process") and one.process.poll() is None:
        with one.process:
            one.process.kill()


def events(stderr: str) -> list[str]:
    return [json.loads(line)["event"] for line in stderr.splitlines()]


def test_a_hundred_reloads_lose_no_frame(running: Running) -> None:
    running.write()
    running.start()
    for number in range(RELOADS):
        more = (
            "",
            f'[sinks.second]\ntype = "file"\npath = "{running.folder}/second"\n',
            f'[sinks.second]\ntype = "file"\npath = "{running.folder}/second"\nformat = "influx"\n',
        )[number % 3]
        running.write(sockets=("", "connections = true", "tcp_states = false")[number % 3], more=more)
        assert "failed" not in running.reload()
    running.until_line(lambda line: line["agent"]["reloads_total"] == RELOADS)
    assert set(events(running.stop())) == {"configuration taken", "log lines held back"}
    total = json.loads(output("verify", "--format", "json", running.out))["total"]
    assert {name: total[name] for name in ("instances", "missing", "repeated", "reordered", "not_frames")} == {
        "instances": 1, "missing": 0, "repeated": 0, "reordered": 0, "not_frames": 0,
    }  # fmt: skip
    lines = running.lines()
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))
    assert len({line["instance"] for line in lines}) == 1
    assert {"tcp" in line for line in lines} == {True, False}
    # Rates of what stayed go on, also in the frame after a reload.
    assert all(row["receive_bytes_per_second"] is not None for line in lines[1:] for row in line["network"])


def test_a_wrong_file_leaves_all_as_it_was_and_is_told(running: Running) -> None:
    running.write()
    running.start()
    for text, reason in (
        ("[agent", "Expected"),
        ('[agent]\ninterval = "soon"', "agent.interval"),
        (f'[sinks.main]\ntype = "file"\npath = "{running.folder}/no/such"', "no/such"),
    ):
        running.config.write_text(text)
        status = running.reload()
        assert "reload failed: " in status
        assert reason in status
        assert str(running.config) in status
    running.config.unlink()
    assert "reload failed: " in running.reload()
    last = running.until_line(lambda line: line["agent"]["reload_failures_total"] == 4)
    assert last["agent"]["reloads_total"] == 0
    running.write(interval="20ms")
    assert "failed" not in running.reload()
    running.until_line(lambda line: line["agent"]["reloads_total"] == 1)
    assert events(running.stop()) == ["configuration not taken, the old one stays in force"] * 4 + [
        "configuration taken"
    ]
    sequences = [line["sequence"] for line in running.lines()]
    assert sequences == list(range(1, len(sequences) + 1))


def test_what_a_sink_held_is_there_after_its_exchange(running: Running) -> None:
    """Its ring is in a file, its peer away: another address, and the frames of before go there."""
    ring = f'buffer.path = "{running.folder}/ring"\n'
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running.write(more=f'[sinks.peer]\ntype = "tcp"\naddress = "127.0.0.1:{port}"\n{ring}')
    running.start()
    running.until_line(lambda line: line["sequence"] >= 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        running.write(more=f'[sinks.peer]\ntype = "tcp"\naddress = "127.0.0.1:{port}"\n{ring}')
        assert "failed" not in running.reload()
        server.settimeout(PATIENCE_SECONDS)
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as file:
            sequences = [json.loads(file.readline())["sequence"] for _ in range(30)]
    assert sequences == list(range(1, 31))
    running.stop()


def test_tags_and_host_name_and_interval_change_without_a_new_run(running: Running) -> None:
    running.write()
    running.start()
    running.until_line(lambda line: line["sequence"] >= 3)
    running.config.write_text(
        f'[agent]\ninterval = "5ms"\nalign = false\nhostname = "other"\ntags.env = "new"\n'
        f'[sinks.main]\ntype = "file"\npath = "{running.out}"\n'
    )
    running.reload()
    last = running.until_line(lambda line: line["host"] == "other")
    assert last["tags"] == {"env": "new"}
    running.stop()
    lines = running.lines()
    assert len({line["instance"] for line in lines}) == 1
    assert [line["sequence"] for line in lines] == list(range(1, len(lines) + 1))


def test_a_sink_that_hangs_is_exchanged_and_its_frames_go_to_the_next(running: Running) -> None:
    """Its thread is still delivering when its time is up; its ring is in a file."""
    ring = f'buffer.path = "{running.folder}/ring"\n'
    sink = f'[sinks.peer]\ntype = "tcp"\ntimeout = "30s"\nbatch.records = 1\n{ring}address = '
    with socket.create_server(("127.0.0.1", 0)) as stalling, socket.create_server(("127.0.0.1", 0)) as taking:
        stalling.settimeout(PATIENCE_SECONDS)
        taking.settimeout(PATIENCE_SECONDS)
        short = 'shutdown_timeout = "100ms"\n'
        running.write(more=f'{sink}"127.0.0.1:{stalling.getsockname()[1]}"\n', agent=short)
        running.start()
        held, _ = stalling.accept()  # and nobody reads from it
        with held:
            running.until_line(lambda line: line["sequence"] >= 50)
            running.write(more=f'{sink}"127.0.0.1:{taking.getsockname()[1]}"\n', agent=short)
            assert "failed" not in running.reload()
            connection, _ = taking.accept()
            with connection, connection.makefile("rb") as file:
                first = json.loads(file.readline())["sequence"]
                sequences = [json.loads(file.readline())["sequence"] for _ in range(40)]
    assert sequences == list(range(first + 1, first + 41))
    running.stop()
    last = running.lines()[-1]
    (row,) = [row for row in last["agent_sink"] if row["sink"] == "peer"]
    assert row["dropped_frames_total"] == 0
    assert row["sent_frames_total"] >= first - 1


def test_what_an_exchange_drops_is_counted(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = server.getsockname()[1]
    peer = f'[sinks.peer]\ntype = "tcp"\naddress = "127.0.0.1:{dead}"\n'
    short = 'shutdown_timeout = "50ms"\n'
    running.write(more=peer, agent=short)
    running.start()
    running.until_line(lambda line: line["sequence"] >= 10)
    running.write(more=f'{peer}retry.max_age = "1h"\n', agent=short)
    running.reload()

    def row(line: dict[str, Any]) -> dict[str, Any]:
        return next(row for row in line["agent_sink"] if row["sink"] == "peer")

    last = running.until_line(lambda line: row(line)["dropped_shutdown_frames_total"] >= 10)
    counts = row(last)
    assert counts["dropped_frames_total"] == counts["dropped_shutdown_frames_total"]
    # All frames before this one have been pushed.
    assert (
        counts["sent_frames_total"] + counts["dropped_frames_total"] + counts["backlog_frames"] == last["sequence"] - 1
    )
    running.stop()


def test_another_host_makes_no_rates_with_this_one(running: Running) -> None:
    running.write()
    running.start()
    running.until_line(lambda line: line["sequence"] >= 3)
    running.write(agent=f'root = "{saved_host("vm")}"\n')
    running.reload()
    boots = int((saved_host("vm") / "proc/stat").read_text().partition("btime ")[2].split()[0])
    running.until_line(lambda line: line["host_table"]["boot_time_unix_seconds"] == boots)
    running.stop()
    first = next(line for line in running.lines() if line["host_table"]["boot_time_unix_seconds"] == boots)
    assert first["cpu"]["usage_ratio"] is None
    assert {row["receive_bytes_per_second"] for row in first["network"]} == {None}


def test_what_is_no_file_any_more_is_not_waited_for(running: Running) -> None:
    running.write()
    running.start()
    running.config.unlink()
    os.mkfifo(running.config)
    assert "is no regular file" in running.reload()
    running.config.unlink()
    running.write()
    (running.folder / "conf.d").mkdir()
    os.mkfifo(running.folder / "conf.d/10.toml")
    assert "conf.d/10.toml: is no regular file" in running.reload()
    running.stop()


def test_a_reload_that_waits_pings_and_ends_with_the_agent(tmp_path: Path) -> None:
    running = Running(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as stalling, running.manager:
        stalling.settimeout(PATIENCE_SECONDS)
        peer = f'[sinks.peer]\ntype = "tcp"\ntimeout = "1h"\naddress = "127.0.0.1:{stalling.getsockname()[1]}"\n'
        running.write(more=peer, agent='shutdown_timeout = "1h"\n')
        running.process = started(
            "run", "--config", running.config,
            env=environment(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="600000"),
        )  # fmt: skip
        held, _ = stalling.accept()
        with held:
            running.until_line(lambda line: line["sequence"] >= 50)
            running.write(agent='shutdown_timeout = "1h"\n')
            running.process.send_signal(signal.SIGHUP)
            while not running.hears().startswith("RELOADING=1"):
                pass
            assert [running.hears() for _ in range(3)] == ["WATCHDOG=1"] * 3
            running.write(agent='shutdown_timeout = "10ms"\n')
            running.process.send_signal(signal.SIGTERM)
            status, _, _ = ended(running.process)
            assert status in (0, 1)  # what the peer didn't take is lost


def test_the_control_socket_moves(running: Running) -> None:
    first, second = running.folder / "first.sock", running.folder / "second.sock"
    running.write(agent=f'control_socket = "{first}"\n')
    running.start()
    assert ask(str(first)).reloads == 0
    running.write(agent=f'control_socket = "{second}"\n')
    running.reload()
    assert ask(str(second)).reloads == 1
    assert not first.exists()
    running.write(agent=f'control_socket = "{running.folder}/no/such.sock"\n')
    assert "reload failed" in running.reload()
    assert ask(str(second)).reload_failures == 1
    running.stop()


def test_a_watchdog_hears_a_living_agent_and_no_stopped_one(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_SECONDS)
        told = environment(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000")
        process = started("run", "--interval", "1h", env=told, stdout=subprocess.DEVNULL)
        with process:
            heard = [manager.recv(4096).decode() for _ in range(4)]
            assert heard[0].startswith("READY=1\n")
            assert heard[1:] == ["WATCHDOG=1"] * 3
            process.send_signal(signal.SIGSTOP)
            manager.settimeout(1.0)
            for _ in range(2):  # may have been on their way
                with suppress(TimeoutError):
                    manager.recv(4096)
            with pytest.raises(TimeoutError):
                manager.recv(4096)
            process.kill()


def test_sighup_while_it_starts_ends_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = started("run", "--interval", "10ms", "--cycles", "3", stdout=file)
    status_file = Path(f"/proc/{process.pid}/status")
    until(lambda: int(status_file.read_text().partition("SigIgn:\t")[2].split()[0], 16) & 1, process)
    process.send_signal(signal.SIGHUP)
    status, _, _ = ended(process)
    assert status == 0
    assert len(out.read_bytes().splitlines()) == 3
