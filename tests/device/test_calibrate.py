from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune.device.calibrate import Probe, anchored, best_multiple, calibrate, probes
from edgeprune.device.card import device
from edgeprune.device.fit import MAC_KINDS
from edgeprune.device.kernels import kernels
from edgeprune.errors import DeviceError
from edgeprune.graph.trace import trace


def test_probes_are_of_the_kind_they_name() -> None:
    for probe in {p.kind: p for p in probes(quick=False)}.values():
        network, example = probe.build()
        kinds = kernels(trace(network, example)).kinds
        wanted = "depthwise" if probe.kind == "block" else probe.kind
        assert kinds.count(wanted) >= probe.depth - 1, probe
    assert set(MAC_KINDS) <= {p.kind for p in probes(quick=False)}
    assert len({p.name for p in probes(quick=False)}) == len(probes(quick=False))


def test_measurements_in_the_store_are_not_measured_again(tmp_path: Path) -> None:
    store, seen = tmp_path / "kept.json", []
    store.write_text(json.dumps({probe.name: 0.1 + 1e-7 * probe.channels * probe.side**2 for probe in probes(quick=True)}))
    made = calibrate(device("rpi4"), quick=True, store=store, progress=lambda *state: seen.append(state))
    assert made.profile.fit.rows == len(probes(quick=True))
    assert seen[-1] == ("networks", 12, 12)
    store.unlink()
    with pytest.raises(DeviceError, match="not attached"):
        calibrate(device("rpi4"), quick=True, store=store)


def test_the_staircase_gives_the_multiple_it_has() -> None:
    widths = tuple(range(40, 73, 4))
    for step in (4, 8, 16):
        rows = [[np.ceil(w / step) * step * scale for w in widths] for scale in (1.0, 2.5)]
        assert best_multiple(widths, rows) == step
    assert best_multiple(widths, [[float(w) for w in widths]]) == 4


def test_anchors_are_read_from_a_file(tmp_path: Path) -> None:
    profile = device("rpi4").constants
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "def make(c): return torch.nn.Sequential(torch.nn.Conv2d(3, c, 3), torch.nn.ReLU(), torch.nn.Conv2d(c, c, 3))\n"
        "def a(): return make(8)\ndef b(): return make(16)\ndef c(): return make(32)\n"
    )
    entries = [
        {"model": f"{tmp_path / 'nets.py'}:{name}", "input_shape": [1, 3, 32, 32], "latency_ms": ms}
        for name, ms in (("a", 2.0), ("b", 4.0), ("c", 10.0))
    ]
    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(entries))
    made, before, after, names = anchored(profile, path)
    assert len(names) == len(before) == len(after) == 3
    assert np.abs(after).mean() < np.abs(before).mean()
    assert made.kernels["conv3x3"].mac_ns > profile.kernels["conv3x3"].mac_ns
    path.write_text('{"model": 1}')
    with pytest.raises(DeviceError, match="JSON list"):
        anchored(profile, path)


def test_a_probe_is_the_same_every_time() -> None:
    one, other = (Probe("conv3x3", 8, 8).build()[0].state_dict() for _ in range(2))
    assert all(bool((one[name] == other[name]).all()) for name in one)
