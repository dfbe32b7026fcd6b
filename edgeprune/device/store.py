"""Writes fitted profiles into a device card: what is below the marker is made by programs, what is above by people."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgeprune.device.card import Card, Device, Memory, Precision, Profile
from edgeprune.errors import DeviceError

_MARKER = "# Written by"


def user_cards() -> Path:
    """The folder of the user's own cards; one of them replaces the shipped card of its name."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgeprune" / "devices"


def stored_measurements(device: Device, precision: Precision | None = None) -> Path:
    """Where the measurements of a calibration of this profile, in this precision, are kept until it is complete."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hosts = "".join(f"-{quote(host, safe='@')}" for host in sorted(device.hosts) if host)
    return cache / "edgeprune" / f"calibration-{device.profile}{f'-{precision}' if precision else ''}{hosts}.json"


def keep_table(measurements: Path, card: Path, profile: str) -> Path:
    """Move the measurements of a complete calibration beside the card, as a table: the next calibration measures anew."""
    found: dict[str, float] = json.loads(measurements.read_text())
    table = card.with_name(f"{profile}.csv")
    table.write_text("".join(["network,latency_ms\n", *(f"{name},{ms:.6g}\n" for name, ms in found.items())]))
    measurements.unlink()
    return table


def replace_profile(device: Device, profile: Profile, path: Path) -> Path:
    """Write the device's card to `path` with this profile in place of its own, its first one where it has none; the path comes back."""
    name = profile_name(device, profile)
    board = device.card.model_dump(mode="json", include={"board"}, exclude_none=True)["board"]
    board |= {} if device.predicts else {"default_profile": name}
    lines = [f"# {device.name}, calibrated by its user.", "", *_table("board", board)]
    if device.card.power:
        lines += _table("power", device.card.power.model_dump(mode="json", exclude_none=True))
    profiles = {**device.card.profiles, name: profile}
    write_profiles(path, profiles, f"edgeprune device calibrate {name}", above="\n".join(lines))
    return path


def profile_name(device: Device, profile: Profile) -> str:
    """The device's own profile, that of another precision beside it, or the name of the first one of a board that has none."""
    if not device.predicts:
        return f"{device.name}-{'ort' if profile.runtime == 'onnxruntime' else profile.runtime}"
    return device.profile if profile.precision == device.constants.precision else f"{device.profile}-{profile.precision}"


def write_profiles(path: Path, profiles: Mapping[str, Profile], by: str, *, above: str | None = None) -> None:
    """Put `profiles` into the card at `path` in place of all that programs wrote there; `above`: the rest of a card that is new.

    The file is complete at any moment. Raises DeviceError when the result is no valid card.
    """
    kept = path.read_text(encoding="utf-8").split(_MARKER)[0] if above is None else above.split(_MARKER)[0]
    lines = [f"{_MARKER} `{by}`: do not edit below.", ""]
    for name, profile in profiles.items():
        lines += _profile_lines(f"profiles.{name}", profile)
    text = kept.rstrip() + "\n\n" + "\n".join(lines)
    try:
        Card.model_validate(tomllib.loads(text))
    except ValueError as error:  # pydantic's and tomllib's errors are ValueErrors
        raise DeviceError(f"the profiles {', '.join(profiles)} do not make a valid card at {path}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".toml.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def with_memory(path: Path, memories: Mapping[str, Memory]) -> None:
    """Put these constants, by runtime, into every profile of the card at `path` that runs one of them."""
    text = path.read_text(encoding="utf-8")
    profiles = Card.model_validate(tomllib.loads(text)).profiles
    changed = {n: p.model_copy(update={"memory": memories.get(p.runtime, p.memory)}) for n, p in profiles.items()}
    if changed:
        write_profiles(path, changed, text.partition(_MARKER)[2].split("`")[1])


def _profile_lines(name: str, profile: Profile) -> list[str]:
    values = profile.model_dump(mode="json", exclude_none=True)
    kernels = values.pop("kernels")
    inner = {key: values.pop(key) for key in ("fit", "power", "memory", "staircase") if key in values}
    rows = inner.get("staircase", {}).pop("latency_ms", {})
    lines = _table(name, values)
    for key, table in inner.items():
        lines += _table(f"{name}.{key}", table)
    if rows:
        lines += _table(f"{name}.staircase.latency_ms", {json.dumps(key): value for key, value in rows.items()})
    lines.append(f"[{name}.kernels]")
    for kind, rate in kernels.items():
        lines.append(f"{kind} = {{ {', '.join(f'{key} = {value}' for key, value in rate.items() if value)} }}")
    return [*lines, ""]


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers and flat lists are TOML's too.
    return [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()), ""]
