"""Pruning in rounds: score, allocate, slim and recover, several times, each with a part of the cuts.

The limits go down geometrically from the dense network's figures to the budget, so that every round removes the same share of what
is left. A round is a pipeline of its own on the network the one before it left; the dense network stays the teacher of all. What all
rounds removed together is one plan of the dense network, so that files, report and `load` are the same as after a single round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeprune.choice import Choice
from edgeprune.device.cost import predict_graph
from edgeprune.device.measure import MEASURED
from edgeprune.errors import SlimError
from edgeprune.graph.slim import named_tensors, slim
from edgeprune.origin import Origin
from edgeprune.pipeline import Pipeline
from edgeprune.plan import Budget, Plan
from edgeprune.run import write_json
from edgeprune.train import Epoch
from edgeprune.train.evaluate import settled


def last_round(first: Pipeline) -> tuple[Pipeline, tuple[Epoch, ...]]:
    """The pipeline of the last round, with all rounds before it done, and the figures of their epochs; `first` itself where it is alone.

    The pipeline's stages are to be asked for inside its part of the run folder.
    """
    job, run = first.job, first.run
    if job.rounds == 1:
        return first, ()
    known = {"trace": first.graph, "score": first.scores()}  # of the dense network, before anything depends on the budget
    *earlier, final = schedule(first)
    origin, model, curve = Origin(job.model, first.graph, Plan({})), job.model, list[Epoch]()
    rules = replace(job.rules, max_remove=1 - (1 - job.rules.max_remove) ** (1 / job.rounds))
    for number, budget in enumerate(earlier, 1):
        turn = replace(job, model=model, budget=budget, origin=origin, rules=rules)
        stages = Pipeline(turn, run, first.progress, part=f"round-{number}", given=known if number == 1 else None)
        with run.inside(stages.part):
            choice = stages.choose(stages.scores())
            small = settled(slim(model, stages.graph, choice.plan))
            stages.proof(small, choice.plan)
            model, more = stages.trained(stages.recovered(small, choice.plan), choice.plan)
        origin = replace(origin, plan=origin.then(stages.graph, choice.plan))
        curve += after(curve, more)
    turn = replace(job, model=model, budget=final, origin=origin, rules=rules)
    return Pipeline(turn, run, first.progress, part=f"round-{job.rounds}"), tuple(curve)


def after(curve: Sequence[Epoch], more: Sequence[Epoch]) -> tuple[Epoch, ...]:
    """Epochs of a later round, counted on from those before it."""
    return tuple(replace(e, epoch=e.epoch + len(curve)) for e in more)


def overall(first: Pipeline, stages: Pipeline, choice: Choice) -> Choice:
    """The choice of the last round as a choice for the dense network: one plan of what all rounds removed together."""
    origin = stages.job.origin
    if origin is None:
        return choice

    def compute() -> Plan:
        plan = origin.then(stages.graph, choice.plan)
        shapes = [
            {name: tuple(t.shape) for name, t in named_tensors(slim(*cut))}
            for cut in ((origin.model, origin.graph, plan), (stages.job.model, stages.graph, choice.plan))
        ]
        if shapes[0] != shapes[1]:
            raise SlimError("what several rounds removed cannot be removed from this network at once: prune it in one round (--rounds 1).")
        return plan

    def write(plan: Plan) -> dict[str, Any]:
        write_json(first.run.path("plan.json"), plan.to_json() | {"sha256": plan.sha256})
        return {"files": ["plan.json"]}

    def read(_: Mapping[str, Any]) -> Plan:
        return Plan.from_json(json.loads(first.run.path("plan.json").read_text()))

    return replace(choice, plan=first.run.cached("compose", {}, compute, write=write, read=read))


def schedule(first: Pipeline) -> tuple[Budget, ...]:
    """The budget of every round, in absolute figures; a limit that the dense network meets is the same in all of them.

    A stage, because on a board that is attached the dense network's latency is measured, a little different every time.
    """
    job = first.job

    def compute() -> tuple[Budget, ...]:
        dense = _dense_figures(first)
        limits = job.budget.absolute(dense)
        shares = {name: min(1.0, limit / dense[name]) if dense[name] else 1.0 for name, limit in limits.items()}
        return tuple(
            Budget(**{name: limit * shares[name] ** (number / job.rounds - 1) for name, limit in limits.items()})
            for number in range(1, job.rounds + 1)
        )

    def write(budgets: tuple[Budget, ...]) -> dict[str, Any]:
        return {"budgets": [budget.limits() for budget in budgets]}

    def read(facts: Mapping[str, Any]) -> tuple[Budget, ...]:
        return tuple(Budget(**limits) for limits in facts["budgets"])

    inputs = {"budget": job.budget.limits(), "rounds": job.rounds, "device": job.device.card.model_dump(mode="json")}
    return first.run.cached("schedule", inputs, compute, write=write, read=read)


def _dense_figures(first: Pipeline) -> dict[str, float]:
    job, cost = first.job, predict_graph(first.graph, None, first.job.device)
    figures = {
        "macs": cost.macs,
        "params": cost.params,
        "size_bytes": cost.size_bytes,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "latency_ms": cost.latency_ms.high,
        "energy_mj": cost.energy_mj.high if cost.energy_mj else 0.0,
    }
    if job.device.attached and (asked := job.budget.limits().keys() & MEASURED):
        found = first.measured("dense", job.model, quick=True, energy="energy_mj" in asked)
        figures |= {name: figure.high for name in asked if (figure := found.figure(name))}
    return figures
