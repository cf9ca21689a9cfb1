"""The loop of a run: its watchdog hears of real progress only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import config
from agent.assembly import Agent
from agent.daemon import Daemon
from agent.logs import Log
from agent.notify import Notifier
from agent.sink_worker import SinkWorker
from agent.waker import Waker

CYCLES = 40


@pytest.fixture
def agent() -> Iterator[Agent]:
    overrides = {"a test": {"agent": {"interval": "10ms"}, "sinks": {"main": {"type": "file", "path": os.devnull}}}}
    built = Agent(config.load(None, "minimal", overrides, {}), Log("error"))
    built.exporter.open()
    yield built
    built.exporter.close(1)
    built.close()


@pytest.mark.parametrize("thread", ["lives", "has ended"])
def test_the_watchdog_hears_nothing_where_a_sinks_thread_has_ended(
    agent: Agent, thread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if thread == "has ended":  # by a defect: nobody has asked it to
        monkeypatch.setattr(SinkWorker, "_claim_and_deliver", lambda worker: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"})
        agent.exporter.start(lambda: None)
        (worker,) = agent.exporter.workers
        assert worker.has_ended_within(60 if thread == "has ended" else 0) == (thread == "has ended")
        assert Daemon(agent, Waker(), notifier, Log("error"), lambda: agent.config, CYCLES).run()
        notifier.close()
        heard = []
        while True:
            try:
                heard.append(manager.recv(4096))
            except BlockingIOError:
                break
    assert heard[0].startswith(b"READY=1\n")
    assert (b"WATCHDOG=1" in heard) == (thread == "lives")
