from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeprune.allocate.judge import PULL, Judge, divergence, judge_of
from edgeprune.criteria.probe import Probe
from edgeprune.errors import DataError, UsageError
from edgeprune.graph.slim import slim
from edgeprune.plan import Plan
from edgeprune.train.evaluate import refit_norms
from edgeprune.train.reconstruct import Recording
from tests.networks import NETWORKS, images, traced


def judge(name: str, *, n: int = 16, labels: bool = True, **options: Any) -> Judge:
    model, graph = traced(name)
    y = (torch.arange(n) % 5,) if labels else ()
    given: dict[str, Any] = {"images": 8, "recalibration_images": 8, "loss": "divergence", "steps": 0, "recover": "bn", **options}
    inputs = images(name, n)
    return judge_of(Probe(model, graph, [(inputs if len(inputs) > 1 else inputs[0], *y)]), **given)


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_and_surgery_lose_the_same(name: str) -> None:
    """Also after batch norms were recalibrated."""
    by_surgery, by_mask = judge(name), judge(name, masked=True)
    for keep in (0.4, 0.8):
        plan = Plan.uniform(by_surgery.graph, keep)
        assert by_surgery(plan).loss == pytest.approx(by_mask(plan).loss, rel=1e-6, abs=1e-9)


def test_masks_and_surgery_train_alike() -> None:
    """What is zero on both sides stays zero."""
    plan = Plan.uniform(traced("residual")[1], 0.5)
    losses = [judge("residual", steps=3, masked=masked)(plan).loss for masked in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(judge("residual")(plan).loss, rel=1e-3)


@pytest.mark.parametrize("loss", ["divergence", "cross_entropy"])
def test_the_loss_is_that_of_the_recalibrated_network_on_the_held_images(loss: str) -> None:
    by = judge("residual", loss=loss)
    (x,), y = by.held
    plan = Plan.uniform(by.graph, 0.5)
    small = slim(by.model, by.graph, plan)
    refit_norms(small, [by.spare[0]])
    with torch.no_grad():
        logits, answers = small(x), by.model(x)
    chances = F.softmax(answers, 1)
    expected = {
        "divergence": float((chances * (chances.log() - F.log_softmax(logits, 1))).sum(1).mean()),
        "cross_entropy": float(F.cross_entropy(logits, y)),
    }
    verdict = by(plan)
    assert verdict.loss == pytest.approx(expected[loss], rel=1e-9)
    assert verdict.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))


def test_candidates_are_refitted_as_the_product_does() -> None:
    """With its ridge and its number of positions it is the same network."""
    by = judge("residual", n=64, images=16, recalibration_images=48, recover="reconstruct")
    plan = Plan.uniform(by.graph, 0.5)
    small = slim(by.model, by.graph, plan)
    fitted = Recording.of(by.model, by.graph, by.spare[0], rows=by.rows, substitutes=True).refitted(
        small, plan, ridges=(PULL / by.rows,), rectify_rounds=1
    )
    with torch.no_grad():
        expected = divergence([by.model(*by.held[0])], [fitted(*by.held[0])])
    assert by(plan).loss == pytest.approx(expected, rel=1e-9)
    recalibrated, bare = (judge("residual", n=64, images=16, recalibration_images=48, recover=how)(plan).loss for how in ("bn", "none"))
    assert by(plan).loss < min(recalibrated, bare) and recalibrated != bare


def test_training_follows_the_refit() -> None:
    plan = Plan.uniform(traced("residual")[1], 0.5)
    assert judge("residual", recover="reconstruct", steps=2)(plan).loss != judge("residual", recover="reconstruct")(plan).loss


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_is_refitted(name: str) -> None:
    by = judge(name, n=40, images=8, recalibration_images=32, recover="reconstruct")
    plan = Plan.uniform(by.graph, 0.6)
    assert by(plan) == by(plan) and by(plan).loss > 0


def test_the_same_plan_has_the_same_verdict_and_nothing_is_left_behind() -> None:
    model, graph = traced("mobile")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    threads = torch.get_num_threads()
    plans = [Plan.uniform(graph, keep) for keep in (0.3, 0.7)]
    for masked in (False, True):
        by = judge("mobile", masked=masked)
        assert [by(p) for p in plans] == [by(p) for p in (plans[1], plans[0])][::-1]
    assert torch.get_num_threads() == threads
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_outputs_that_are_no_logits_are_compared_by_their_variance() -> None:
    answers = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    assert divergence([answers], [answers]) == 0
    assert divergence([answers], [answers.mean(dim=0).expand_as(answers)]) == pytest.approx(1)


def test_what_cannot_judge_is_refused() -> None:
    model, graph = traced("residual")
    x = images("residual", 8)[0]
    for probe in (None, Probe(model, graph)):
        with pytest.raises(UsageError, match="give model and data"):
            judge_of(probe, images=4, recalibration_images=4, loss="divergence", steps=0, recover="bn")
    with pytest.raises(UsageError, match="one of divergence, cross_entropy, got 'mse'"):
        judge("residual", loss="mse")
    with pytest.raises(UsageError, match="one of reconstruct, bn, none, got 'knit'"):
        judge("residual", recover="knit")
    with pytest.raises(UsageError, match="masked networks are not reconstructed"):
        judge("residual", recover="reconstruct", masked=True)
    with pytest.raises(UsageError, match="at least one image must judge"):
        judge("residual", images=0)
    with pytest.raises(DataError, match="need labels"):
        judge("residual", labels=False, loss="cross_entropy")
    with pytest.raises(DataError, match="2 images are too few"):
        judge("residual", n=2)
    with pytest.raises(DataError, match="the loss of the dense network is inf: check the preprocessing"):
        judge_of(Probe(model, graph, [(x * math.nan, None)]), images=4, recalibration_images=4, loss="divergence", steps=0, recover="bn")
    with pytest.raises(DataError, match="empty"):
        judge_of(Probe(model, graph, []), images=4, recalibration_images=4, loss="divergence", steps=0, recover="bn")


def test_few_images_are_shared_out() -> None:
    by = judge("residual", n=9, images=100, recalibration_images=100)
    assert (len(by.held[1]), len(by.spare[1])) == (6, 3)
    assert torch.equal(torch.cat([by.held[0][0], by.spare[0][0]]), images("residual", 9)[0])


class Fussy(nn.Module):
    """Views its maps as only contiguous memory allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.conv(x)
        return self.fc(x.view(len(x), -1))


def test_networks_that_need_contiguous_memory_are_judged_too() -> None:
    from edgeprune.graph.trace import trace

    model = Fussy().eval()
    x = torch.randn(12, 3, 8, 8)
    graph = trace(model, x[:1])
    by = judge_of(
        Probe(model, graph, [(x, torch.arange(12) % 5)]), images=8, recalibration_images=4, loss="divergence", steps=1, recover="bn"
    )
    whole = Plan.uniform(graph, 1.0)
    assert replace(by, steps=0)(whole).loss == pytest.approx(0, abs=1e-6)
    assert by(whole).loss > 0
