"""Commands about boards and their profiles."""

from __future__ import annotations

from edgeprune.terminal import print_json, print_table, say


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
