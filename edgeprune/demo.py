"""The main job on what ships with the installation: scikit-learn's digits and a small residual CNN trained on them here.

Nothing is downloaded and nothing is prepared: data, network and its training are those of the reference network `digits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from edgeprune.api import compress, predict
from edgeprune.device.card import device
from edgeprune.device.measure import QUICK, measure
from edgeprune.export import export
from edgeprune.plan import Budget
from edgeprune.reference import TRAINING, DigitNet, digits
from edgeprune.report import headline
from edgeprune.result import Result
from edgeprune.run import free_folder
from edgeprune.train import Progress, Recipe
from edgeprune.train.finetune import finetune

RECOVERY = Recipe(epochs=2, lr=0.05, batch_size=32, flip=False, crop_padding=1)
SHARE = 0.7  # of the dense network's latency is what the demo asks for


def run_demo(out: Path, progress: Progress) -> tuple[Result, Result]:
    """Train the network, then compress it for rpi4 and for this machine, both to 70% of the dense network's latency."""
    data = digits()
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 32, 32)
    model, _ = finetune(DigitNet(), None, data.train, None, TRAINING, progress=lambda _, d, t: progress("training the demo network", d, t))
    out.mkdir(parents=True, exist_ok=True)
    dense = export(model, example, out / "dense.onnx")
    budgets = {
        "rpi4": SHARE * predict(model, example, "rpi4").latency_ms.high,
        "host": SHARE * measure(dense.path, device("host"), **QUICK).latency_ms,
    }
    results = [
        compress(
            model,
            example,
            budget=Budget(latency_ms=float(f"{limit:.3g}")),
            device=name,
            data=data,
            recipe=RECOVERY,
            out=free_folder(out / name),
            name="digits",
            command=["edgeprune", "demo"],
            progress=lambda w, d, t, name=name: progress(f"{name}: {w}", d, t),  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        )
        for name, limit in budgets.items()
    ]
    return results[0], results[1]


def summary(results: Sequence[Result]) -> str:
    """Three lines: what was asked and reached on each device, and where the reports are."""
    lines = [f"{result.facts['title']}: {headline(result.facts)}" for result in results]
    return "\n".join([*lines, f"Reports: {' and '.join(str(result.folder / 'report.html') for result in results)}"])
