"""Commands about boards and their profiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.terminal import print_json, print_table, progress_bars, say


def list_() -> None:
    """Boards and profiles."""
    from edgeprune.device.card import device as find_device
    from edgeprune.device.card import devices

    found = [find_device(name) for name in devices() if not find_device(name).resolved]
    rows = [[d.name, d.profile, "measured" if d.attached else "predicted", d.description] for d in found]
    print_table(["board", "profile", "figures are", "what it is"], rows)


def show(name: str) -> None:
    """The whole card of a board, with the sources of its facts and the error of its fit."""
    from edgeprune.device.card import device as find_device

    found = find_device(name)
    if found.resolved:
        say(found.resolved)
    print_json(found.card.model_dump(mode="json"))


def calibrate(
    name: Annotated[str, typer.Argument(help="a board or profile of `edgeprune device list`")] = "host",
    quick: Annotated[bool, typer.Option(help="12 small networks instead of 50 and no staircase of widths")] = False,
    anchors: Annotated[Path | None, typer.Option(help="3 to 10 networks measured on the board (JSON), which adapt the profile")] = None,
) -> None:
    """Fit a profile to a board: to small networks measured on it now, or with --anchors to what was measured on it."""
    from edgeprune.device.calibrate import anchored
    from edgeprune.device.calibrate import calibrate as fit_to_board
    from edgeprune.device.card import device as find_device
    from edgeprune.device.store import replace_profile, stored_measurements, user_cards

    found = find_device(name)
    if found.resolved:
        say(found.resolved)
    if anchors:
        profile, before, after, names = anchored(found.constants, anchors)
        rows = [[n, f"{b:+.1%}", f"{a:+.1%}"] for n, b, a in zip(names, before, after, strict=True)]
        print_table(["anchor", "error before", "error after (left out)"], rows)
    else:
        with progress_bars() as progress:
            profile = fit_to_board(found, quick=quick, store=stored_measurements(found), progress=progress).profile
    path = replace_profile(found, profile, user_cards() / f"{found.name}.toml")
    fit = profile.fit
    say(f"{found.profile}: {fit.mape:.1f} % off on average, {fit.within_10:.0f} % within ±10 % ({fit.held_out})")
    if profile.staircase:
        say(f"widths: multiples of {profile.staircase.channel_multiple} are the fastest per channel")
    say(f"written to {path}, which from now on stands for the card that ships with edgeprune")
