from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import asyncssh
import numpy as np
import pytest

from edgeprune.device import measure as measuring
from edgeprune.device import ssh
from edgeprune.device.card import device
from edgeprune.device.connection import connect
from edgeprune.device.measure import Schedule, measure
from edgeprune.device.parity import outputs
from edgeprune.device.session import sitting
from edgeprune.errors import DeviceError, Unreachable
from tests.device.boards import Board, Client, children, end, is_sshd, new_key

BRIEF: Schedule = {"processes": 3, "min_runs": 5, "min_seconds": 0.0, "warmup_runs": 1, "warmup_seconds": 0.0}


def test_measures_over_ssh_and_leaves_only_its_cache(board: Board, client: Client, artifact: Path, card: Path) -> None:
    found = measure(artifact, device(card, host="pi"), **BRIEF)
    assert 0 < found.min_ms <= found.latency_ms <= found.high_ms
    assert found.fingerprint["where"] == "pi"
    assert found.fingerprint["artifact_sha256"] in os.listdir(board.home / ".cache/edgeprune")
    assert found.parity
    assert found.parity.max_abs == 0.0
    assert os.listdir(board.home) == [".cache"]
    assert os.listdir(board.home / ".cache") == ["edgeprune"]
    names = {p.name for p in (board.home / ".cache/edgeprune").rglob("*") if p.is_file()}
    assert names <= {"file.py", "file.onnx", "file.npy", "python3"}
    assert board.empties()
    assert not list(Path.cwd().glob("pwned"))


def test_a_whole_sitting_writes_nothing_else(
    board: Board, client: Client, card: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensors are read by a second file, and the profiler writes a trace: neither leaves anything, inside the cache or outside."""
    scratch = client.home / "scratch"  # for temporary files there and here: the machine's own folder is everybody's
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    board.use_python(f'export TMPDIR="{scratch}"\nexec "{sys.executable}" "$@"')
    try:
        found = sitting(artifact, device(card, host="pi"), energy=True, trials=1, trial_seconds=0.1, **BRIEF)
    finally:
        board.use_python()
    assert found.operations
    assert board.empties()
    assert [p.name for p in board.home.iterdir()] == [".cache"]
    left = [p for p in (board.home / ".cache/edgeprune").rglob("*") if "venv" not in p.parts]
    assert {p.name for p in left if p.is_file()} <= {"file.py", "file.onnx", "file.npy"}
    assert {len(p.name) for p in left if p.is_dir()} == {64}
    assert not list(scratch.iterdir())


def test_outputs_come_back_exactly(client: Client, artifact: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    with connect("pi") as pi:
        (y,), facts = outputs(pi, artifact, {"x": x})
    np.testing.assert_array_equal(y, np.maximum(x, 0))
    assert facts["quantized"] is False


@pytest.mark.parametrize("more", [[], ["UserKnownHostsFile none"], ["StrictHostKeyChecking no"]])
def test_an_unknown_host_key_is_refused_with_its_fingerprint(board: Board, client: Client, more: list[str]) -> None:
    client.configure(client.knows("pi", board, *more))
    (client.home / ".ssh/known_hosts").write_text("")
    fingerprint = asyncssh.read_public_key(f"{board.host_key}.pub").get_fingerprint()
    with pytest.raises(Unreachable, match=r"host key of pi is unknown.*ssh-keyscan") as caught:
        connect("pi")
    assert fingerprint in str(caught.value)
    assert (client.home / ".ssh/known_hosts").read_text() == ""


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256"])
def test_a_changed_host_key_is_refused(board: Board, client: Client, kind: str) -> None:
    other = asyncssh.generate_private_key(kind).export_public_key().decode()
    (client.home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{board.port} {other}")
    with pytest.raises(Unreachable, match=r"host key of pi has changed.*ssh-keygen -R"):
        connect("pi")


def test_refused_logins_and_closed_doors(board: Board, client: Client, tmp_path: Path) -> None:
    key = tmp_path / "stranger"
    new_key(key)
    client.configure(client.knows("pi", board).replace(str(board.client_key), str(key)))
    with pytest.raises(Unreachable, match=r"pi refused the login.*ssh-copy-id"):
        connect("pi")
    with pytest.raises(Unreachable, match=r"no connection to 127\.0\.0\.1:1"):
        connect("127.0.0.1:1")
    with pytest.raises(Unreachable, match="names no host"):
        connect("-oProxyCommand=touch pwned")


def test_goes_through_a_jump_host_whose_key_is_checked_too(tmp_path: Path, board: Board, client: Client) -> None:
    gate = Board(tmp_path / "gate")
    gate.start()
    try:
        client.configure(client.knows("gate", gate) + client.knows("pi", board, "ProxyJump gate"))
        with pytest.raises(Unreachable, match=r"host key of gate is unknown.*SHA256:"):
            connect("pi")
        client.trust(gate, board)
        with connect("pi") as pi:
            assert pi.hello()["pointer_bits"] == 64
    finally:
        gate.stop()


@pytest.mark.skipif(not shutil.which("ssh-agent"), reason="no ssh-agent here")
def test_takes_keys_from_the_agent(board: Board, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL) as keys:
        while not path.exists():
            time.sleep(0.02)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        client.configure(client.knows("pi", board).replace(f"IdentityFile {board.client_key}", ""))
        with pytest.raises(Unreachable, match="refused the login"):
            connect("pi")
        subprocess.run(["ssh-add", "-q", board.client_key], check=True)
        with connect("pi") as pi:
            assert pi.hello()
        keys.terminate()


def test_two_users_take_turns(client: Client, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "TURN_SECONDS", 0.3)
    with connect("pi") as first, connect("pi") as second:
        first.ask("lock", owner="alice@desk")
        with pytest.raises(DeviceError, match=r"pi is in use by alice@desk for \d+ s \(process \d+, user id \d+\): try again"):
            measuring.take_turn(second)
        first.close()
    monkeypatch.setattr(measuring, "TURN_SECONDS", 30.0)  # a busy board may need a moment to end the first agent
    with connect("pi") as third:
        measuring.take_turn(third)


def at_work(pi: ssh.Ssh, artifact: Path, caught: list[BaseException]) -> threading.Thread:
    """A measurement of a minute, in a thread."""
    path = pi.push(artifact)

    def work() -> None:
        try:
            pi.ask("measure", fresh=True, limit_seconds=100, artifact=path, min_seconds=60)
        except Unreachable as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until_working(board: Board) -> list[int]:
    """The agent and the fresh process that measures, as soon as both are there."""
    deadline = time.monotonic() + 60
    while len(board.agents()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return board.agents()


@pytest.mark.parametrize("victim", ["agent", "measuring process", "connection"])
def test_whatever_dies_the_error_is_clear_and_nothing_is_left(board: Board, client: Client, artifact: Path, victim: str) -> None:
    caught: list[BaseException] = []
    pi = ssh.Ssh("pi")
    thread = at_work(pi, artifact, caught)
    pids = until_working(board)
    assert len(pids) == 2
    if victim == "connection":
        assert board.process
        for pid in children(board.process.pid):
            if is_sshd(pid):
                end(pid)
    else:
        os.kill(pids[0 if victim == "agent" else 1], signal.SIGKILL)
    thread.join(timeout=60)
    assert not thread.is_alive()
    expected = {"agent": "killed by signal", "measuring process": "killed by signal 9", "connection": "connection to pi was lost"}
    assert expected[victim] in str(caught[0])
    pi.close()
    assert board.empties()


def test_a_slow_agent_is_stopped(board: Board, client: Client, artifact: Path) -> None:
    with connect("pi") as pi:
        path = pi.push(artifact)
        with pytest.raises(Unreachable, match="no result within 2 s"):
            pi.ask("measure", fresh=True, limit_seconds=2, artifact=path, min_seconds=60)
        assert pi.hello()
        with pytest.raises(Unreachable, match="no result within 1 s"):
            pi.ask("measure", limit_seconds=1, artifact=path, min_seconds=60)
        assert board.empties()


def test_ctrl_c_leaves_nothing_on_the_board(board: Board, client: Client, artifact: Path) -> None:
    code = f"from edgeprune.device.measure import *\nmeasure_on(connect('pi'), {str(artifact)!r}, min_seconds=60)\n"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as host:
        assert len(until_working(board)) == 2
        host.send_signal(signal.SIGINT)
        _, errors = host.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert board.empties()


def test_the_cache_has_a_limit(board: Board, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CACHE_BYTES", 100_000)
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.onnx")
        files[-1].write_bytes(bytes([number]) * 60_000)
    with connect("pi") as pi:
        first = pi.push(files[0])
    with connect("pi") as pi:
        second = pi.push(files[1])
        assert not (board.home / first).exists()
        assert (board.home / second).read_bytes() == files[1].read_bytes()
        files[2].write_bytes(bytes(100_001))
        with pytest.raises(DeviceError, match="100,001 bytes is more than the 100,000"):
            pi.push(files[2])
    assert not list(board.home.rglob("*.part"))


def test_what_one_connection_brings_counts_too(board: Board, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CACHE_BYTES", 150_000)
    files = [tmp_path / f"{number}.onnx" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([77 + number]) * 50_000)
    with connect("pi") as pi:
        kept = [pi.push(file) for file in files[:2]]
        with pytest.raises(DeviceError, match=r"takes 1\d\d,\d+ bytes on pi, and 50,000 more are above the 150,000"):
            pi.push(files[2])
        assert all((board.home / path).exists() for path in kept)


def test_what_an_interrupted_upload_left_is_in_nobody_s_way(board: Board, client: Client, artifact: Path) -> None:
    cache = board.home / ".cache/edgeprune"
    (cache / ("0" * 64)).mkdir(parents=True, exist_ok=True)
    (cache / ("1" * 64)).mkdir(exist_ok=True)
    (cache / ("1" * 64) / "ab.part").write_bytes(b"half")
    with connect("pi") as pi:
        assert pi.push(artifact)


def test_another_agent_than_the_one_sent_is_not_asked(board: Board, client: Client) -> None:
    with connect("pi"):
        pass
    (script,) = [p for p in (board.home / ".cache/edgeprune").rglob("file.py") if b"measuring agent" in p.read_bytes()]
    text = script.read_bytes()
    script.write_bytes(text.replace(b"measuring agent", b"measuring azent"))
    try:
        with pytest.raises(Unreachable, match="agent on pi is not the one that was sent: remove"):
            connect("pi")
    finally:
        script.write_bytes(text)


def test_a_board_that_takes_no_files_says_so(tmp_path: Path, board: Board, client: Client) -> None:
    closed = Board(tmp_path / "closed")
    closed.start()
    try:
        client.configure(client.knows("closed", closed))
        client.trust(closed)
        (closed.home / ".cache").write_text("in the way")
        with pytest.raises(Unreachable, match=r"agent cannot be copied to ~/\.cache/edgeprune on closed over SFTP: .*SFTP server"):
            connect("closed")
    finally:
        closed.stop()


def test_several_boards_are_for_calibrations_only() -> None:
    with pytest.raises(DeviceError, match="pi@a,pi@b names several boards"):
        connect("pi@a,pi@b")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("echo no luck >&2; exit 7", r"ended with status 7 .*no luck"),
        ("echo hello", "ended without a result: it said 'hello"),
        ("""echo '{"ok": true, "id": 1, "protocol": 1}'; sleep 5""", "speaks protocol 1 "),
        (
            """echo '{"ok": true, "id": 1, "protocol": 2, "pointer_bits": 32, "machine": "armv7l"}'; sleep 5""",
            r"32-bit system \(armv7l\).*64-bit operating system",
        ),
        ("exec python-that-is-not-there", "there is no python3"),
    ],
)
def test_boards_that_cannot_be_used(board: Board, client: Client, program: str, message: str) -> None:
    board.use_python(program)
    try:
        with pytest.raises(Unreachable, match=message) as caught:
            connect("pi")
        assert "\n" not in str(caught.value)
        assert board.empties()
    finally:
        board.use_python()
