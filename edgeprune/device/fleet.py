"""Several boards of one kind share a list of jobs: each takes the next one when it is free, one that is lost hands its job back."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import TypeVar

from edgeprune.device.connection import Connection, connect
from edgeprune.errors import Unreachable

Job = TypeVar("Job")
Value = TypeVar("Value")


def shared(
    hosts: Sequence[str], jobs: Sequence[Job], work: Callable[[Connection, Job], Value]
) -> Generator[tuple[Job, Value, str], None, None]:
    """(job, what `work` made of it, the host it ran on) as they are done, which with several hosts is in no fixed order.

    Every host is connected to once. One that is lost or cannot be used is left out with a warning as long as there is another, and its
    job goes to that one; where none is left, its Unreachable is raised. Everything else that `work` raises ends all of it.
    """
    waiting, idle = deque(jobs), deque(dict.fromkeys(hosts))
    boards: dict[str, Connection] = {}
    running: dict[Future[Value], tuple[str, Job]] = {}

    def turn(host: str, job: Job) -> Value:
        if host not in boards:
            boards[host] = connect(host)
        return work(boards[host], job)

    def close() -> None:
        for board in boards.values():
            board.close()

    with ThreadPoolExecutor(len(idle)) as pool, ExitStack() as end:
        end.callback(close)  # before the pool waits for its threads: they end by it
        while waiting or running:
            while waiting and idle:
                host, job = idle.popleft(), waiting.popleft()
                running[pool.submit(turn, host, job)] = host, job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                host, job = running.pop(future)
                if isinstance(error := future.exception(), Unreachable) and (running or idle):
                    logging.getLogger(__name__).warning("going on without %s: %s", host or "this machine", error)
                    waiting.appendleft(job)
                    continue
                value = future.result()  # raises what `work` did
                idle.append(host)
                yield job, value, host
