"""Device cards: one TOML file per board, read into a frozen Device. No torch here: listing devices must stay instant.

A card says what the board is (with the source of each fact) and holds one or more profiles, keyed by runtime, threads, precision
and clock; runtime and clock matter as much as the board. A profile's constants are fitted by benchmarks/cost_models.py, which
also writes the error they had on held-out networks: no profile without a fit. A card without any profile can be measured, once a
board is attached, but predicts nothing. Cards are data: outsiders add a board by adding a file, here or in their own config folder,
and a key that nobody reads is refused rather than ignored.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edgeprune.errors import DeviceError, UnknownDevice

Nonnegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["fp32", "fp16", "int8"]
MacKind = Literal["conv1x1", "conv3x3", "conv_other", "depthwise", "depthwise_large", "grouped", "linear"]
MemoryKind = Literal["activation", "elementwise", "scale", "pool", "global_pool", "cat", "resize", "pad", "norm", "other"]
KernelKind = MacKind | MemoryKind


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rate(_Table):
    """What one kernel costs, as nonnegative constants: the sum of each times what its name counts (see cost.terms).

    mac_ns: multiply-accumulates; byte_ns: activation bytes read and written; weight_byte_ns: weight bytes; patch_byte_ns: bytes of the
    input patches that a convolution gathers; far_byte_ns and far_weight_byte_ns: those activation and weight bytes that exceed the
    profile's cache_bytes; group_us: groups of a grouped convolution; call_us: once per kernel.

    `seen_share` (0..1): the largest part of a fitted network's time that kernels of this kind took; 0 means that the constants are
    borrowed from another board. Networks that spend more of their time here than that get a wider interval.
    """

    mac_ns: Nonnegative = 0.0
    byte_ns: Nonnegative = 0.0
    weight_byte_ns: Nonnegative = 0.0
    patch_byte_ns: Nonnegative = 0.0
    far_byte_ns: Nonnegative = 0.0
    far_weight_byte_ns: Nonnegative = 0.0
    group_us: Nonnegative = 0.0
    call_us: Nonnegative = 0.0
    seen_share: Annotated[float, Field(ge=0, le=1)] = 0.0


class Fit(_Table):
    """Where the constants come from and how wrong they were on networks they had not seen.

    mape and within_10 are percentages; `low_factor` and `high_factor` bound the measured latency at 90 % (conformal, held-out
    residuals: measured = predicted * factor); `coverage` is the share of held-out rows inside that interval, in percent.
    `macs` and `latency_ms` of networks, `channels` and `activation_bytes` of single kernels are the ranges the fit has seen.
    `noise`: how far measurements of the same kernels in other networks lie apart, in words.
    """

    source: str
    method: str
    held_out: str
    rows: Count
    networks: Count
    mape: Nonnegative
    within_10: Nonnegative
    kendall_tau: Annotated[float, Field(ge=-1, le=1)]
    coverage: Nonnegative
    low_factor: Positive
    high_factor: Positive
    macs: tuple[Positive, Positive]
    latency_ms: tuple[Positive, Positive]
    channels: tuple[Positive, Positive]
    activation_bytes: tuple[Positive, Positive]
    noise: str = ""

    @model_validator(mode="after")
    def _ordered(self) -> Fit:
        for name in ("macs", "latency_ms", "channels", "activation_bytes"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is a range [lowest, highest], got [{low}, {high}]")
        if not self.low_factor <= 1 <= self.high_factor:
            raise ValueError(f"the interval must contain 1: low_factor {self.low_factor}, high_factor {self.high_factor}")
        return self


class Power(_Table):
    """Active power above idle and idle power in mW, and the relative uncertainty of an energy made from them.

    Of the whole board and not validated, unless `validated` says against which measurements the energies were held.
    """

    active_mw: Positive
    idle_mw: Positive
    uncertainty: Annotated[float, Field(gt=0, lt=1)]
    source: str
    validated: str = ""


class Memory(_Table):
    """What one inference keeps resident: base_bytes, kernel_bytes a kernel, and so many times weights, activations and pointers.

    `arena`: activations as ONNX Runtime's allocator holds them (arena.arena_bytes), not as liveness has them (Kernels.live_bytes).
    `copied`: the kinds of kernels whose inputs and outputs exist twice while they run, see either. Resident is what the
    process has at most in its inferences, beyond what it had when the runtime was imported: packed copies of weights, files that are
    mapped, workspace and the runtime's own objects count; what only loading needed does not. `mape` and `worst` are the errors in
    percent on `networks` networks that did not set the constants.
    """

    base_bytes: Nonnegative
    kernel_bytes: Nonnegative
    weights: Nonnegative
    activations: Nonnegative
    pointers: Nonnegative
    arena: bool = False
    copied: tuple[KernelKind, ...]
    networks: Count
    mape: Nonnegative
    worst: Nonnegative
    source: str


class Staircase(_Table):
    """Milliseconds measured against width, by kind of convolution and side of the image, and the multiple of channels they favour."""

    widths: tuple[Count, ...]
    latency_ms: Mapping[str, tuple[Positive, ...]]
    channel_multiple: Count


class Profile(_Table):
    """One way of running networks on the board, with its fitted constants. `power` is that of this way; default: the card's.

    `input_block` and `output_block`: channels that a convolution reads and makes at a time, see cost.in_blocks. Without `memory`,
    weights and live activations are all that is known.
    """

    runtime: str
    threads: Count
    precision: Precision
    clock_mhz: Positive
    description: str
    network_us: Nonnegative
    cache_bytes: Positive = 1e18
    input_block: Count = 1
    output_block: Count = 1
    kernels: Mapping[KernelKind, Rate]
    fit: Fit
    power: Power | None = None
    memory: Memory | None = None
    staircase: Staircase | None = None

    @property
    def rates(self) -> dict[str, Rate]:
        """The constants by kind, for kinds that come as text."""
        return dict[str, Rate](self.kernels.items())


class Board(_Table):
    """What the board is: `wheels` is what pip finds for it, `sensors` its power sensors, `sources` where these facts come from."""

    description: str
    soc: str
    cores: Count
    clock_mhz: Positive
    memory_bytes: Count
    runtimes: tuple[str, ...]
    wheels: tuple[str, ...] = ()
    threads: Count
    channel_multiple: Count
    sensors: tuple[str, ...]
    sources: tuple[str, ...]
    default_profile: str = ""
    attached: bool = False


class Card(_Table):
    """One TOML file: the board, its power figures if there are any, and its profiles by name."""

    board: Board
    power: Power | None = None
    profiles: Mapping[str, Profile] = {}

    @model_validator(mode="after")
    def _default_exists(self) -> Card:
        if (self.profiles or self.board.default_profile) and self.board.default_profile not in self.profiles:
            raise ValueError(f"default_profile {self.board.default_profile!r} is not one of the profiles {', '.join(self.profiles)}")
        return self


@dataclass(frozen=True)
class Device:
    """A board together with one of its profiles.

    `name` is the board ("rpi4"), `profile` the full name ("rpi4-ort"), the board's where its card has no profile. `resolved` says which
    profile a bare board name led to, and is empty otherwise. `host` is where the board is reached over SSH, [user@]name[:port]; for a
    calibration it may name several boards of this kind, with commas between.
    """

    name: str
    profile: str
    card: Card
    resolved: str = ""
    host: str = ""

    @property
    def constants(self) -> Profile:
        """The profile's fitted constants and their held-out errors. Raises DeviceError for a card that cannot predict."""
        if not self.predicts:
            raise DeviceError(
                f"the card of {self.name} has no fitted profile, so nothing can be predicted for it; it can be measured (--host "
                "user@board), and `edgeprune device calibrate` fits a profile to its measurements."
            )
        return self.card.profiles[self.profile]

    @property
    def predicts(self) -> bool:
        """Whether the card has constants to predict with."""
        return self.profile in self.card.profiles

    @property
    def attached(self) -> bool:
        """Whether figures are measured rather than predicted: the board is this machine, or a host leads to it."""
        return self.card.board.attached or bool(self.host)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every host named, once; one empty name for this machine."""
        return tuple(dict.fromkeys(name.strip() for name in self.host.split(",")))

    @property
    def channel_multiple(self) -> int:
        """Widths are rounded to multiples of this: what the profile's staircase favours, the card's nominal one without."""
        steps = self.card.profiles[self.profile].staircase if self.profile in self.card.profiles else None
        return steps.channel_multiple if steps else self.card.board.channel_multiple

    @property
    def threads(self) -> int:
        """Threads of one inference in this profile."""
        return self.constants.threads if self.predicts else self.card.board.threads

    @property
    def description(self) -> str:
        """The board and the profile in one line."""
        return f"{self.card.board.description}; {self.constants.description if self.predicts else 'no fitted profile: cannot predict'}"


def devices() -> tuple[str, ...]:
    """Names that `device` accepts: every board and every profile, sorted. Raises DeviceError for a card that cannot be read."""
    return tuple(sorted({name for path in _card_paths().values() for name in (path.stem, *_read(path).profiles)}))


def device(name_or_path: str | Path, *, host: str | None = None) -> Device:
    """The board and profile of that name, or of the card at that path (a .toml file; its default profile).

    A bare board name leads to the card's default profile; `Device.resolved` says so. `host` attaches the board: its figures are measured
    there over SSH ([user@]name[:port], or a name of ~/.ssh/config; "local": this machine is the board). Raises UnknownDevice with near
    matches for a name no card has, DeviceError for a card that cannot be read or has wrong keys.
    """
    found = _device(name_or_path)
    if host and found.card.board.attached:
        raise DeviceError(f"{found.name} is this machine, it has no host {host!r}: name the board that is there, such as --device rpi4.")
    return replace(found, host=host) if host else found


def _device(name_or_path: str | Path) -> Device:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return _default(path.stem, path)
    name, cards = str(name_or_path), _card_paths()
    if name in cards:
        return _default(name, cards[name])
    for board, card_path in cards.items():
        # Only the cards whose board name begins the profile name, so that one broken card does not take the others down.
        if name.startswith(f"{board}-") and name in (card := _read(card_path)).profiles:
            return Device(board, name, card)
    known = devices()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UnknownDevice(f"no device is called {name!r}. {hint}Known devices: {', '.join(known)}. A path to a .toml card works too.")


def _default(board: str, path: Path) -> Device:
    card = _read(path)
    if not card.profiles:
        return Device(board, board, card)
    profile = card.board.default_profile
    return Device(board, profile, card, resolved=f"{board} means its default profile {profile}")


def _card_paths() -> dict[str, Path]:
    # A user's card of the same name comes last and so replaces the shipped one: that is how a calibrated board overrides ours.
    return {path.stem: path for folder in _folders() if folder.is_dir() for path in sorted(folder.glob("*.toml"))}


def _folders() -> Iterator[Path]:
    package = Path(__file__).resolve().parent.parent
    installed = package / "devices"
    yield installed if installed.is_dir() else package.parent / "devices"
    yield Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgeprune" / "devices"


def _read(path: Path) -> Card:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DeviceError(
            f"the device card {path} cannot be read: {error.strerror}. Check the path, or name a board from `edgeprune device list`."
        ) from error
    return _parse(path, content)


@cache
def _parse(path: Path, content: bytes) -> Card:  # by content: many kernels give two changes within some milliseconds the same time
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DeviceError(
            f"the device card {path} is not valid TOML: {error}. Correct that line; a shipped card is a working example."
        ) from error
    try:
        card = Card.model_validate(table)
    except ValidationError as error:
        raise DeviceError(f"the device card {path} does not fit: {_complaints(error)}. Correct or remove what is named.") from error
    strangers = [name for name in card.profiles if not name.startswith(f"{path.stem}-")]
    if strangers:
        raise DeviceError(
            f"the device card {path} has the profile {strangers[0]!r}: a profile's name begins with the board's, {path.stem}-… ."
        )
    return card


def _complaints(error: ValidationError) -> str:
    return "; ".join(_complaint(problem["loc"], problem["type"], problem["msg"], problem["input"]) for problem in error.errors()[:5])


def _complaint(where: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    place = ".".join(str(part) for part in where if part != "[key]")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), _allowed(where[:-1]), n=1, cutoff=0.4)
        return f"unknown key {place}" + (f" (did you mean {near[0]}?)" if near else f" (allowed: {', '.join(_allowed(where[:-1]))})")
    shown = "" if isinstance(value, dict | list) else f", got {value!r}"
    return f"{place or 'the card'}: {message}{shown}"


def _allowed(where: tuple[int | str, ...]) -> list[str]:
    tables: dict[tuple[str, ...], type[BaseModel]] = {
        (): Card,
        ("board",): Board,
        ("power",): Power,
        ("profiles",): Profile,
        ("profiles", "fit"): Fit,
        ("profiles", "power"): Power,
        ("profiles", "memory"): Memory,
        ("profiles", "staircase"): Staircase,
        ("profiles", "kernels"): Rate,
    }
    # Names of profiles and kernel kinds are free keys inside these paths; what is left names the table.
    fixed = tuple(str(part) for position, part in enumerate(where) if position not in (1, 3) or ("profiles", part) in tables)
    return list(tables[tuple(part for part in fixed if part)].model_fields)
