"""What a board has, what it lacks for measuring, and the command that would help. Nothing is installed by looking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeprune.device.card import Device
from edgeprune.device.connection import POWER_FILE, Connection, connect
from edgeprune.errors import DeviceError

_LEAST_FREE_BYTES = 300 << 20
_WARM_C = 70.0
VENV = "~/.cache/edgeprune/venv"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `needed`: nothing can be measured without it; `remedy` is empty where all is well."""

    what: str
    found: str
    ok: bool
    remedy: str = ""
    needed: bool = False


def check(device: Device) -> tuple[Finding, ...]:
    """What `device`'s machine offers for measuring. Raises DeviceError where it is not attached, Unreachable where it does not answer."""
    if not device.attached:
        raise DeviceError(f"{device.name} is not attached: give --host user@board, and the card alone with `edgeprune device show`.")
    with connect(device.host) as board:
        facts = board.hello()
        return (*_machine(device, facts), *_runtimes(device, facts), *_quiet(facts["state"]), *_power(board))


def _machine(device: Device, facts: Mapping[str, Any]) -> list[Finding]:
    card, name = device.card.board, facts["board"] or facts["cpu"]
    cores = Finding(
        "CPUs",
        f"{facts['cores']}, {len(facts['cpus'])} to be used ({facts['cpu']})",
        len(facts["cpus"]) >= device.threads,
        "" if len(facts["cpus"]) >= device.threads else f"{device.profile} runs {device.threads} threads: name another profile or card",
        needed=True,
    )
    other = bool(facts["board"]) and not device.card.board.attached and _words(card.description).isdisjoint(_words(facts["board"]))
    free = facts["free_disk_bytes"]
    return [
        Finding("board", f"{name}, {facts['os']}, {facts['machine']}", not other, f"the card is for a {card.description}" if other else ""),
        Finding("Python", f"{facts['python']} ({facts['executable']})", ok=True),
        cores,
        Finding("free disk", f"{free >> 20:,} MiB", free >= _LEAST_FREE_BYTES, "" if free >= _LEAST_FREE_BYTES else "make room"),
    ]


def _runtimes(device: Device, facts: Mapping[str, Any]) -> list[Finding]:
    installed = facts["runtimes"]
    litert = next((n for n in ("ai-edge-litert", "tflite-runtime") if n in installed), "")
    wanted = {"numpy": "numpy", "onnxruntime": "onnxruntime", "LiteRT": litert or "ai-edge-litert"}
    any_runtime = "onnxruntime" in installed or bool(litert)
    shell = f"ssh {device.host} " if device.host not in ("", "local") else ""
    rows = []
    for what, package in wanted.items():
        here = package in installed
        install = f"'python3 -m venv {VENV} && {VENV}/bin/pip install numpy {package if package != 'numpy' else ''}".rstrip() + "'"
        needed = what == "numpy" or not any_runtime
        remedy = "" if here else f"{shell}{install if shell else install.strip(chr(39))}"
        rows.append(Finding(what, installed.get(package, "not installed"), here, remedy, needed=needed))
    return rows


def _quiet(state: Mapping[str, Any]) -> list[Finding]:
    rows = []
    if governors := state.get("governors"):
        steady = governors == ["performance"]
        rows.append(
            Finding("governor", ", ".join(governors), steady, "" if steady else "--governor performance, where the account may set it")
        )
    if temperatures := state.get("temperatures_c"):
        hot = max(temperatures) > _WARM_C
        rows.append(Finding("temperature", f"{max(temperatures):.0f} C", not hot, "let it cool, or give it a fan" if hot else ""))
    word = state.get("throttle_word")
    if word is not None:
        rows.append(
            Finding("throttled", f"{word:#x}", word == 0, "" if word == 0 else "a stronger supply or more cooling; reboot to clear")
        )
    if state.get("load_average", 0.0) > 0.5:
        rows.append(Finding("load", f"{state['load_average']:.2f}", ok=False, remedy="stop what else is running"))
    return rows


def _power(board: Connection) -> list[Finding]:
    reply = board.ask("sensors", power=board.push(POWER_FILE))
    rows = []
    for source in reply["sources"]:
        whole = bool(source["total_rails"])
        remedy = "" if whole else "no total is known for these rails: no energy figure will be made from them"
        rows.append(Finding("power", f"{source['name']} ({source['scope']}): {', '.join(source['rails'])}", whole, remedy))
    rows += [Finding("power", "not readable", ok=False, remedy=obstacle) for obstacle in reply["obstacles"]]
    return rows or [Finding("power", "no sensor", ok=True, remedy="energy is not measured; an external meter can be given with --meter")]


def _words(text: str) -> set[str]:
    """What tells boards apart in a name: its words with a digit (Raspberry Pi 4: "4"; Zero 2 W: "2")."""
    return {word for word in text.lower().replace("-", " ").split() if any(c.isdigit() for c in word)} or {text.lower()}
