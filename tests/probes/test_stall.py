"""Calls that hang: waited for once, not made again, heard again when they have come back."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from probes.stall import StallProof

LONG_SECONDS = 60  # of a wait that is over long before, or the test fails
SHORT_SECONDS = 0.05


class Server:
    """Answers a key with its upper case, unless the key is blocked; counts the calls."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.back = threading.Semaphore(0)

    def block(self, *keys: str) -> None:
        self.gates |= {key: threading.Event() for key in keys}

    def release(self, *keys: str) -> None:
        for key in keys:
            self.gates.pop(key).set()

    def __call__(self, key: str) -> str:
        self.calls[key] += 1
        gate = self.gates.get(key)
        if gate is not None:
            gate.wait()
        return key.upper()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.release(*server.gates)


@pytest.fixture
def guarded() -> Iterator[Callable[..., StallProof[str, str]]]:
    made: list[StallProof[str, str]] = []

    def make(server: Callable[[str], str], threads: int = 16) -> StallProof[str, str]:
        made.append(StallProof(server, threads))
        return made[-1]

    yield make
    for proof in made:
        proof.close()


Guarded = Callable[..., StallProof[str, str]]


def at_once(function: Callable[[], object]) -> None:
    """Fails if the function waits: it is given a minute on a thread of its own."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(LONG_SECONDS)
    assert not thread.is_alive()


def until_back(proof: StallProof[str, str], hanging: int = 0) -> None:
    """Waits until only so many calls hang; the threads that were released need a moment to come back."""
    pause = threading.Event()
    for _ in range(6000):
        if proof.hanging == hanging:
            return
        pause.wait(0.01)
    pytest.fail(f"{proof.hanging} calls still hang")


def test_all_answer(server: Server, guarded: Guarded) -> None:
    proof = guarded(server)
    for _ in range(3):
        assert proof.ask(["a", "b", "c"], LONG_SECONDS) == {"a": "A", "b": "B", "c": "C"}
    assert server.calls == {"a": 3, "b": 3, "c": 3}


def test_more_keys_than_threads(server: Server, guarded: Guarded) -> None:
    keys = [f"k{number}" for number in range(50)]
    assert guarded(server, 4).ask(keys, LONG_SECONDS) == {key: key.upper() for key in keys}


def test_no_keys_and_the_same_key_twice(server: Server, guarded: Guarded) -> None:
    proof = guarded(server)
    assert proof.ask([], LONG_SECONDS) == {}
    assert proof.ask(["a", "a"], LONG_SECONDS) == {"a": "A"}
    assert server.calls == {"a": 1}


def test_one_that_hangs_is_not_asked_again(server: Server, guarded: Guarded) -> None:
    server.block("dead")
    proof = guarded(server)
    for _ in range(4):
        assert "dead" not in proof.ask(["a", "dead", "b"], SHORT_SECONDS)
    assert server.calls["dead"] == 1
    assert proof.hanging == 1
    assert proof.ask(["a", "dead", "b"], LONG_SECONDS) == {"a": "A", "b": "B"}


def test_one_that_hangs_is_not_waited_for_again(server: Server, guarded: Guarded) -> None:
    server.block("dead")
    proof = guarded(server)
    assert proof.ask(["dead"], SHORT_SECONDS) == {}
    at_once(lambda: proof.ask(["dead"], 3600))
    at_once(lambda: proof.ask(["dead", "a"], 3600))
    assert server.calls == {"dead": 1, "a": 1}


def test_recovers_when_the_call_has_come_back(server: Server, guarded: Guarded) -> None:
    server.block("dead")
    proof = guarded(server)
    assert proof.ask(["dead"], SHORT_SECONDS) == {}
    server.release("dead")
    until_back(proof)
    assert proof.ask(["dead"], LONG_SECONDS) == {"dead": "DEAD"}
    assert server.calls["dead"] == 2  # what the first call brought was late


def test_a_late_answer_is_not_taken_for_one_of_this_round(guarded: Guarded) -> None:
    first, gate = threading.Event(), threading.Event()
    answers = iter(["old", "new"])

    def call(key: str) -> str:
        answer = next(answers)
        if answer == "old":
            first.set()
            gate.wait()
        return answer

    proof = guarded(call)
    assert proof.ask(["a"], SHORT_SECONDS) == {}
    assert first.wait(LONG_SECONDS)
    gate.set()
    until_back(proof)
    assert proof.ask([], LONG_SECONDS) == {}
    assert proof.ask(["a"], LONG_SECONDS) == {"a": "new"}


def test_an_answer_that_comes_late_does_not_end_the_next_round(guarded: Guarded) -> None:
    gate = threading.Event()

    def call(key: str) -> str:
        if key == "late":
            gate.wait()
        else:
            gate.set()
            until_back(proof, hanging=1)
        return key.upper()

    proof = guarded(call)
    assert proof.ask(["late"], SHORT_SECONDS) == {}
    assert proof.ask(["late", "a"], LONG_SECONDS) == {"a": "A"}


def test_threads_are_bounded_and_all_may_hang(server: Server, guarded: Guarded) -> None:
    dead = [f"dead{number}" for number in range(30)]
    server.block(*dead)
    before = set(threading.enumerate())
    proof = guarded(server, 3)
    for _ in range(3):
        assert proof.ask(dead, SHORT_SECONDS) == {}
    assert len(set(threading.enumerate()) - before) == 3
    assert proof.hanging == 3
    assert server.calls.total() == 3
    at_once(lambda: proof.ask([*dead, "a"], 3600))  # no thread is free: nothing to wait for
    assert "a" not in server.calls
    server.release(*dead)
    until_back(proof)
    assert proof.ask([*dead, "a"], LONG_SECONDS).keys() == {*dead, "a"}
    assert server.calls.total() == 3 + 31  # those that no thread had come to were not kept


def test_few_threads_for_few_keys(server: Server, guarded: Guarded) -> None:
    before = set(threading.enumerate())
    proof = guarded(server)
    for _ in range(5):
        proof.ask(["a", "b"], LONG_SECONDS)
    started = set(threading.enumerate()) - before
    assert 1 <= len(started) <= 2
    assert all(thread.daemon for thread in started)


def test_error_of_a_call_is_raised_and_harms_nothing(guarded: Guarded) -> None:
    def call(key: str) -> str:
        if key == "bad":
            raise ZeroDivisionError(key)
        return key.upper()

    proof = guarded(call)
    with pytest.raises(ZeroDivisionError, match="bad"):
        proof.ask(["bad"], LONG_SECONDS)
    until_back(proof)
    assert proof.ask(["a"], LONG_SECONDS) == {"a": "A"}


def test_close_ends_the_threads(server: Server) -> None:
    before = set(threading.enumerate())
    proof: StallProof[str, str] = StallProof(server)
    server.block("dead")
    proof.ask(["a", "dead"], SHORT_SECONDS)
    started = [thread for thread in threading.enumerate() if thread not in before]
    assert started
    proof.close()
    server.release("dead")
    for thread in started:
        thread.join(LONG_SECONDS)
        assert not thread.is_alive()


def test_the_process_ends_though_a_call_hangs() -> None:
    program = (
        "import threading\n"
        "from probes.stall import StallProof\n"
        "print(StallProof(lambda key: threading.Event().wait()).ask(['a', 'b'], 0.05))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG_SECONDS)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "{}\n", "")
