"""What a run found, worded for people: the object behind --json and the report. Every figure says how it was obtained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.widths import DEFAULT_RULES

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.choice import Choice
    from edgeprune.device.cost import Cost
    from edgeprune.device.measure import Measurement
    from edgeprune.export import Artifact
    from edgeprune.graph import ChannelGraph
    from edgeprune.graph.slim import Proof
    from edgeprune.pipeline import Job
    from edgeprune.plan import Plan
    from edgeprune.train import Epoch
    from edgeprune.train.evaluate import Accuracy

UNITS = {"latency_ms": "ms", "energy_mj": "mJ", "size_bytes": "bytes", "peak_memory_bytes": "bytes"}


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `facts` is the JSON object of the report; `met` says whether every limit of the budget holds.

    With several budgets: the model and plan of the first, and `parts`, the run of each, in the order asked.
    """

    folder: Path
    model: nn.Module
    plan: Plan
    facts: Mapping[str, Any]
    parts: tuple[Result, ...] = ()

    @property
    def met(self) -> bool:
        """Whether every limit of every budget holds, by measurement where the device is attached."""
        return all(b["met"] for b in self.facts["budgets"])

    def to_json(self) -> dict[str, Any]:
        """The facts, `met`, the folder, and every file in it by its name there: what --json prints."""
        files = {str(p.relative_to(self.folder)): str(p) for p in sorted(self.folder.rglob("*")) if p.is_file()}
        return {**self.facts, "met": self.met, "folder": str(self.folder), "files": files}


@dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """Everything the stages returned."""

    job: Job
    graph: ChannelGraph
    choice: Choice
    proof: Proof
    dense_cost: Cost
    cost: Cost
    accuracies: Mapping[str, Accuracy | None]
    curve: tuple[Epoch, ...]
    artifacts: tuple[Artifact, ...]
    measurements: Mapping[str, Measurement]


def facts(found: Findings, manifest: Mapping[str, Any], used: Mapping[str, bool], command: str) -> dict[str, Any]:
    """The report's JSON object; `used` names the stages of this process and says which were read back."""
    job, device = found.job, found.job.device
    return {
        "title": f"{job.name} for {device.name}",
        "edgeprune": manifest["versions"].get("edgeprune") or "",
        "created": manifest["created"],
        "command": command,
        "device": {
            "name": device.name,
            "profile": device.profile,
            "description": device.description,
            "attached": device.attached,
            "host": device.host,
        },
        "criterion": job.criterion,
        "allocator": job.allocator,
        **job.rules.to_json(),
        "seed": job.seed,
        "budgets": _budgets(found),
        "figures": _figures(found),
        "accuracy_steps": [
            {"step": step, "accuracy": a.accuracy, "images": a.images} for step, a in found.accuracies.items() if a is not None
        ],
        "groups": [
            {"name": g.name, "channels": g.channels, "kept": len(found.choice.plan.keep[g.name]), "members": len(g.members)}
            for g in found.graph.groups
        ],
        "curve": [asdict(e) for e in found.curve],
        "rounds": [asdict(r) for r in found.choice.rounds],
        "search": dict(found.choice.search),
        "frozen": [{"parameter": name, "reason": reason} for name, reason in found.graph.frozen.items()],
        "artifacts": [
            {
                "format": a.format,
                "path": a.path.name,
                "sha256": a.sha256,
                "size_bytes": a.size_bytes,
                "parity_max_abs": a.parity_max_abs,
                "parity_relative": a.parity_relative,
            }
            for a in found.artifacts
        ],
        "proof": asdict(found.proof),
        "stages": [{"name": name, "seconds": manifest["stages"][name]["seconds"], "cached": cached} for name, cached in used.items()],
        "environment": {**manifest["versions"], "platform": manifest["platform"]},
        "preprocessing": job.data.preprocessing.to_json() if job.data else None,
        "notes": [
            *job.notes,
            *_rules(found),
            *_epochs(found),
            *([device.resolved] if device.resolved else []),
            *found.cost.notes,
            *_float_only(found),
            *(f"measuring the {name} network: {problem}" for name, m in found.measurements.items() for problem in m.problems),
        ],
    }


def comparison(parts: Sequence[Result], manifest: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The JSON object of several runs that share a search: what they have in common, all budgets, and one point per run."""
    first = parts[0].facts
    common = ("edgeprune", "device", "criterion", "allocator", *DEFAULT_RULES.to_json(), "seed", "environment", "preprocessing", "search")
    return {
        **{name: first[name] for name in common},
        "title": f"{first['title']}: {len(parts)} budgets",
        "created": manifest["created"],
        "command": command,
        "budgets": [budget for part in parts for budget in part.facts["budgets"]],
        "points": [_point(part) for part in parts],
    }


def _point(part: Result) -> dict[str, Any]:
    """What a run reached; accuracy in percent, None without labelled data."""
    after = {f["name"]: f["after"]["value"] for f in part.facts["figures"]}
    return {
        "name": part.folder.name,
        "accuracy": after.get("accuracy"),
        **{name: after[name] for name in ("latency", "macs", "params", "size")},
        "latency_basis": next(f["basis"] for f in part.facts["figures"] if f["name"] == "latency"),
        "met": part.met,
        "artifacts": [f"{part.folder.name}/{a['path']}" for a in part.facts["artifacts"]],
    }


def _float_only(found: Findings) -> list[str]:
    """That predictions are for float kernels, where the artifact has others."""
    if found.job.quantize == "none" or found.measurements:
        return []
    return ["latency, energy and memory are predicted for the network in fp32: no card has constants of int8 kernels yet"]


def _rules(found: Findings) -> list[str]:
    """What the user forbade, in words; nothing where nothing was."""
    rules, dense = found.job.rules, sorted(found.job.rules.dense_groups(found.graph))
    words = []
    if rules.keep_dense:
        words.append(f"kept dense as asked ({', '.join(rules.keep_dense)}): {', '.join(dense) or 'nothing that could have shrunk'}")
    if rules.min_channels != DEFAULT_RULES.min_channels:
        words.append(f"no layer was cut below {rules.min_channels} channels, as asked")
    if rules.max_remove != DEFAULT_RULES.max_remove:
        words.append(f"no group lost more than {rules.max_remove:.0%} of its channels, as asked")
    return words


def _epochs(found: Findings) -> list[str]:
    """Which epoch's weights these are, and what the last one was worth."""
    last = found.curve[-1] if found.curve else None
    best = next((e for e in reversed(found.curve) if e.chosen), None)
    rounds = [f"pruned and recovered in {found.job.rounds} rounds"] if found.job.rounds > 1 else []
    if last is None or best is None or best.val_accuracy is None or last.val_accuracy is None:
        return rounds
    told = f"the weights are those of epoch {best.epoch}, {best.val_accuracy:.2%} on held-out training images"
    beside = ", the last one" if best is last else f"; the last one, epoch {last.epoch}, has {last.val_accuracy:.2%} there"
    return [*rounds, told + beside]


def _reached(found: Findings) -> dict[str, tuple[float, str]]:
    """Every figure a budget may name: its value and how it was obtained."""
    cost = found.cost
    largest = max(found.artifacts, key=lambda a: a.size_bytes)  # whichever is deployed must fit
    reached: dict[str, tuple[float, str]] = {
        "macs": (cost.macs, "counted: multiply-accumulates of conv and linear layers, one image"),
        "params": (cost.params, "counted"),
        "size_bytes": (largest.size_bytes, f"measured: the {largest.format} file"),
        "peak_memory_bytes": (cost.peak_memory_bytes, "predicted: what the process has in an inference beyond the imported runtime"),
    }
    if found.measurements:
        m = found.measurements["compressed"]
        reached["latency_ms"] = (m.high_ms, "measured: upper end of the 95% interval of the median")
        if m.network_memory_bytes:
            reached["peak_memory_bytes"] = (m.network_memory_bytes, "measured: what the process had beyond the imported runtime")
    else:
        reached["latency_ms"] = (cost.latency_ms.high, f"upper end of the 90% interval; {cost.basis}")
    if found.measurements and (spent := found.measurements["compressed"].energy):
        reached["energy_mj"] = (spent.net_high_mj, f"measured: net of idling, the highest of {spent.trials} trials ({spent.source})")
    elif cost.energy_mj:
        reached["energy_mj"] = (cost.energy_mj.high, "predicted: estimate, not validated")
    return reached


def _budgets(found: Findings) -> list[dict[str, Any]]:
    reached = _reached(found)
    asked = found.job.budget.absolute({"macs": found.graph.macs, "params": found.graph.params})
    return [
        {
            "name": name,
            "asked": limit,
            "reached": reached[name][0],
            "unit": UNITS.get(name, ""),
            "met": reached[name][0] <= limit,
            "how": reached[name][1],
            "basis": _basis(reached[name][1], found, name),
        }
        for name, limit in asked.items()
    ]


def _basis(how: str, found: Findings, name: str) -> str:
    if name == "latency_ms":
        return "measured" if found.measurements else "predicted"
    return how.partition(":")[0]


def _figures(found: Findings) -> list[dict[str, Any]]:
    figures = []
    reached = _reached(found)
    dense = found.accuracies.get("dense")
    step, last = next(((s, a) for s, a in reversed([*found.accuracies.items()]) if a), ("", None))
    if dense and last:
        how = f"top-1 on {last.images:,} validation images, by torch, {step}"
        figures.append(_figure("accuracy", "%", (_value(100 * dense.accuracy), _value(100 * last.accuracy)), how, "measured"))
    if found.measurements:
        m = found.measurements["compressed"]
        how = f"median of {m.runs} runs in {len(m.process_medians_ms)} fresh processes, {m.threads} thread(s), 95% interval"
        figures.append(_figure("latency", "ms", (_interval(found.measurements["dense"]), _interval(m)), how, "measured"))
    else:
        sides = asdict(found.dense_cost.latency_ms), asdict(found.cost.latency_ms)
        figures.append(_figure("latency", "ms", sides, found.cost.basis, "predicted"))
    counted = {"macs": found.graph.macs, "params": found.graph.params}
    for name, value in counted.items():
        figures.append(_figure(name, "", (_value(value), _value(reached[name][0])), reached[name][1], "counted"))
    size, how = reached["size_bytes"]
    figures.append(_figure("size", "bytes", (_value(found.dense_cost.size_bytes), _value(size)), f"{how}; before: predicted", "measured"))
    memory, how = reached["peak_memory_bytes"]
    dense_memory = found.dense_cost.peak_memory_bytes
    if how.startswith("measured"):
        dense_memory = found.measurements["dense"].network_memory_bytes
    figures.append(_figure("peak_memory", "bytes", (_value(dense_memory), _value(memory)), how, how.partition(":")[0]))
    if found.cost.energy_mj and found.dense_cost.energy_mj:
        sides = asdict(found.dense_cost.energy_mj), asdict(found.cost.energy_mj)
        figures.append(_figure("energy", "mJ", sides, "estimate, not validated", "predicted"))
    return figures


def _figure(name: str, unit: str, sides: tuple[Mapping[str, Any], Mapping[str, Any]], how: str, basis: str) -> dict[str, Any]:
    """`sides`: the dense network's value and the compressed one's."""
    return {"name": name, "unit": unit, "before": sides[0], "after": sides[1], "how": how, "basis": basis}


def _value(value: float) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None}


def _interval(m: Measurement) -> dict[str, Any]:
    return {"value": m.latency_ms, "low": m.low_ms, "high": m.high_ms}
