from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cost_models import CPU
from benchmarks.cost_sizes import across, judged, side, table
from benchmarks.cost_tables import Layer, kernels_of
from edgeprune.device.fit import Prior, Sample

PRIOR = Prior(CPU, 0.003)


def rows(spill: float) -> list[Sample]:
    """Twelve networks at 64 and 128 pixels; at 128 every map costs `spill` times what its MACs say."""
    found = []
    for width in range(16, 64, 4):
        for pixels in (64, 128):
            positions = pixels**2
            layer = Layer(
                "conv3x3", 9 * positions * width**2, positions * width, positions * width, 9 * width**2, 9 * positions * width, width
            )
            ms = (layer.macs * 2e-7 + 0.01) * (spill if pixels == 128 else 1)
            found.append(Sample(f"net{width}_{pixels}", f"net{width}", ms, kernels_of([layer] * 3)))
    return found


@pytest.mark.parametrize("held", ["size", "size and architecture"])
def test_growth_that_the_model_has_is_predicted_and_what_it_lacks_shows_as_bias(held: str) -> None:
    kept, lost = (across(rows(spill), PRIOR, 64, (128,), held=held) for spill in (1.0, 1.3))
    assert kept["networks"] == 12 and kept["within_10"] >= 90 and kept["kendall_tau"] == 1
    assert lost["bias"] / kept["bias"] == pytest.approx(1.3, rel=0.01)
    assert lost["within_10"] < kept["within_10"]


def test_figures_and_their_table() -> None:
    figures = judged(np.array([1.0, 0.8, 1.05]), np.array([1.0, 2.0, 3.0]), np.array([True, False, True]))
    assert figures == {"networks": 3, "within_10": 66.7, "mape": 9.92, "kendall_tau": 1.0, "coverage": 66.7, "bias": 1.0}
    row = {"profile": "rpi4-ort", "fitted_at": 64, "asked_at": "128²", "held_out": "size", **figures}
    assert table([row]).splitlines()[-1] == "| rpi4-ort | 64² | 128² | size | 3 | 67 % | 9.9 % | 1.000 | 67 % | 1.00 |"
    assert side(rows(1.0)[0]) == 64
