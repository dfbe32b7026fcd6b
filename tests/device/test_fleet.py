from __future__ import annotations

import threading

import pytest

from edgeprune.device.connection import Connection
from edgeprune.device.fleet import shared
from edgeprune.errors import DeviceError, Unreachable

HERE = ("local", "")  # two agents on this machine


def test_every_job_is_done_once_and_every_board_works() -> None:
    both = threading.Barrier(2, timeout=60)  # neither goes on before the other has a job too

    def work(board: Connection, job: int) -> int:
        if job < 2:
            both.wait()
        return job * int(board.hello()["pointer_bits"])

    found = list(shared(HERE, range(6), work))
    assert sorted((job, value) for job, value, _ in found) == [(job, 64 * job) for job in range(6)]
    assert {host for job, _, host in found if job < 2} == set(HERE)


def test_the_work_of_a_board_that_is_lost_goes_to_the_others(caplog: pytest.LogCaptureFixture) -> None:
    found = list(shared(("127.0.0.1:1", "local"), range(3), lambda board, job: job))
    assert sorted(found) == [(job, job, "local") for job in range(3)]
    assert "going on without 127.0.0.1:1: no connection" in caplog.text
    with pytest.raises(Unreachable, match="no connection to 127"):
        list(shared(("127.0.0.1:1",), range(3), lambda board, job: job))


def test_whatever_else_goes_wrong_ends_all_of_it_and_the_agents() -> None:
    boards: list[Connection] = []

    def work(board: Connection, job: int) -> int:
        boards.append(board)
        raise DeviceError("not this one")

    with pytest.raises(DeviceError, match="not this one"):
        list(shared(("local",), range(3), work))
    with pytest.raises(Unreachable, match="closed"):
        boards[0].hello()


def test_who_stops_listening_ends_the_agents() -> None:
    boards: list[Connection] = []

    def work(board: Connection, job: int) -> int:
        boards.append(board)
        return job

    results = shared(("local",), range(9), work)
    next(results)
    results.close()
    with pytest.raises(Unreachable, match="closed"):
        boards[0].hello()
