"""The first guess of host-ort and host-litert: calibrates this machine from orders of magnitude and writes devices/host.toml.

    python -m benchmarks.cost_host [--profiles host-ort,host-litert]
    python -m benchmarks.cost_host --profiles host-litert --blocks   # measures nothing: blocks of channels, by the staircase in the results

Users calibrate their own machine with `edgeprune device calibrate host`, which starts from what this wrote.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost_models import CORE, DEVICES, RESULTS, with_known_memory
from edgeprune.device.calibrate import calibrate
from edgeprune.device.card import Board, Card, Device, Fit, Profile, Staircase, device
from edgeprune.device.fit import Prior, rates, shape_of
from edgeprune.device.store import write_profiles

# A core of an x86-64 server with wide vectors: some four times a Cortex-A76.
SHAPE = {name: value / (4 if name.startswith("mac_ns") else 2) for name, value in CORE.items()}
CACHE_BYTES = float(2**20)
RUNTIMES = {"host-ort": ("onnxruntime", "ONNX Runtime"), "host-litert": ("litert", "LiteRT with XNNPACK")}
BOARD: dict[str, Any] = {
    "description": "this machine",
    "soc": "whatever it is: read at measuring time",
    "cores": 1,
    "clock_mhz": 2500.0,
    "memory_bytes": 2**30,
    "runtimes": ("onnxruntime", "litert"),
    "threads": 1,
    "channel_multiple": 8,
    "sensors": (),
    "sources": ("nominal: the facts of this machine are recorded with every measurement",),
    "attached": True,
}


def main() -> None:
    """Measures, fits, writes."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--profiles", default=",".join(RUNTIMES), help="which to calibrate")
    options.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "edgeprune-host", help="where measurements are kept")
    options.add_argument("--quick", action="store_true", help="few networks, no staircase")
    options.add_argument("--blocks", action="store_true", help="only put the blocks that the stored staircases show into the card")
    chosen = options.parse_args()
    made = {}
    for name in chosen.profiles.split(","):
        if chosen.blocks:
            stored = Staircase.model_validate_json((RESULTS / f"cost_staircase_{name}.json").read_text(encoding="utf-8"))
            made[name] = with_blocks(device(DEVICES / "host.toml").card.profiles[name], stored)
            continue
        guess = Device("host", name, Card(board=Board(**BOARD, default_profile=name), profiles={name: first_guess(name)}))
        fitted = calibrate(guess, store=chosen.store / f"{name}.json", quick=chosen.quick)
        # The steps are this machine's: they are shown, but not shipped as those of everybody's. The blocks that they show are, as all
        # constants here: widths in whole blocks of 16 channels are whole blocks where vectors are shorter, too.
        made[name] = fitted.profile.model_copy(update={"staircase": None})
        if steps := fitted.profile.staircase:
            text = json.dumps(steps.model_dump(mode="json"), indent=1)
            (RESULTS / f"cost_staircase_{name}.json").write_text(text + "\n", encoding="utf-8")
        fit = fitted.profile.fit
        print(f"{name}: {fit.rows} networks, {fit.mape:.1f} % off on unseen ones, {fit.within_10:.0f} % within ±10 %")
    profiles = with_known_memory("host", {**device(DEVICES / "host.toml").card.profiles, **made})
    write_profiles(DEVICES / "host.toml", profiles, "python -m benchmarks.cost_host")


def with_blocks(profile: Profile, steps: Staircase) -> Profile:
    """The profile with the blocks of channels whose convolutions look like a staircase (device/cost.py, in_blocks).

    The widths that were measured are inputs and outputs alike: blocks of both make steps twice as high as blocks of outputs alone. Not
    for host-ort: its held-out error rises with blocks.
    """
    widths, multiple = np.array(steps.widths, dtype=np.float64), steps.channel_multiple
    rows = [np.array(row) for name, row in steps.latency_ms.items() if name.startswith("conv")]

    def error(blocks: tuple[int, int]) -> float:
        counted = np.prod([np.ceil(widths / block) * block for block in blocks], axis=0)
        return sum(float(np.square(np.polyval(np.polyfit(counted, row, 1), counted) / row - 1).sum()) for row in rows)

    read, made = min(((1, 1), (1, multiple), (multiple, multiple)), key=error)
    return profile.model_copy(update={"input_block": read, "output_block": made})


def first_guess(name: str) -> Profile:
    """Constants to orders of magnitude, as a profile that can be calibrated."""
    runtime, words = RUNTIMES[name]
    nothing = Fit(
        source="none",
        method="orders of magnitude",
        held_out="none",
        rows=1,
        networks=1,
        mape=0,
        within_10=0,
        kendall_tau=0,
        coverage=0,
        low_factor=1,
        high_factor=1,
        macs=(1, 1),
        latency_ms=(1, 1),
        channels=(1, 1),
        activation_bytes=(1, 1),
    )
    constants = shape_of(Prior(SHAPE, 0.01))
    return Profile(
        runtime=runtime,
        threads=1,
        precision="fp32",
        clock_mhz=2500.0,
        description=f"{words}, fp32, 1 thread",
        network_us=float(constants[-1]),
        cache_bytes=CACHE_BYTES,
        kernels=rates(constants, {}),
        fit=nothing,
    )


if __name__ == "__main__":
    main()
