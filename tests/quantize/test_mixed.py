from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgeprune.quantize import mixed
from edgeprune.quantize.bits import BitPlan
from edgeprune.quantize.calibrate import Ranges, observe
from edgeprune.quantize.elsewhere import Elsewhere
from edgeprune.quantize.mixed import REPAIRED, SLOWER, _Problem, mixed_plan
from edgeprune.quantize.network import Network
from edgeprune.quantize.qdq import observed_tensors, write_qdq
from tests.quantize.onnx_nets import batches, proto


def random_problem(seed: int) -> _Problem:
    random = np.random.default_rng(seed)
    units = tuple("abcdef")
    names = ("", *units)
    edges = {(a, b): float(random.uniform(0, 4e4)) for a, b in itertools.combinations(names, 2) if random.random() < 0.4}
    return _Problem(
        units,
        {u: float(random.uniform(1e4, 1e5)) for u in units},
        {u: float(random.uniform(1e4, 1e5)) for u in units},
        {u: float(random.uniform(0, 1)) for u in units},
        edges,
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_fastest_choice_is_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed)
    every = [set(s) for n in range(7) for s in itertools.combinations(problem.units, n)]
    best = min(map(problem.milliseconds, every))
    assert problem.milliseconds(problem.solved(0.0)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_looser_budget_costs_less_accuracy_and_is_kept(seed: int) -> None:
    problem = random_problem(seed)
    fastest = problem.milliseconds(problem.solved(0.0))
    losses = []
    for factor in (1.0, 1.1, 1.3, 5.0):
        found = problem.solved(fastest * factor)
        assert problem.milliseconds(found) <= fastest * factor + 1e-9
        losses.append(sum(problem.loss[u] for u in found))
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0


def write(plan: BitPlan) -> object:
    found = Ranges(observed_tensors(Network(proto())))
    observe(proto(), batches(), found)
    return write_qdq(proto(), plan, found.found())


def test_a_plan_for_a_network_is_measured() -> None:
    found = mixed_plan(proto(), write, batches)  # type: ignore[arg-type]
    assert set(found.plan.layers.values()) <= {"int8"} and set(found.plan.layers) <= set(Network(proto()).layers)
    assert found.facts["over_faster_end"] <= REPAIRED < SLOWER
    assert "timed on this machine" in found.facts["basis"]
    assert found.facts["int8_layers"] == len(found.plan.layers)


def test_repair_ends_at_the_faster_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([1.5, *[2.0] * 20])  # int8 is slower than fp32, and every mix is slower still
    monkeypatch.setattr(mixed, "time_ratio", lambda *_: next(calls))
    monkeypatch.setattr(_Problem, "solved", lambda self, _: {"stem", "b", "point"})
    found = mixed_plan(proto(), write, batches)  # type: ignore[arg-type]
    assert found.plan == BitPlan({}) and found.facts["repairs"] == 2
    assert found.facts["faster_end"] == "fp32" and found.facts["over_faster_end"] == 1.0


def test_another_device_has_its_own_proportions() -> None:
    problem = random_problem(0)
    there = problem.moved({u: 3 * problem.float_ns[u] / 1e6 for u in "abc"})
    assert there.milliseconds(set()) == pytest.approx(3 * problem.milliseconds(set()))
    assert there.byte_ns == pytest.approx({u: 3 * ns for u, ns in problem.byte_ns.items()})
    assert problem.moved({}).milliseconds({"a"}) == pytest.approx(problem.milliseconds({"a"}))


def test_a_board_that_is_not_attached_gets_a_prediction_and_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "time_ratio", None)
    layers = dict.fromkeys(Network(proto()).layers, 5.0)
    found = mixed_plan(proto(), write, batches, elsewhere=Elsewhere("rpi4-ort", layers))  # type: ignore[arg-type]
    assert found.facts["over_faster_end"] <= 1.01 and found.facts["repairs"] == 0
    assert "an assumption for rpi4-ort, not measured" in found.facts["basis"]
    assert found.facts["predicted_ms"]["fp32"] >= 5.0 * len(layers)


def test_a_board_that_is_attached_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "time_ratio", None)
    calls = iter([0.5, *[2.0] * 20])  # int8 is faster there, every mix slower than it
    monkeypatch.setattr(_Problem, "solved", lambda self, _: {"stem", "b", "point"})
    found = mixed_plan(proto(), write, batches, elsewhere=Elsewhere("rpi4-ort", {}, lambda *_: next(calls)))  # type: ignore[arg-type]
    assert set(found.plan.layers) == set(Network(proto()).layers) and found.facts["repairs"] > 0


@pytest.mark.parametrize("share", [0.8, 0.35])
def test_float_layers_are_stored_smaller_until_the_file_fits(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "_FILE_BYTES", 0)
    monkeypatch.setattr(mixed, "time_ratio", lambda *_: 2.0)
    size = proto().ByteSize()
    found = mixed_plan(proto(), write, batches, size_bytes=share * size)  # type: ignore[arg-type]
    stored = set(found.plan.layers.values())
    assert stored == {"fp16"} if share > 0.5 else "int4" in stored
    if share > 0.5:
        assert write(found.plan).ByteSize() <= share * size  # type: ignore[attr-defined]
