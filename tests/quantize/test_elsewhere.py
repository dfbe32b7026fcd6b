from __future__ import annotations

import onnx
import pytest
import torch

from edgeprune.device import measure
from edgeprune.device.card import device
from edgeprune.quantize import elsewhere as module
from edgeprune.quantize.elsewhere import Elsewhere, elsewhere
from edgeprune.quantize.network import Network
from tests.quantize.onnx_nets import SIDE, net, proto

INPUT = (torch.zeros(1, 3, SIDE, SIDE),)


def test_this_machine_is_not_elsewhere() -> None:
    assert elsewhere(device("host"), net(), INPUT) is None
    assert elsewhere(device("rpi4", host="local"), net(), INPUT) is None


def test_a_board_that_is_not_attached_has_its_cards_times_and_no_timings() -> None:
    found = elsewhere(device("rpi4"), net(), INPUT)
    assert isinstance(found, Elsewhere) and found.ratio is None
    assert set(Network(proto()).layers) <= found.layer_ms.keys() and min(found.layer_ms.values()) > 0
    assert "assumption for rpi4-ort, not measured" in found.basis


def test_an_attached_board_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is the only part that is replaced: there is no board here."""
    monkeypatch.setattr(module, "measure", lambda file, *_, **schedule: measure.measure(file, device("host"), **schedule))
    found = elsewhere(device("rpi4", host="pi@board"), net(), INPUT)
    assert found is not None and found.ratio is not None and "repaired by timings there" in found.basis
    small = onnx.ModelProto()
    small.CopyFrom(proto())
    assert 0.1 < found.ratio(proto(), small) < 10
