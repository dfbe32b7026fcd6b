from __future__ import annotations

import builtins
import getpass
import sys
from pathlib import Path

import pytest

from edgeprune.device import agent
from edgeprune.device.connection import Local, connect, owner
from edgeprune.errors import DeviceError, Unreachable
from tests.device.boards import children


def test_this_machine_is_a_connection_too(artifact: Path) -> None:
    for host in ("", "local"):
        with connect(host) as here:
            assert here.hello()["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
            assert here.push(artifact) == str(artifact)
    here.close()  # any number of times
    with pytest.raises(Unreachable, match="connection to this machine is closed"):
        here.hello()


def test_a_fresh_process_answers_and_is_gone(artifact: Path) -> None:
    with Local() as here:
        brief = {"min_runs": 2, "min_seconds": 0, "warmup_runs": 0, "warmup_seconds": 0}
        reply = here.ask("measure", fresh=True, artifact=str(artifact), **brief)
        assert len(reply["times_ns"]) == 2
        assert children(here._process.pid) == []


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"do": "dance"}, DeviceError, "unknown request 'dance'"),
        ({"do": "measure", "artifact": "gone.onnx"}, DeviceError, "bad_artifact"),
        ({"do": "measure", "artifact": "gone.txt"}, DeviceError, "neither .onnx nor .tflite"),
        ({"do": "measure", "artifact": "gone.onnx", "fresh": True}, DeviceError, "bad_artifact"),
    ],
)
def test_refusals_keep_the_connection(request_: dict[str, object], error: type[Exception], message: str) -> None:
    with Local() as here:
        with pytest.raises(error, match=message):
            here.ask(**request_)  # type: ignore[arg-type]
        assert here.hello()


def test_a_fresh_process_that_dies_says_how(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(agent.__file__).read_text()
    (tmp_path / "agent.py").write_text(text.replace("def measure(", "def measure(*_, **__): sys.exit('no luck')\ndef measured("))
    monkeypatch.setattr(agent, "__file__", str(tmp_path / "agent.py"))
    with Local() as here:
        with pytest.raises(Unreachable, match=r"ended with status 1 without a result \(no luck\)"):
            here.ask("measure", fresh=True, artifact=str(artifact))
        assert here.hello()


def test_without_asyncssh_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: object) -> object:
        if name.startswith(("asyncssh", "edgeprune.device.ssh")):
            raise ImportError(f"No module named {name!r}")
        return real(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DeviceError, match=r"pip install 'edgeprune\[ssh\]'"):
        connect("pi@board")


def test_an_owner_has_a_name_even_without_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "@" in owner()

    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert owner()[0].isdigit()
