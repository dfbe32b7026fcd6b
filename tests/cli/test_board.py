from __future__ import annotations

import json

from tests.cli.conftest import Command


def test_devices(edgeprune: Command) -> None:
    done = edgeprune("device", "list")
    assert {("host", "measured"), ("rpi4", "predicted")} <= {(w[0], w[2]) for w in map(str.split, done.out.splitlines()[1:])}
    shown = edgeprune("device", "show", "rpi4")
    assert json.loads(shown.out)["board"]["soc"].startswith("Broadcom")
    assert "rpi4-ort" in shown.err
    assert edgeprune("device", "show", "rpi9").code == 4
