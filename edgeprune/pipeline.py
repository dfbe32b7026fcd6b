"""The stages of compress, each read back from the run folder when nothing it depends on has changed.

Order: dense accuracy, scores, plan (with a board attached: export, measure, correct, allocate again), slim and its proof, BN
recalibration, fine-tuning, artifact, measurement. Figures come out as plain facts; result.py words them for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save
from torch import Tensor, nn

from edgeprune.allocate import allocate
from edgeprune.criteria import score
from edgeprune.data import Data, Split
from edgeprune.device.card import Device
from edgeprune.device.cost import Cost, CostModel, predict_graph
from edgeprune.device.measure import FULL, QUICK, Measurement, measure
from edgeprune.errors import BudgetError, DataError
from edgeprune.export import Artifact, export, load_artifact
from edgeprune.export.verify import ARTIFACTS, SAMPLES, keep_samples, write_list
from edgeprune.graph import ChannelGraph, portable
from edgeprune.graph.slim import Proof, fingerprint, prove, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.quantize import quantizer_for
from edgeprune.run import Run, write_atomic, write_json
from edgeprune.train import Epoch, Progress, Recipe
from edgeprune.train.evaluate import Accuracy, accuracy_of, batch_norms, evaluate, recalibrate, settled
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct
from edgeprune.widths import WidthRules

ROUNDS = 5
HEADROOM = 0.97  # of the asked latency: what a measurement a few minutes later must still meet
CLOSE_ENOUGH = 0.93  # of the asked latency: a plan that uses this much of it is not worth another round
PARITY_SAMPLES = 32


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """Everything that decides the result of one compress run."""

    name: str
    model: nn.Module
    example_inputs: tuple[Any, ...]
    budget: Budget
    device: Device
    data: Data | None
    criterion: str
    allocator: str
    recipe: Recipe
    recover: str
    rules: WidthRules
    formats: tuple[str, ...]
    seed: int
    calibration_images: int
    quantize: str = "none"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """One turn of the closed loop: what was predicted, what the board said, and the factor for the next prediction."""

    round: int
    predicted_ms: float
    measured_ms: float
    low_ms: float
    high_ms: float
    correction: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The plan, the correction it was predicted with, and how the loop came to it (empty without a board)."""

    plan: Plan
    correction: float
    rounds: tuple[Round, ...]


class Pipeline:
    """One run of one job in one folder; every method is a stage."""

    def __init__(self, job: Job, run: Run, progress: Progress) -> None:
        self.job = job
        self.run = run
        self.progress = progress

    @cached_property
    def graph(self) -> ChannelGraph:
        """The dense network's channels."""
        job = self.job
        inputs = {"model": fingerprint(job.model), "input": [list(t.shape) for t in job.example_inputs if isinstance(t, Tensor)]}

        def compute() -> ChannelGraph:
            return trace(job.model, job.example_inputs)

        def facts(graph: ChannelGraph) -> dict[str, Any]:
            return {"groups": len(graph.groups), "macs": graph.macs, "params": graph.params, "frozen": len(graph.frozen)}

        return self.run.cached("trace", inputs, compute, write=facts, read=lambda _: compute())

    @cached_property
    def train_split(self) -> Split | None:
        """The training images without those held out to judge epochs by."""
        return self._splits[0]

    @cached_property
    def held_split(self) -> Split | None:
        """At most 2,000 and a tenth of the training images, never trained on."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[Split | None, Split | None]:
        data = self.job.data
        if data is None or not len(data.train):
            return None, None
        held = min(2000, len(data.train) // 10)
        if held < 1:
            return data.train, None
        rest, aside = data.train.hold_out(held, self.job.seed)
        return rest, aside

    def accuracy(self, stage: str, model: nn.Module | Artifact) -> Accuracy | None:
        """Accuracy of a network, or of an artifact by its runtime, on all validation images; None without labelled data."""
        data = self.job.data
        if data is None or not data.val.labelled:
            return None

        def told(_: str, done: int, total: int) -> None:
            self.progress(f"accuracy, {stage}", done, total)

        def compute() -> Accuracy:
            if isinstance(model, Artifact):
                return accuracy_of(load_artifact(model.path), data.val, progress=told)
            return evaluate(model, data.val, progress=told)

        inputs = {"data": data.fingerprint}
        return self.run.cached(f"accuracy {stage}", inputs, compute, write=asdict, read=lambda facts: Accuracy(**facts))

    def scores(self) -> Scores:
        """Importance of every channel."""
        job, graph = self.job, self.graph
        file = "checkpoints/scores.safetensors"

        def compute() -> Scores:
            total = min(job.calibration_images, len(self.train_split)) if self.train_split else 0

            def images() -> Any:
                if self.train_split:
                    done = 0
                    for batch in self.train_split.batches(64, shuffle_seed=job.seed, limit=job.calibration_images):
                        yield batch
                        done += len(batch[0])
                        self.progress(f"scoring by {job.criterion}", done, total)

            return score(graph, job.model, job.criterion, data=images() if self.train_split else None)

        def write(scores: Scores) -> dict[str, Any]:
            write_atomic(self.run.path(file), save(dict(scores.values)))
            return {"criterion": scores.criterion, "additive": scores.additive, "files": [file], **scores.facts}

        def read(facts: Mapping[str, Any]) -> Scores:
            rest = {k: v for k, v in facts.items() if k not in ("criterion", "additive", "files")}
            return Scores(facts["criterion"], load_file(self.run.path(file)), rest, facts["additive"])

        data = job.data.fingerprint if job.data else None
        inputs = {"criterion": job.criterion, "images": job.calibration_images, "seed": job.seed, "data": data}
        return self.run.cached("score", inputs, compute, write=write, read=read)

    def choose(self, scores: Scores) -> Choice:
        """The plan that meets the budget; with a board attached, by its measurements."""
        job = self.job

        def compute() -> Choice:
            if job.device.attached and job.budget.latency_ms is not None:
                return self._closed_loop(scores, job.budget.latency_ms)
            return Choice(self._allocate(scores, 1.0), 1.0, ())

        def write(choice: Choice) -> dict[str, Any]:
            write_json(self.run.path("plan.json"), choice.plan.to_json() | {"sha256": choice.plan.sha256})
            return {"correction": choice.correction, "rounds": [asdict(r) for r in choice.rounds], "files": ["plan.json"]}

        def read(facts: Mapping[str, Any]) -> Choice:
            plan = Plan.from_json(json.loads(self.run.path("plan.json").read_text()))
            return Choice(plan, facts["correction"], tuple(Round(**r) for r in facts["rounds"]))

        inputs = {
            "budget": job.budget.limits(),
            "allocator": job.allocator,
            "rules": job.rules.to_json(),
            "device": [job.device.profile, job.device.card.model_dump(mode="json")],
        }
        return self.run.cached("allocate", inputs, compute, write=write, read=read)

    def _allocate(self, scores: Scores, correction: float) -> Plan:
        job = self.job
        cost = CostModel(job.device, correction)
        return allocate(self.graph, scores, job.budget, method=job.allocator, cost=cost, **job.rules.to_json())

    def _closed_loop(self, scores: Scores, asked_ms: float) -> Choice:
        """Export, measure, correct the prediction, allocate again, until the measured latency fits and the budget is used."""
        graph, device = self.graph, self.job.device
        dense = self.measured("dense", self.job.model, quick=True)
        correction = dense.latency_ms / predict_graph(graph, None, device).latency_ms.value / HEADROOM
        rounds: list[Round] = []
        best: tuple[float, Plan, float] | None = None
        floor: Plan | None = None
        for number in range(1, ROUNDS + 1):
            try:
                plan = self._allocate(scores, correction)
            except BudgetError as error:  # so says the prediction, perhaps corrected by one slow measurement
                if best is not None:
                    break
                if error.plan is None or error.plan == floor:
                    raise
                plan = floor = error.plan  # the board has the last word
            raw = predict_graph(graph, widths(graph, plan), device).latency_ms.value
            got = self.measured("candidate", slim(self.job.model, graph, plan), quick=True)
            rounds.append(Round(number, raw * correction * HEADROOM, got.latency_ms, got.low_ms, got.high_ms, correction * HEADROOM))
            self.progress("measuring candidates", number, ROUNDS)
            self.run.log(f"round {number}: predicted {raw * correction * HEADROOM:.3f} ms, measured {got.latency_ms:.3f} ms")
            if got.high_ms <= asked_ms and (best is None or got.high_ms > best[0]):
                best = (got.high_ms, plan, got.latency_ms / raw)
            whole = all(len(keep) == g.channels for g, keep in zip(graph.groups, plan.keep.values(), strict=True))
            if best and (best[0] >= CLOSE_ENOUGH * asked_ms or whole):
                break
            correction = got.high_ms / raw / HEADROOM
        if best is None:
            fastest = min(rounds, key=lambda r: r.high_ms)
            raise BudgetError(
                f"no plan was measured at {asked_ms:g} ms or less on {device.profile} in {ROUNDS} rounds: the fastest took "
                f"{fastest.measured_ms:.3f} ms (up to {fastest.high_ms:.3f} ms). The machine may be busy; try again, or ask for "
                f"--latency-ms {fastest.high_ms * 1.05:.3g}."
            )
        return Choice(best[1], best[2], tuple(rounds))

    def measured(self, name: str, model: nn.Module, *, quick: bool) -> Measurement:
        """Latency of a network's ONNX artifact on the attached device (a throw-away file)."""
        # how fast int8 runs does not depend on its ranges: few images do; a mixed plan is chosen for the finished network only
        way = "int8" if self.job.quantize == "int8" and name != "dense" else "none"
        quantizer = quantizer_for(way, self.job.data, images=8)
        artifact = export(model, self.job.example_inputs, self.run.path(f"checkpoints/{name}.onnx"), quantizer=quantizer)
        return measure(artifact.path, self.job.device, **(QUICK if quick else FULL))

    def proof(self, small: nn.Module, plan: Plan) -> Proof:
        """The slim network computes what the masked dense one computes, or nothing goes on."""
        job = self.job

        def compute() -> Proof:
            sample = next(iter(job.data.val.batches(1, limit=1)))[0] if job.data else job.example_inputs
            return prove(job.model, self.graph, plan, small, sample)

        return self.run.cached("prove", {}, compute, write=asdict, read=lambda facts: Proof(**facts))

    def recovered(self, small: nn.Module, plan: Plan) -> nn.Module:
        """What can be had back without training: batch norm statistics, or all layers refitted to the dense network."""
        job, train = self.job, self.train_split
        if train is None or job.recover == "none" or (job.recover == "bn" and not batch_norms(small)):
            return small
        if job.recover == "bn":
            return self._stored("recalibrate", {}, small, lambda: recalibrate(small, train))

        def refit() -> nn.Module:
            return reconstruct(small, job.model, self.graph, plan, train, progress=self.progress)

        return self._stored("reconstruct", {}, small, refit)

    def trained(self, small: nn.Module) -> tuple[nn.Module, tuple[Epoch, ...]]:
        """Fine-tuned, with the figures of every epoch."""
        job, train = self.job, self.train_split
        if not job.recipe.epochs:
            return small, ()
        if train is None:
            raise DataError("fine-tuning needs training images: give --data with training images, or --epochs 0.")
        curve: tuple[Epoch, ...] = ()

        def compute() -> nn.Module:
            nonlocal curve
            teacher = job.model if job.recipe.distill else None
            start = [fingerprint(small), fingerprint(job.model), job.data and job.data.fingerprint, job.recipe.to_json(), job.seed]
            key = hashlib.sha256(json.dumps(start).encode()).hexdigest()
            model, curve = finetune(
                small,
                teacher,
                train,
                self.held_split,
                job.recipe,
                seed=job.seed,
                checkpoints=self.run.path("checkpoints/epochs"),
                key=key,
                progress=self.progress,
            )
            return model

        inputs = {"recipe": job.recipe.to_json(), "seed": job.seed}
        extra: Callable[[], dict[str, Any]] = lambda: {"curve": [asdict(e) for e in curve]}  # noqa: E731  read after compute
        model = self._stored("finetune", inputs, small, compute, extra)
        facts = self.run.manifest["stages"]["finetune"]["facts"]
        return model, tuple(Epoch(**e) for e in facts["curve"])

    def _stored(
        self,
        stage: str,
        inputs: dict[str, Any],
        small: nn.Module,
        compute: Callable[[], nn.Module],
        extra: Callable[[], dict[str, Any]] = dict,
    ) -> nn.Module:
        """A stage whose value is a network of the shape of `small`."""
        file = f"checkpoints/{stage}.safetensors"

        def write(model: nn.Module) -> dict[str, Any]:
            portable.save(model, self.run.path(file))
            return {"files": [file], **extra()}

        return self.run.cached(stage, inputs, compute, write=write, read=lambda _: settled(portable.load(self.run.path(file), model=small)))

    def exported(self, model: nn.Module, plan: Plan) -> tuple[Artifact, ...]:
        """model.safetensors and one artifact per format, each checked against the network on real images."""
        job = self.job
        metadata: dict[str, Any] = {"plan_sha256": plan.sha256, "preprocessing": job.data.preprocessing.to_json() if job.data else None}
        if job.data and job.data.classes:
            metadata["labels"] = list(job.data.classes)

        def compute() -> tuple[Artifact, ...]:
            portable.save(model, self.run.path("model.safetensors"), plan=plan)
            batch = next(iter(job.data.val.batches(PARITY_SAMPLES, limit=PARITY_SAMPLES)))[0] if job.data else None
            artifacts = []
            quantizer = quantizer_for(job.quantize, job.data, threads=job.device.threads, latency_ms=job.budget.latency_ms, seed=job.seed)
            for number, name in enumerate(job.formats):
                self.progress(f"exporting {name}", number, len(job.formats))
                options: dict[str, Any] = {"samples": batch, "metadata": metadata, "quantizer": quantizer}
                artifacts.append(export(model, job.example_inputs, self.run.folder, format=name, **options))
                if quantizer is not None:
                    write_json(self.run.path("bitplan.json"), quantizer.chosen.to_json() | {"facts": quantizer.facts})
            keep_samples(self.run.folder, model, job.example_inputs if batch is None else batch)
            self.progress("exporting", len(job.formats), len(job.formats))
            return tuple(artifacts)

        def write(artifacts: tuple[Artifact, ...]) -> dict[str, Any]:
            table = write_list(self.run.folder, artifacts)
            return {"artifacts": table, "files": ["model.safetensors", ARTIFACTS, SAMPLES, *(a.path.name for a in artifacts)]}

        def read(facts: Mapping[str, Any]) -> tuple[Artifact, ...]:
            return tuple(Artifact.from_json(a | {"path": self.run.folder / a["path"]}) for a in facts["artifacts"])

        return self.run.cached(
            "export", {"formats": list(job.formats), "quantize": job.quantize, "metadata": metadata}, compute, write=write, read=read
        )

    def measurements(self, artifact: Artifact) -> dict[str, Measurement]:
        """Dense and compressed network on the attached device, full protocol; empty where nothing is attached."""
        if not self.job.device.attached:
            return {}

        def compute() -> dict[str, Measurement]:
            self.progress("measuring", 0, 2)
            dense = self.measured("dense", self.job.model, quick=False)
            self.progress("measuring", 1, 2)
            small = measure(artifact.path, self.job.device, **FULL)
            asked = self.job.budget.latency_ms
            if asked is not None and small.high_ms > asked:
                # A neighbour on the machine may have disturbed the minute: one more look, the calmer one counts.
                small = min(small, measure(artifact.path, self.job.device, **FULL), key=lambda m: m.high_ms)
            self.progress("measuring", 2, 2)
            return {"dense": dense, "compressed": small}

        def write(found: dict[str, Measurement]) -> dict[str, Any]:
            table = {name: m.to_json() for name, m in found.items()}
            write_json(self.run.path("measurements.json"), table)
            return {"measurements": table, "files": ["measurements.json"]}

        def read(facts: Mapping[str, Any]) -> dict[str, Measurement]:
            return {name: Measurement.from_json(m) for name, m in facts["measurements"].items()}

        return self.run.cached("measure", {}, compute, write=write, read=read)

    def costs(self, choice: Choice) -> tuple[Cost, Cost]:
        """Predicted cost of the dense and of the slim network on the device."""
        device = self.job.device
        dense = predict_graph(self.graph, None, device, correction=choice.correction)
        return dense, predict_graph(self.graph, widths(self.graph, choice.plan), device, correction=choice.correction)


def widths(graph: ChannelGraph, plan: Plan) -> NDArray[np.int64]:
    """The widths of a plan in the order of graph.groups, (groups,)."""
    return np.array([len(plan.keep.get(g.name, range(g.channels))) for g in graph.groups])
