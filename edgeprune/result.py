"""What a run found, worded for people: the object behind --json and the report. Every figure says how it was obtained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.device.measure import MEASURED
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

COMPARED = ("title", "criterion", "allocator", *DEFAULT_RULES.to_json(), "seed")  # what tells runs apart; a title names the device
COMMON = (*COMPARED, "device", "edgeprune", "environment", "preprocessing", "search")
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
        "layers": _layers(found),
        "curve": [asdict(e) for e in found.curve],
        "rounds": [asdict(r) | {"others": [asdict(o) | {"unit": UNITS[o.name]} for o in r.others]} for r in found.choice.rounds],
        "search": dict(found.choice.search),
        "sensors": _sensors(found),
        "frozen": [{"parameter": name, "reason": reason} for name, reason in found.graph.frozen.items()],
        "artifacts": [_artifact(a) for a in found.artifacts],
        "proof": asdict(found.proof),
        "stages": stages(manifest, used),
        "environment": {**manifest["versions"], "platform": manifest["platform"]},
        "preprocessing": job.data.preprocessing.to_json() if job.data else None,
        "notes": [
            *job.notes,
            *_rules(found),
            *_epochs(found),
            *([device.resolved] if device.resolved else []),
            *found.cost.notes,
            *_other_precision(found),
            *_other_runtime(found),
            *(f"measuring the {name} network: {problem}" for name, m in found.measurements.items() for problem in m.problems),
        ],
    }


def stages(manifest: Mapping[str, Any], used: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The stages that `used` names, how long each took, and whether it was read back."""
    return [{"name": name, "seconds": manifest["stages"][name]["seconds"], "cached": cached} for name, cached in used.items()]


def comparison(runs: Mapping[str, Mapping[str, Any]], *, title: str, created: str, command: str) -> dict[str, Any]:
    """The JSON object of several runs side by side, from their facts by the path of their folders: what they share, and one point each.

    What they do not share (device, criterion, a rule) stands with each point. The dense network is there if it is the same for all.
    """
    first, *others = runs.values()
    shared = [name for name in COMMON if all(run[name] == first[name] for run in others)]
    differing = [name for name in COMPARED if name not in shared]
    dense = _reached_by(first, "before")
    names = {folder: Path(folder).name for folder in runs}
    if len(set(names.values())) < len(runs):
        names = {folder: folder for folder in runs}
    return {
        **{name: first[name] if name in shared else None for name in COMMON},
        "title": title,
        "created": created,
        "command": command,
        "budgets": [budget for run in runs.values() for budget in run["budgets"]],
        "points": [{"name": names[folder], **_point(folder, run, differing)} for folder, run in runs.items()],
        "dense": dense if all(_reached_by(run, "before") == dense for run in others) else None,
    }


def _point(folder: str, run: Mapping[str, Any], differing: Sequence[str]) -> dict[str, Any]:
    """What a run reached, and its choices where runs differ."""
    choices = [str(run[name]) if name == "title" else f"{name.replace('_', ' ')} {run[name]}" for name in differing]
    return {
        "folder": folder,
        "choices": ", ".join(choices),
        **_reached_by(run, "after"),
        "latency_basis": next(f["basis"] for f in run["figures"] if f["name"] == "latency"),
        "met": all(budget["met"] for budget in run["budgets"]),
        "artifacts": [f"{folder}/{a['path']}" for a in run["artifacts"]],
    }


def _reached_by(run: Mapping[str, Any], side: str) -> dict[str, Any]:
    """What a comparison shows of one network, "before" or "after"; accuracy in percent, None without labelled data."""
    values = {f["name"]: f[side]["value"] for f in run["figures"]}
    return {"accuracy": values.get("accuracy"), **{name: values[name] for name in ("latency", "macs", "params", "size")}}


def _other_precision(found: Findings) -> list[str]:
    """That predictions are for kernels of another precision than the artifact's."""
    device, quantized = found.job.device, found.job.quantize != "none"
    if found.measurements or not device.predicts or (device.constants.precision == "int8") == quantized:
        return []
    remedy = "edgeprune device calibrate --precision int8 makes a profile of int8 kernels; no shipped card has one"
    return [f"latency and energy are predicted for {device.constants.precision} kernels{f': {remedy}' if quantized else ''}"]


def _other_runtime(found: Findings) -> list[str]:
    """That what was measured ran in another runtime than the profile's, whose predictions led there."""
    device = found.job.device
    if not found.measurements or not device.predicts:
        return []
    runtime = str(found.measurements["compressed"].fingerprint.get("runtime", ""))
    kin = {"litert": ("ai-edge-litert", "tflite-runtime")}.get(device.constants.runtime, ("onnxruntime",))
    return [] if not runtime or runtime.startswith(kin) else [f"measured with {runtime}, the profile {device.profile} is of {kin[0]}"]


def _rules(found: Findings) -> list[str]:
    """What the user forbade, in words; nothing where nothing was."""
    rules, dense = found.job.rules, sorted(found.job.rules.dense_groups(found.graph))
    words = []
    if rules.keep_dense:
        words.append(f"kept dense as asked ({', '.join(rules.keep_dense)}): {', '.join(dense) or 'nothing that could have shrunk'}")
    if rules.min_channels == 0:
        words.append(f"residual branches could go as a whole, as asked: {', '.join(found.choice.plan.empty) or 'none'} did")
        words += [f"the branch of {name} stays: {why}" for name, why in found.graph.stuck.items()]
    elif rules.min_channels != DEFAULT_RULES.min_channels:
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
    reached["latency_ms"] = (cost.latency_ms.high, f"upper end of the 90% interval; {cost.basis}")
    if cost.energy_mj:
        reached["energy_mj"] = (cost.energy_mj.high, "predicted: estimate, not validated")
    if found.measurements:
        measured = {name: found.measurements["compressed"].figure(name) for name in MEASURED}
        reached |= {name: (figure.high, f"measured: {figure.how}") for name, figure in measured.items() if figure}
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
            # where a board is attached, a prediction is no proof
            "met": reached[name][0] <= limit and not (found.measurements and name in MEASURED and _basis(reached[name][1]) == "predicted"),
            "how": reached[name][1],
            "basis": _basis(reached[name][1]),
        }
        for name, limit in asked.items()
    ]


def _basis(how: str) -> str:
    """The first word of how a figure was obtained: counted, measured or predicted."""
    word = how.partition(":")[0]
    return word if word in ("counted", "measured") else "predicted"


def _figures(found: Findings) -> list[dict[str, Any]]:
    figures = []
    reached = _reached(found)
    dense = found.accuracies.get("dense")
    step, last = next(((s, a) for s, a in reversed([*found.accuracies.items()]) if a), ("", None))
    if dense and last:
        by = "the artifact's own runtime" if step == "after quantization" else "torch"
        how = f"top-1 on {last.images:,} validation images, by {by}, {step}"
        figures.append(_figure("accuracy", "%", (_value(100 * dense.accuracy), _value(100 * last.accuracy)), how, "measured"))
    if found.measurements:
        m = found.measurements["compressed"]
        threads = "1 thread" if m.threads == 1 else f"{m.threads} threads"
        how = f"median of {m.runs} runs in {len(m.process_medians_ms)} fresh processes, {threads}, 95% interval"
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
    figures.append(_figure("peak_memory", "bytes", (_value(dense_memory), _value(memory)), how, _basis(how)))
    spent = [m.figure("energy_mj") for m in (found.measurements.get("dense"), found.measurements.get("compressed")) if m]
    if len(spent) == 2 and spent[0] and spent[1]:
        before, after = ({"value": s.value, "low": s.low, "high": s.high} for s in spent if s)
        figures.append(_figure("energy", "mJ", (before, after), f"median of the trials with their range; {spent[1].how}", "measured"))
    elif found.cost.energy_mj and found.dense_cost.energy_mj:
        sides = asdict(found.dense_cost.energy_mj), asdict(found.cost.energy_mj)
        figures.append(_figure("energy", "mJ", sides, "estimate, not validated", "predicted"))
    return figures


def _layers(found: Findings) -> list[dict[str, Any]]:
    """Every kernel of the dense network in the order in which they run, and the same one of the compressed network; both predicted."""
    return [
        {
            "name": old.name,
            "kind": old.kind,
            "before_ms": old.latency_ms,
            "after_ms": new.latency_ms,
            "before_macs": old.macs,
            "after_macs": new.macs,
        }
        for old, new in zip(found.dense_cost.per_layer, found.cost.per_layer, strict=True)
    ]


def _sensors(found: Findings) -> list[dict[str, Any]]:
    """What the board's sensors said while each network was measured: power over the seconds of its trials, temperature by process."""
    traces = [
        {"network": name, "power_mw": list(m.energy.trace) if m.energy else [], "temperatures_c": list(m.temperatures_c)}
        for name, m in found.measurements.items()
    ]
    return [trace for trace in traces if trace["power_mw"] or trace["temperatures_c"]]


def _artifact(artifact: Artifact) -> dict[str, Any]:
    """What the report says of a file: where it is, that it is this very one, and how far it is from what torch computes."""
    names = ("format", "sha256", "size_bytes", "parity_max_abs", "parity_relative")
    return {"path": artifact.path.name, **{name: getattr(artifact, name) for name in names}, "bits": dict(artifact.bits)}


def _figure(name: str, unit: str, sides: tuple[Mapping[str, Any], Mapping[str, Any]], how: str, basis: str) -> dict[str, Any]:
    """`sides`: the dense network's value and the compressed one's."""
    return {"name": name, "unit": unit, "before": sides[0], "after": sides[1], "how": how, "basis": basis}


def _value(value: float) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None}


def _interval(m: Measurement) -> dict[str, Any]:
    return {"value": m.latency_ms, "low": m.low_ms, "high": m.high_ms}
