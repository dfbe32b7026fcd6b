"""The stages of compress, each read back from the run folder when nothing it depends on has changed.

Order: dense accuracy, scores, plan (choice.py: with a board attached it is measured and corrected), slim and its proof, recovery
without training, fine-tuning, artifacts (quantized if asked), measurement. Several rounds: rounds.py. Figures come out as plain facts;
result.py words them for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from safetensors.numpy import load_file, save
from torch import Tensor, nn

from edgeprune.allocate import options_of
from edgeprune.choice import Choice, Chooser
from edgeprune.criteria import score
from edgeprune.data import Augment, Data, Split, image_facts
from edgeprune.device.calibrate import FORMATS
from edgeprune.device.card import Device
from edgeprune.device.cost import Cost, predict_graph
from edgeprune.device.energy import QUICK_TRIALS, TRIALS
from edgeprune.device.measure import FULL, LONG, QUICK, Measurement, measure
from edgeprune.device.session import energy_of, need_sensor
from edgeprune.errors import DataError
from edgeprune.export import Artifact, export, load_artifact
from edgeprune.export.verify import ARTIFACTS, PARITY_SAMPLES, SAMPLES, keep_samples, write_list
from edgeprune.graph import ChannelGraph, portable
from edgeprune.graph.cut import offered
from edgeprune.graph.slim import Proof, fingerprint, prove
from edgeprune.graph.trace import trace
from edgeprune.origin import Origin
from edgeprune.plan import Budget, Plan, Scores
from edgeprune.quantize import quantizer_for
from edgeprune.quantize.elsewhere import elsewhere
from edgeprune.run import Run, write_atomic, write_json
from edgeprune.train import Epoch, Progress, Recipe
from edgeprune.train.augment import augment_of
from edgeprune.train.distill import features_to_learn
from edgeprune.train.evaluate import Accuracy, accuracy_of, batch_norms, evaluate, recalibrate, settled
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct
from edgeprune.widths import WidthRules

T = TypeVar("T")
Write = Callable[[T], Mapping[str, Any]]


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
    rounds: int = 1
    origin: Origin | None = None
    search: Mapping[str, Any] = field(default_factory=dict)  # options of the allocator


class Pipeline:
    """One run of one job in one folder, or in a `part` of it (a round); every method is a stage."""

    def __init__(self, job: Job, run: Run, progress: Progress, *, part: str = "", given: Mapping[str, Any] | None = None) -> None:
        """`given`: values of stages that another run has, by the stage's name; they are recorded here without being computed again."""
        self.part = part
        self.job = job
        self.run = run
        self.progress = progress
        self._given = given or {}

    def _cached(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], T], write: Write[T], read: Callable[[Any], T]) -> T:
        given: Callable[[], T] = lambda: self._given[name]  # noqa: E731
        return self.run.cached(name, inputs, given if name in self._given else compute, write=write, read=read)

    @cached_property
    def graph(self) -> ChannelGraph:
        """The dense network's channels."""
        job = self.job
        inputs = {"model": fingerprint(job.model), "input": [list(t.shape) for t in job.example_inputs if isinstance(t, Tensor)]}

        def compute() -> ChannelGraph:
            graph = trace(job.model, job.example_inputs)
            return offered(job.model, graph) if job.rules.min_channels == 0 else graph

        def facts(graph: ChannelGraph) -> dict[str, Any]:
            return {"groups": len(graph.groups), "macs": graph.macs, "params": graph.params, "frozen": len(graph.frozen)}

        return self._cached("trace", inputs, compute, facts, lambda _: self._given.get("trace") or compute())

    @cached_property
    def train_split(self) -> Split | None:
        """The training images without those held out to judge epochs by."""
        return self._splits[0]

    @cached_property
    def held_split(self) -> Split | None:
        """A tenth of the training images, at most 2,000, never trained on."""
        return self._splits[1]

    @cached_property
    def _splits(self) -> tuple[Split | None, Split | None]:
        data = self.job.data
        if data is None or not len(data.train):
            return None, None
        return data.train.hold_out_tenth(self.job.seed)

    @property
    def augment(self) -> Augment:
        """Scoring and refitting see images as training does: a network knows its training images, as they are, too well."""
        return augment_of(self.job.recipe, self.job.data.preprocessing.size if self.job.data else (0, 0))

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
        return self._cached(f"accuracy {stage}", inputs, compute, asdict, lambda facts: Accuracy(**facts))

    def scores(self) -> Scores:
        """Importance of every channel."""
        job, graph = self.job, self.graph
        file = "checkpoints/scores.safetensors"

        def compute() -> Scores:
            total = min(job.calibration_images, len(self.train_split)) if self.train_split else 0

            def images() -> Any:
                if self.train_split:
                    done, size = 0, self.train_split.at_once(64)
                    for batch in self.train_split.batches(size, shuffle_seed=job.seed, limit=job.calibration_images, augment=self.augment):
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

        seen = {"images": job.calibration_images, "augment": asdict(self.augment), "data": job.data and job.data.fingerprint}
        inputs = {"criterion": job.criterion, "seed": job.seed, **seen}
        return self._cached("score", inputs, compute, write, read)

    def choose(self, scores: Scores) -> Choice:
        """The plan that meets the budget; with a board attached, by its measurements."""
        self._check_sensor((self.job.budget,))

        def write(choice: Choice) -> dict[str, Any]:
            write_json(self.run.path("plan.json"), choice.plan.to_json() | {"sha256": choice.plan.sha256})
            return choice.facts() | {"files": ["plan.json"]}

        def read(facts: Mapping[str, Any]) -> Choice:
            return Choice.of(facts, json.loads(self.run.path("plan.json").read_text()))

        return self._cached(
            "allocate", self._limits((self.job.budget,)), lambda: Chooser(self, scores).choose(self.job.budget), write, read
        )

    def choose_all(self, scores: Scores, budgets: Sequence[Budget]) -> tuple[Choice, ...]:
        """One plan per budget, from one search."""
        file = "checkpoints/plans.json"
        self._check_sensor(budgets)

        def write(choices: tuple[Choice, ...]) -> dict[str, Any]:
            write_json(self.run.path(file), [choice.plan.to_json() for choice in choices])
            return {"choices": [choice.facts() for choice in choices], "files": [file]}

        def read(facts: Mapping[str, Any]) -> tuple[Choice, ...]:
            plans = json.loads(self.run.path(file).read_text())
            return tuple(Choice.of(f, plan) for f, plan in zip(facts["choices"], plans, strict=True))

        return self._cached("allocate", self._limits(budgets), lambda: Chooser(self, scores).choose_all(budgets), write, read)

    def _check_sensor(self, budgets: Sequence[Budget]) -> None:
        if self.job.device.attached and any(budget.energy_mj is not None for budget in budgets):
            need_sensor(self.job.device)

    def _limits(self, budgets: Sequence[Budget]) -> dict[str, Any]:
        """What a choice depends on; how many processes share the work makes no difference."""
        job = self.job
        return {
            "budget": [budget.limits() for budget in budgets],
            "quantize": [job.quantize for budget in budgets if budget.size_bytes is not None],  # how large a plan's file becomes
            "allocator": job.allocator,
            **({"recover": job.recover} if "recover" in options_of(job.allocator) else {}),  # candidates are recovered like the network
            "search": {name: value for name, value in job.search.items() if name not in ("jobs", "cluster")},
            "rules": job.rules.to_json(),
            "device": [job.device.profile, job.device.host, job.device.card.model_dump(mode="json")],
        }

    @property
    def judged(self) -> str:
        """The format that is measured: what the profile's runtime runs where that is exported, else the first."""
        device, formats = self.job.device, self.job.formats
        runs = FORMATS.get(device.constants.runtime) if device.predicts else None
        return runs if runs in formats else formats[0]

    def measured(self, name: str, model: nn.Module, *, quick: bool, energy: bool = False) -> Measurement:
        """Figures of a network's artifact on the attached device (a throw-away file), in the format that is judged in the end."""
        # how fast int8 runs does not depend on its ranges: few images do; a mixed plan is chosen for the finished network only
        way = "int8" if self.job.quantize == "int8" and name != "dense" else "none"
        quantizer = quantizer_for(way, self.job.data, images=8)
        target = self.run.path(f"checkpoints/{name}")
        artifact = export(model, self.job.example_inputs, target, format=self.judged, quantizer=quantizer)
        return self._measured_file(artifact, quick=quick, energy=energy)

    def _measured_file(self, artifact: Artifact, *, quick: bool, energy: bool) -> Measurement:
        device = self.job.device
        found = measure(artifact.path, device, **(QUICK if quick else FULL))
        return replace(found, energy=energy_of(artifact.path, device, trials=QUICK_TRIALS if quick else TRIALS)) if energy else found

    def proof(self, small: nn.Module, plan: Plan) -> Proof:
        """The slim network computes what the masked dense one computes, or nothing goes on."""
        job = self.job

        def compute() -> Proof:
            sample = job.data.val.first(1) if job.data else job.example_inputs
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
            return reconstruct(small, job.model, self.graph, plan, train, augment=self.augment, progress=self.progress)

        return self._stored("reconstruct", {"augment": asdict(self.augment)}, small, refit)

    def trained(self, small: nn.Module, plan: Plan) -> tuple[nn.Module, tuple[Epoch, ...]]:
        """Fine-tuned, with the figures of every epoch; the teacher is the dense network, also in later rounds."""
        job, recipe, train, file = self.job, self.job.recipe, self.train_split, "checkpoints/finetune.safetensors"
        if not recipe.epochs:
            return small, ()
        if train is None:
            raise DataError("fine-tuning needs training images: give --data with training images, or --epochs 0.")
        origin = job.origin or Origin(job.model, self.graph, Plan({}))
        dense = origin.model

        def compute() -> tuple[nn.Module, tuple[Epoch, ...]]:
            start = [fingerprint(small), fingerprint(dense), job.data and job.data.fingerprint, recipe.to_json(), job.seed]
            return finetune(
                small,
                dense if recipe.distill else None,
                train,
                self.held_split,
                recipe,
                seed=job.seed,
                features=features_to_learn(origin.graph, origin.then(self.graph, plan)),
                checkpoints=self.run.path("checkpoints/epochs"),
                key=hashlib.sha256(json.dumps(start).encode()).hexdigest(),
                progress=self.progress,
            )

        def write(found: tuple[nn.Module, tuple[Epoch, ...]]) -> dict[str, Any]:
            portable.save(found[0], self.run.path(file))
            return {"files": [file], "curve": [asdict(e) for e in found[1]]}

        def read(facts: Mapping[str, Any]) -> tuple[nn.Module, tuple[Epoch, ...]]:
            return settled(portable.load(self.run.path(file), model=small)), tuple(Epoch(**e) for e in facts["curve"])

        inputs = {"recipe": recipe.to_json(), "seed": job.seed}
        return self.run.cached("finetune", inputs, compute, write=write, read=read, together=True)

    def _stored(self, stage: str, inputs: dict[str, Any], small: nn.Module, compute: Callable[[], nn.Module]) -> nn.Module:
        """A stage whose value is a network of the shape of `small`."""
        file = f"checkpoints/{stage}.safetensors"

        def write(model: nn.Module) -> dict[str, Any]:
            portable.save(model, self.run.path(file))
            return {"files": [file]}

        return self.run.cached(stage, inputs, compute, write=write, read=lambda _: settled(portable.load(self.run.path(file), model=small)))

    def exported(self, model: nn.Module, plan: Plan) -> tuple[Artifact, ...]:
        """model.safetensors and one artifact per format, each checked against the network on real images."""
        job = self.job
        metadata = {"plan_sha256": plan.sha256, **image_facts(job.data)}

        def compute() -> tuple[Artifact, ...]:
            portable.save(model, self.run.path("model.safetensors"), plan=plan)
            batch = job.data.val.first(PARITY_SAMPLES) if job.data else None
            artifacts = []
            limits: dict[str, Any] = {"latency_ms": job.budget.latency_ms, "size_bytes": job.budget.size_bytes}
            other = elsewhere(job.device, model, job.example_inputs) if job.quantize == "mixed" else None
            quantizer = quantizer_for(job.quantize, job.data, threads=job.device.threads, elsewhere=other, seed=job.seed, **limits)
            for number, name in enumerate(job.formats):
                self.progress("exporting", number, len(job.formats))
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
            energy = self.job.budget.energy_mj is not None
            dense = self.measured("dense", self.job.model, quick=False, energy=energy)
            self.progress("measuring", 1, 2)
            small = self._measured_file(artifact, quick=False, energy=energy)
            asked = self.job.budget.latency_ms
            if asked is not None and small.high_ms > asked:
                # On a machine whose speed changes three processes say little: longer, and that is what counts.
                small = replace(measure(artifact.path, self.job.device, **LONG), energy=small.energy)
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
        return dense, predict_graph(self.graph, choice.plan.widths(self.graph), device, correction=choice.correction)
