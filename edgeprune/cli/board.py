"""Commands about boards and their profiles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli.options import AsJson, BoardName, DeviceName, Factory, Host, ModelOrArtifact, Shape, TrustPickle, load, shape_of
from edgeprune.errors import GateError, UsageError
from edgeprune.terminal import print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from edgeprune.device.card import Device, Power, Precision
    from edgeprune.device.power import Meter
    from edgeprune.device.session import Sitting


FIGURES = {
    "measured": "measured",
    "predicted": "predicted, unless --host names the board",
    "measured only": "measured only, where --host names the board: there is no profile to predict with",
}


def list_(as_json: AsJson = False) -> None:
    """Boards and profiles."""
    from edgeprune.device.card import device as find_device
    from edgeprune.device.card import devices

    found = [find_device(name) for name in devices() if not find_device(name).resolved]
    if as_json:
        named = {d.profile: {"board": d.name, "figures": _basis(d), "description": d.description} for d in found}
        return print_json(named)
    rows = [[d.name, d.profile, _basis(d), d.description] for d in found]
    print_table(["board", "profile", "figures are", "what it is"], rows)


def show(name: BoardName, as_json: AsJson = False) -> None:
    """The card of a board: facts, sources, errors of its fit.

    With --json everything, the constants of every kind of kernel too.
    """
    from edgeprune.device.card import device as find_device

    found = find_device(name)
    if found.resolved:
        say(found.resolved)
    if as_json:
        return print_json(found.card.model_dump(mode="json"))
    board, power = found.card.board, found.card.power
    rows = [
        ("board", f"{found.name}: {board.description}"),
        ("processor", board.soc + ("" if board.attached else f", {board.clock_mhz:,.0f} MHz; {board.memory_bytes / 1e9:.1f} GB of memory")),
        ("figures are", FIGURES[_basis(found)]),
        ("runtimes", ", ".join(board.runtimes)),
        *(("to install", wheel) for wheel in board.wheels),
        ("widths", f"multiples of {found.channel_multiple} unless --round-to says otherwise"),
        ("power sensors", ", ".join(board.sensors) or "none"),
        *([("power", _power(power))] if power else []),
        *(("source", source) for source in board.sources),
    ]
    for profile, card in found.card.profiles.items():
        fit, default = card.fit, " (the default)" if profile == board.default_profile else ""
        rows += [
            ("", ""),
            ("profile", f"{profile}{default}: {card.description}"),
            ("fitted to", f"{fit.source}; {fit.networks} networks, {fit.rows} measurements"),
            ("its error", f"{fit.mape:.1f} % on average, {fit.within_10:.0f} % within ±10 % ({fit.held_out})"),
            ("interval", f"{fit.low_factor:.2f} to {fit.high_factor:.2f} times the prediction held {fit.coverage:.0f} % of the unseen"),
            ("has seen", f"{fit.latency_ms[0]:g} to {fit.latency_ms[1]:g} ms, {fit.macs[0] / 1e6:,.0f} to {fit.macs[1] / 1e6:,.0f} M MACs"),
            *([("power", _power(card.power))] if card.power else []),
        ]
    print_table(["", ""], rows)


def _power(power: Power) -> str:
    held = power.validated or "not validated"
    return f"{power.active_mw / 1e3:.1f} W above {power.idle_mw / 1e3:.1f} W idle, ±{power.uncertainty:.0%}, {held} ({power.source})"


def calibrate(
    name: BoardName = "host",
    quick: Annotated[bool, typer.Option("--quick", help="14 small networks instead of 50 and no staircase of widths")] = False,
    host: Annotated[str | None, typer.Option(help="where the board is; several of one kind, with commas between, share the work")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, or int8: a profile of its own beside that of fp32, NAME-int8")] = None,
    anchors: Annotated[Path | None, typer.Option(help="3 to 10 networks measured on the board (JSON), which adapt the profile")] = None,
) -> None:
    """Fit a profile to a board by measuring networks on it.

    They are small and measured now; with --anchors, those of a file that were measured on the board before.
    """
    from edgeprune.device.calibrate import anchored
    from edgeprune.device.calibrate import calibrate as fit_to_board
    from edgeprune.device.card import device as find_device
    from edgeprune.device.store import keep_table, profile_name, replace_profile, stored_measurements, user_cards

    found = find_device(name, host=host)
    if found.resolved:
        say(found.resolved)
    known: dict[str | None, Precision | None] = {None: None, "fp32": "fp32", "int8": "int8"}
    if precision not in known:
        raise UsageError(f"--precision must be fp32 or int8, got {precision!r}.")
    if anchors and precision:
        raise UsageError("--anchors adapts the profile that is named, whatever its precision: leave --precision out.")
    store = stored_measurements(found, known[precision])
    if anchors:
        profile, before, after, names = anchored(found.constants, anchors)
        rows = [[n, f"{b:+.1%}", f"{a:+.1%}"] for n, b, a in zip(names, before, after, strict=True)]
        print_table(["anchor", "error before", "error after (left out)"], rows)
    else:
        with progress_bars() as progress:
            profile = fit_to_board(found, quick=quick, precision=known[precision], store=store, progress=progress).profile
    path, fitted = replace_profile(found, profile, user_cards() / f"{found.name}.toml"), profile_name(found, profile)
    fit = profile.fit
    say(f"{fitted}: {fit.mape:.1f} % off on average, {fit.within_10:.0f} % within ±10 % ({fit.held_out}); fitted to {fit.source}")
    if profile.staircase:
        say(f"widths: multiples of {profile.staircase.channel_multiple} are the fastest per channel")
    if not anchors:
        say(f"what was measured is in {keep_table(store, path, fitted)}")
    say(f"written to {path}, which from now on stands for the card that ships with edgeprune")


def profile(
    path: ModelOrArtifact,
    device: DeviceName = "host",
    host: Host = None,
    factory: Factory = None,
    input_shape: Shape = None,
    governor: Annotated[str | None, typer.Option(help="frequency governor while measuring; put back afterwards")] = None,
    energy: Annotated[bool, typer.Option(help="energy too, where there is a sensor (two minutes more)")] = True,
    meter: Annotated[str | None, typer.Option(help="CSV of an external meter as it is written, with a column power_w; - for stdin")] = None,
    out: Annotated[Path, typer.Option(help="what was measured, as JSON")] = Path("measurements.json"),
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """What the network costs on a device, measured or predicted.

    Measured where the board is attached (--host, or this machine), predicted where it is not.
    """
    from edgeprune.cli.costs import predicted
    from edgeprune.device.card import device as find_device

    target = find_device(device, host=host)
    is_artifact = path.suffix in (".onnx", ".tflite")
    if not target.attached and not is_artifact:
        predicted(load(path, factory, shape_of(input_shape), trust_pickle), target, as_json)
        return
    if not is_artifact and target.predicts and target.constants.precision == "int8":
        raise UsageError(f"{target.profile} is of int8 kernels, {path} would be measured in fp32: export it with --quantize int8 first.")
    from edgeprune.device.session import sitting
    from edgeprune.run import write_json

    with _meter(meter) as source, TemporaryDirectory() as folder:
        file = path if is_artifact else _exported(path, Path(folder), factory, input_shape, trust_pickle)
        found = sitting(file, target, governor=governor, energy=energy, meter=source)
    table = found.measurement.to_json() | {"operations": [asdict(o) for o in found.operations], "missing": list(found.missing)}
    write_json(out, {path.stem: table | {"device": target.profile, "host": target.host}})
    if as_json:
        print_json(table)
    else:
        _tell(path.name, target.profile, found)
    say(f"written to {out}")


def check(name: BoardName, host: Host = None, as_json: AsJson = False) -> None:
    """What the board has, and what is missing for measuring."""
    from edgeprune.device.card import device as find_device
    from edgeprune.device.check import check as look_at

    found = look_at(find_device(name, host=host))
    if as_json:
        print_json([asdict(f) for f in found])
    else:
        print_table(["", "what", "found", "what would help"], [["ok" if f.ok else "--", f.what, f.found, f.remedy] for f in found])
    if missing := [f.what for f in found if f.needed and not f.ok]:
        raise GateError(f"nothing can be measured on {name} yet: {', '.join(missing)} missing. The last column says what would help.")


def _exported(path: Path, folder: Path, factory: str | None, shape: str | None, trust_pickle: bool) -> Path:
    from edgeprune.export import export

    loaded = load(path, factory, shape_of(shape), trust_pickle)
    return export(loaded.model, loaded.example_inputs, folder / f"{loaded.name}.onnx").path


@contextmanager
def _meter(name: str | None) -> Iterator[Meter | None]:
    """The external meter whose lines come from a file that grows, or from stdin."""
    from edgeprune.device.power import Meter

    if name is None:
        yield None
    elif name == "-":
        yield Meter(sys.stdin)
    else:
        try:
            with open(name, encoding="utf-8") as stream:
                yield Meter(stream)
        except OSError as error:
            raise UsageError(f"--meter {name} cannot be read: {error.strerror}.") from error


def _tell(name: str, profile_name: str, found: Sitting) -> None:
    m = found.measurement
    rows = [[o.name, o.op, f"{o.latency_ms:.3f}", f"{o.share:.1%}"] for o in found.operations]
    if rows:
        print_table(["operation", "kind", "ms", "share"], rows)
        typer.echo("(medians under the runtime's profiler, which costs time of its own)\n")
    typer.echo(
        f"{name} on {profile_name}: {m.latency_ms:.3f} ms measured ({m.low_ms:.3f} to {m.high_ms:.3f}, 95% interval), "
        f"p90 {m.p90_ms:.3f} ms, p99 {m.p99_ms:.3f} ms, fastest {m.min_ms:.3f} ms\n"
        f"  {m.runs:,} runs in {len(m.process_medians_ms)} fresh processes, threads: {m.threads}, outliers: {m.outliers}, "
        f"{m.fingerprint['runtime']}\n"
        f"  load {m.load_ms:.1f} ms, first inference {m.first_ms:.3f} ms, peak memory of the process {m.peak_memory_bytes / 1e6:.1f} MB"
    )
    if m.energy:
        e = m.energy
        typer.echo(
            f"  {e.total_mj:.3f} mJ per inference ({e.total_low_mj:.3f} to {e.total_high_mj:.3f} in {e.trials} trials), "
            f"{e.net_mj:.3f} mJ net of idling ({e.source}, {e.scope}: {e.active_mw:.0f} mW active, {e.idle_mw:.0f} mW idle)"
        )
    state = m.fingerprint["states"][-1]["after"]
    heat = f"{max(state['temperatures_c']):.0f} C" if state.get("temperatures_c") else "no temperature sensor"
    word = f"throttle word {state['throttle_word']:#x}" if "throttle_word" in state else "no throttle word"
    typer.echo(f"  {heat}, {word}" + (f", governor {', '.join(state['governors'])}" if state.get("governors") else ""))
    if m.parity:
        typer.echo(f"  computes what it computes here: outputs differ by {m.parity.relative:.2%} at most")
    for note in (*(f"not valid for calibration: {p}" for p in m.problems), *found.missing):
        typer.echo(f"- {note}")


def _basis(device: Device) -> str:
    if device.attached:
        return "measured"
    return "predicted" if device.predicts else "measured only"
