"""Results as the pipeline hands them to the report: a full ResNet-56 run, 500 groups, next to nothing, and one full of markup."""

from __future__ import annotations

import math
from typing import Any

EVIL = "<script>alert(1)</script>"
PREDICTED = "predicted, not measured: upper end of the 90% interval, profile rpi4-ort"
Facts = dict[str, Any]


def resnet_groups() -> list[Facts]:
    """The 27 removable groups of a ResNet-56: the first conv of every block, three stages of nine."""
    widths = {1: 16, 2: 32, 3: 64}
    return [
        {"name": f"layer{s}.{b}.conv1", "channels": c, "kept": max(8, c - 8 * ((s * b) % (c // 8 + 1))), "members": 4}
        for s, c in widths.items()
        for b in range(9)
    ]


def full() -> Facts:
    """A run of ResNet-56 with everything in it."""
    return {
        "title": "resnet56 for rpi4",
        "edgeprune": "0.1.0",
        "created": "2026-11-21T08:00:00+00:00",
        "command": "edgeprune compress resnet56.th --model nets.py:resnet56 --data cifar10 --device rpi4 --latency-ms 30 --epochs 12",
        "device": {"name": "rpi4", "profile": "rpi4-ort", "description": "Raspberry Pi 4 Model B, 4 x Cortex-A72", "attached": False},
        "criterion": "nuclear_norm",
        "allocator": "knapsack",
        "round_to": 8,
        "seed": 0,
        "budgets": [
            {"name": "latency_ms", "asked": 30.0, "reached": 29.6, "unit": "ms", "met": True, "how": PREDICTED},
            {
                "name": "macs",
                "asked": 62_742_853.0,
                "reached": 61_480_960.0,
                "unit": "",
                "met": True,
                "how": "counted from the traced operations",
            },
        ],
        "figures": [
            {
                "name": "accuracy",
                "unit": "%",
                "before": {"value": 93.39, "low": None, "high": None},
                "after": {"value": 92.81, "low": None, "high": None},
                "basis": "measured",
                "how": "10,000 validation images, measured with torch",
            },
            {
                "name": "latency",
                "unit": "ms",
                "before": {"value": 55.1, "low": 51.9, "high": 58.4},
                "after": {"value": 28.1, "low": 26.4, "high": 29.6},
                "basis": "predicted",
                "how": PREDICTED,
            },
            {
                "name": "macs",
                "unit": "",
                "before": {"value": 125_485_706, "low": None, "high": None},
                "after": {"value": 61_480_960, "low": None, "high": None},
                "basis": "counted",
                "how": "multiply-accumulates of the traced operations",
            },
            {
                "name": "params",
                "unit": "",
                "before": {"value": 853_018, "low": None, "high": None},
                "after": {"value": 441_226, "low": None, "high": None},
                "basis": "counted",
                "how": "elements of the parameters",
            },
            {
                "name": "size",
                "unit": "bytes",
                "before": {"value": 3_445_120, "low": None, "high": None},
                "after": {"value": 1_790_233, "low": None, "high": None},
                "basis": "measured",
                "how": "bytes of the ONNX file",
            },
            {
                "name": "peak_memory",
                "unit": "bytes",
                "before": {"value": 6_700_000, "low": None, "high": None},
                "after": {"value": 4_410_000, "low": None, "high": None},
                "basis": "predicted",
                "how": "weights plus the largest live activations",
            },
        ],
        "accuracy_steps": [
            {"step": "dense", "accuracy": 0.9339, "images": 10_000},
            {"step": "right after pruning", "accuracy": 0.6412, "images": 10_000},
            {"step": "after BN recalibration", "accuracy": 0.8577, "images": 10_000},
            {"step": "after fine-tuning", "accuracy": 0.9281, "images": 10_000},
        ],
        "groups": resnet_groups(),
        "layers": [
            {
                "name": f"layer{s}.{b}.conv{c}",
                "kind": "conv3x3",
                "before_ms": 1.25 - 0.01 * b,
                "after_ms": 0.625 + 0.02 * b,
                "before_macs": 2_359_296,
                "after_macs": 1_179_648,
            }
            for s in (1, 2, 3)
            for b in range(9)
            for c in (1, 2)
        ],
        "curve": [
            {
                "epoch": e,
                "train_loss": 0.12 + 0.4 * math.exp(-e / 3),
                "val_loss": 0.27 + 0.2 * math.exp(-e / 4),
                "val_accuracy": 0.93 - 0.05 * math.exp(-e / 3),
                "lr": 0.01 * (1 - e / 13),
                "seconds": 605.0,
            }
            for e in range(1, 13)
        ],
        "rounds": [
            {"round": 1, "predicted_ms": 29.0, "measured_ms": 33.1, "low_ms": 32.5, "high_ms": 33.9, "correction": 1.14},
            {"round": 2, "predicted_ms": 29.4, "measured_ms": 29.6, "low_ms": 29.1, "high_ms": 29.9, "correction": 1.007},
        ],
        "sensors": [
            {
                "network": name,
                "power_mw": [[0.1 * n, 2100 + (extra if n // 100 % 2 else 0) + 7 * (n % 3)] for n in range(300)],
                "temperatures_c": [start + n / 2 for n in range(6)],
            }
            for name, extra, start in (("dense", 2900, 48.312), ("compressed", 2400, 51.5))
        ],
        "frozen": [
            {"parameter": "fc.weight[0]", "reason": "output of the network"},
            *({"parameter": f"layer{s}.{b}.conv2.weight[0]", "reason": "feeds a residual sum"} for s in (1, 2, 3) for b in range(9)),
            {"parameter": "fc.bias[0]", "reason": "output of the network"},
        ],
        "artifacts": [
            {
                "format": "onnx",
                "path": "model.onnx",
                "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "size_bytes": 1_790_233,
                "parity_max_abs": 1.1e-6,
                "parity_relative": 1.3e-7,
                "bits": {f"layer{s}.0.conv1": 2 + 2 * s for s in (1, 2, 3)},
            },
        ],
        "proof": {"max_relative_error": 2e-15, "samples": 2, "dtype": "float64"},
        "stages": [
            {"name": n, "seconds": s, "cached": n == "trace"}
            for n, s in (("trace", 0.4), ("score", 12.1), ("fine-tune", 7260.0), ("export", 3.2))
        ],
        "environment": {"python": "3.11.7", "torch": "2.13.0", "onnxruntime": "1.22.0", "cpu": "2 cores"},
        "preprocessing": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616], "size": [32, 32]},
        "notes": ["stripped the prefix module. from 56 keys"],
    }


def large() -> Facts:
    """500 groups, long names."""
    groups = []
    for i in range(500):
        channels = 64 + 64 * (i // 100)
        kept = 8 * max(1, round(channels * (0.45 + 0.3 * math.sin(i / 17)) / 8))
        groups.append(
            {
                "name": f"backbone.features.stage_{i // 50}.block_{i % 50}.depthwise_separable.conv",
                "channels": channels,
                "kept": kept,
                "members": 3,
            }
        )
    return full() | {"title": "a network of 500 groups", "groups": groups}


def minimal() -> Facts:
    """No data, no board, no training: most lists empty, most values None."""
    empty: Facts = {name: [] for name in ("accuracy_steps", "groups", "curve", "rounds", "frozen", "artifacts", "stages", "notes")}
    nothing = {"value": None, "low": None, "high": None}
    return empty | {
        "title": "net", "edgeprune": "0.1.0", "created": "2026-11-21T08:00:00+00:00", "command": None,
        "device": {"name": "host", "profile": None, "description": None, "attached": True},
        "criterion": None, "allocator": None, "round_to": None, "seed": None,
        "budgets": [{"name": "macs", "asked": 5e6, "reached": None, "unit": "", "met": None, "how": None}],
        "figures": [{"name": "accuracy", "unit": "%", "before": None, "after": nothing, "basis": None, "how": None}],
        "proof": None, "environment": {}, "preprocessing": None,
    }  # fmt: skip


def hostile() -> Facts:
    """Markup wherever the model, its data or its files can put a name; the words the contract fixes stay."""
    fixed = {(entry[key]) for entry in full()["figures"] + full()["budgets"] for key in ("name", "unit", "basis") if key in entry}

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [poison(entry) for entry in value]
        return f"{EVIL}<b>|`*_{value}" if isinstance(value, str) and value not in fixed else value

    poisoned: Facts = poison(full())
    poisoned["artifacts"][0]["bits"] = {f"{EVIL}<b>|`*_{name}": count for name, count in full()["artifacts"][0]["bits"].items()}
    poisoned["environment"][EVIL] = "<img src=x onerror=alert(2)>"
    poisoned["groups"][0]["name"] = '</script><a href="javascript:alert(3)">%{x} &lt;b&gt;'
    return poisoned
