"""Calls that may hang for ever, made where they can't hold up the cycle."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Answer = TypeVar("Answer")

THREADS = 16
"""How many threads there are at most, hence how many calls can hang at once."""


class StallProof(Generic[Key, Answer]):
    """Makes one call a key on worker threads, and waits for all of them together only so long.

    A key whose call has not come back is neither waited for nor called again; once it has
    come back, late and unheard, the next `ask` calls it afresh. Where every thread hangs,
    nothing is waited for. The threads are daemons, so the process ends without them.

    Args:
        call: given a key; what it raises, `ask` raises.
        threads: at most so many; they start when they are needed first, and are kept.
    """

    def __init__(self, call: Callable[[Key], Answer], threads: int = THREADS) -> None:
        assert threads >= 1
        self._call = call
        self._threads = threads
        self._started = 0
        lock = threading.Lock()
        self._work = threading.Condition(lock)  # there are jobs, or it is closed
        self._done = threading.Condition(lock)  # the round is answered
        self._jobs: deque[Key] = deque()
        self._called: set[Key] = set()  # a thread is at each of these
        self._round = 0
        self._wanted = 0
        self._answers: dict[Key, Answer] = {}
        self._error: Exception | None = None
        self._closed = False

    @property
    def hanging(self) -> int:
        """How many calls have not come back."""
        return len(self._called)

    def ask(self, keys: Sequence[Key], timeout_seconds: float) -> dict[Key, Answer]:
        """The answers by key, without those that did not come in time; not for several threads at once."""
        with self._done:
            assert not self._closed
            self._answers, self._error = {}, None
            jobs = [key for key in dict.fromkeys(keys) if key not in self._called]
            if jobs and len(self._called) < self._threads:
                self._wanted = len(jobs)
                self._jobs.extend(jobs)
                try:
                    self._start_threads()
                    self._work.notify(len(jobs))
                    self._done.wait_for(self._is_answered, timeout_seconds)
                finally:
                    self._jobs.clear()  # those that no thread has come to
                    self._round += 1  # what comes from now on is late
            if self._error is not None:
                raise self._error
            return self._answers

    def _is_answered(self) -> bool:
        return len(self._answers) == self._wanted or self._error is not None

    def _start_threads(self) -> None:
        """One more for each job that no idle thread can take."""
        while self._started < self._threads and self._started - len(self._called) < len(self._jobs):
            threading.Thread(target=self._run, name=f"stall-proof-{self._started}", daemon=True).start()
            self._started += 1

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._jobs:
                    if self._closed:
                        return
                    self._work.wait()
                key = self._jobs.popleft()
                self._called.add(key)
                asked_in = self._round
            answer: Answer | None = None
            error: Exception | None = None
            try:
                answer = self._call(key)
            except Exception as raised:  # handed to the caller of `ask`
                error = raised
            with self._done:
                self._called.discard(key)
                if asked_in == self._round:
                    if error is not None:
                        self._error = error
                    else:
                        self._answers[key] = answer  # type: ignore[assignment]
                    if self._is_answered():
                        self._done.notify()

    def close(self) -> None:
        """Lets the threads end, those that hang when they come back."""
        with self._work:
            self._closed = True
            self._work.notify_all()
