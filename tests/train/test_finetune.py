import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.data import Split, load_data
from edgeprune.errors import DataError, GateError
from edgeprune.graph.cut import silent_constants
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train import Epoch, Recipe
from edgeprune.train.evaluate import evaluate
from edgeprune.train.finetune import chosen_epoch, finetune
from edgeprune.train.reconstruct import reconstruct
from tests.colours import SIDE, colour_data, colour_net, images, same
from tests.networks import build

RECIPE = Recipe(epochs=3, lr=0.05, batch_size=16, flip=True, crop_padding=1, precision="fp32")  # the same on every machine


class Killed(Exception):
    """Stands for a crash in the middle of an epoch."""


def killed_after(steps: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done > steps:
            raise Killed

    return progress


def train(
    model: nn.Module, split: Split, recipe: Recipe = RECIPE, *, dense: nn.Module | None = None, seed: int = 0
) -> tuple[dict[str, Tensor], tuple[Epoch, ...]]:
    trained, curve = finetune(model, dense, split, None, recipe, seed=seed)
    return trained.state_dict(), curve


def test_training_learns_and_leaves_its_inputs_alone() -> None:
    data, model, dense = colour_data(), colour_net(), colour_net()
    before = copy.deepcopy(model.state_dict())
    trained, curve = finetune(model, dense, data.train, data.val, RECIPE)
    assert same(model.state_dict(), before)
    assert same(dense.state_dict(), before)
    assert not trained.training
    assert [e.epoch for e in curve] == [1, 2, 3]
    last = evaluate(trained, data.val)
    assert curve[-1].val_accuracy == last.accuracy
    assert curve[-1].val_loss == pytest.approx(last.loss, rel=1e-5)
    labels_alone, _ = finetune(model, None, data.train, None, RECIPE)
    assert evaluate(labels_alone, data.val).accuracy == 1 > evaluate(model, data.val).accuracy


def test_a_branch_that_gives_nothing_stays_silent() -> None:
    data, model = colour_data(), build("residual", dtype=torch.float32)
    graph = trace(model, torch.zeros(1, 3, SIDE, SIDE))
    plan = Plan(dict.fromkeys(graph.branches, ()))
    small = reconstruct(slim(model, graph, plan), model, graph, plan, data.train)
    silent = silent_constants(small)
    trained, _ = finetune(small, None, data.train, None, RECIPE)
    assert silent and silent_constants(trained) == silent
    loud = slim(model, graph, plan)
    after, before = finetune(loud, None, data.train, None, RECIPE)[0].state_dict(), loud.state_dict()
    assert any(not torch.equal(after[name], before[name]) for name in silent), "a constant that is one is trained"


def test_a_seed_gives_the_same_weights_twice() -> None:
    data, model = colour_data(), colour_net(dropout=0.3)
    first, curve = train(model, data.train, seed=4)
    torch.rand(5)  # what else was drawn does not matter
    second, again = train(model, data.train, seed=4)
    other, _ = train(model, data.train, seed=5)
    assert same(first, second)
    assert [e.train_loss for e in curve] == [e.train_loss for e in again]
    assert not same(first, other)


@pytest.mark.parametrize("steps", [0, 7, 12, 17])
def test_resume_after_a_crash(tmp_path: Path, steps: int) -> None:
    """6 steps an epoch: before the first checkpoint, in the second epoch, right after it, in the third."""
    data, model, dense = colour_data(), colour_net(dropout=0.3), colour_net()
    whole, curve = finetune(model, dense, data.train, data.val, RECIPE, seed=2)
    with pytest.raises(Killed):
        finetune(model, dense, data.train, data.val, RECIPE, seed=2, checkpoints=tmp_path, key="k", progress=killed_after(steps))
    done = len(list(tmp_path.glob("epoch-*")))
    assert done == (steps >= 6)
    starts: list[int] = []
    resumed, again = finetune(
        model, dense, data.train, data.val, RECIPE, seed=2, checkpoints=tmp_path, key="k", progress=lambda w, d, t: starts.append(d)
    )
    assert starts[0] == 6 * (steps // 6) + 1
    assert same(resumed.state_dict(), whole.state_dict())
    assert [e.train_loss for e in again] == [e.train_loss for e in curve]


def test_one_checkpoint_is_kept_and_it_counts_for_its_key_only(tmp_path: Path) -> None:
    data, model = colour_data(), colour_net()
    finetune(model, None, data.train, None, RECIPE, checkpoints=tmp_path, key="k")
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-0003.safetensors"]
    steps: list[int] = []
    finetune(model, None, data.train, None, RECIPE, checkpoints=tmp_path, key="k", progress=lambda w, d, t: steps.append(d))
    assert steps == []
    finetune(model, None, data.train, None, RECIPE, checkpoints=tmp_path, key="other", progress=lambda w, d, t: steps.append(d))
    assert steps == list(range(1, 19))


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    data, model = colour_data(), colour_net()
    whole, _ = finetune(model, None, data.train, None, RECIPE, checkpoints=tmp_path, key="k")
    file = tmp_path / "epoch-0003.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    again, curve = finetune(model, None, data.train, None, RECIPE, checkpoints=tmp_path, key="k")
    assert same(again.state_dict(), whole.state_dict())
    assert len(curve) == 3


def test_distillation_needs_no_labels() -> None:
    data, dense = colour_data(labelled=False), colour_net()
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.head.weight.mul_(0.1)

    def gap(net: nn.Module) -> float:
        x, _ = next(iter(data.val.batches(30)))
        with torch.no_grad():
            return float((net(x).softmax(1) - dense(x).softmax(1)).abs().mean())

    trained, curve = finetune(model, dense, data.train, data.val, Recipe(epochs=4, lr=0.02, batch_size=16, flip=False, crop_padding=0))
    assert gap(trained) < 0.5 * gap(model)
    assert all(e.val_accuracy is None and e.val_loss is None for e in curve)
    with pytest.raises(DataError, match="needs labels"):
        finetune(model, None, data.train, None, RECIPE)


def test_the_loss_is_the_documented_mix() -> None:
    """A step so small that the weights stay: the loss reported is that of the start, by the formula."""
    data, dense = colour_data(train=16), colour_net()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    recipe = Recipe(epochs=1, lr=1e-30, batch_size=16, flip=False, crop_padding=0, temperature=3.0, distill_weight=0.6)
    x, y = next(iter(data.train.batches(16)))
    with torch.no_grad():
        student, teacher = model(x).double(), dense(x).double()
    hard = -student.log_softmax(1)[torch.arange(16), y].mean()
    p, q = (teacher / 3).softmax(1), (student / 3).log_softmax(1)
    soft = (p * (p.log() - q)).sum(1).mean()
    _, (epoch,) = finetune(model, dense, data.train, None, recipe)
    assert epoch.train_loss == pytest.approx(float(0.4 * hard + 0.6 * 9 * soft), rel=1e-4)


def test_the_rate_warms_up_and_falls_to_zero_as_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain = torch.optim.SGD.step

    def step(self: torch.optim.SGD) -> None:
        rates.append(self.param_groups[0]["lr"])
        plain(self)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    recipe = Recipe(epochs=2, lr=0.4, batch_size=8, warmup_share=0.25, flip=False, crop_padding=0)
    train(colour_net(), colour_data(train=64).train, recipe)
    warm = [0.1, 0.2, 0.3, 0.4]
    cosine = [0.2 * (1 + math.cos(math.pi * k / 12)) for k in range(1, 13)]
    assert rates == pytest.approx([*warm[:2], *warm, *cosine], abs=1e-12)  # the dry run, then the training


@pytest.mark.parametrize("count", [2, 5, 17])
def test_small_sets_and_a_last_batch_of_one(count: int) -> None:
    """Fewer images than a batch; 17 leaves one image alone, which batch norms cannot train on."""
    split = colour_data(train=30).train.subset(range(count))
    weights, curve = train(colour_net(), split)
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
    assert not same(weights, colour_net().state_dict())
    assert all(e.train_loss > 0 for e in curve)


def test_the_loss_is_a_mean_over_the_images_trained_on() -> None:
    """The image left alone does not count as a loss of zero."""
    split, model = colour_data(train=30).train, nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    recipe = Recipe(epochs=1, lr=1e-30, batch_size=16, flip=False, crop_padding=0)
    _, (whole,) = train(model, split.subset([0, 1] * 8), recipe)
    _, (with_one_left,) = train(model, split.subset([0, 1] * 8 + [0]), recipe)
    assert with_one_left.train_loss == pytest.approx(whole.train_loss, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images(count: int) -> None:
    with pytest.raises(DataError, match="at least two training images"):
        train(colour_net(), colour_data(train=30).train.subset(range(count)))


class Steep(nn.Module):
    """Gradients so large that one step of the largest rate leaves float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIDE * SIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 8, 8) -> (n, 3)."""
        return 1000 * self.linear(x.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("count", "what"), [(16, "values of linear"), (64, "loss became")])
def test_divergence_is_an_error(count: int, what: str, tmp_path: Path) -> None:
    """Seen in the loss, or after the very last step in the weights; no broken checkpoint is written."""
    split = colour_data(train=64).train.subset(range(count))
    recipe = Recipe(epochs=1, lr=1e38, batch_size=16, warmup_share=0.9, distill=False)
    with pytest.raises(GateError, match=rf"{what}.*diverged.*smaller --lr"):
        finetune(Steep(), None, split, None, recipe, checkpoints=tmp_path, key="k")
    assert not list(tmp_path.iterdir())


def test_no_epochs_is_a_copy() -> None:
    model = colour_net()
    trained, curve = finetune(model, None, colour_data().train, None, Recipe(epochs=0))
    assert curve == ()
    assert same(trained.state_dict(), model.state_dict())


class Viewing(nn.Module):
    """Flattens as only contiguous memory allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).view(x.size(0), -1))  # type: ignore[no-any-return]


def test_a_network_that_views_its_maps_is_trained_and_teaches() -> None:
    model = Viewing()
    trained, curve = finetune(model, model, colour_data(train=32).train, None, Recipe(epochs=1, batch_size=8))
    assert len(curve) == 1
    assert all(p.is_contiguous() for p in trained.parameters())
    assert not torch.equal(next(trained.parameters()), next(model.parameters()))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    train(colour_net(dropout=0.3), colour_data(train=32).train)
    assert torch.equal(torch.get_rng_state(), before)


def judged(*values: tuple[float, float]) -> tuple[Epoch, ...]:
    """Epochs of these validation accuracies and losses."""
    return tuple(Epoch(epoch=n, train_loss=1, val_loss=b, val_accuracy=a, lr=0.1, seconds=1) for n, (a, b) in enumerate(values, 1))


def test_the_best_epoch_by_held_out_images() -> None:
    curve = judged((0.5, 1.0), (0.9, 0.6), (0.9, 0.5), (0.9, 0.7))
    assert chosen_epoch(curve, RECIPE) == 3
    assert chosen_epoch(judged((0.9, 0.5), (0.9, 0.5)), RECIPE) == 2
    assert chosen_epoch(curve, replace(RECIPE, choose="last")) == 4
    blind = tuple(replace(e, val_accuracy=None, val_loss=None) for e in curve)
    assert chosen_epoch(blind, RECIPE) == 4


@pytest.mark.parametrize("choose", ["best", "last"])
def test_the_result_is_the_chosen_epoch(choose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that wrecks the network from the second epoch on: the best one is the first."""
    monkeypatch.setattr("edgeprune.train.finetune._rate", lambda recipe, step, total: 0.02 if step < 6 else 30.0)
    data = colour_data()
    trained, curve = finetune(colour_net(), None, data.train, data.val, replace(RECIPE, choose=choose))
    chosen = {"best": 1, "last": 3}[choose]
    assert [e.epoch for e in curve if e.chosen] == [chosen]
    assert evaluate(trained, data.val).accuracy == curve[chosen - 1].val_accuracy
    assert curve[0].val_accuracy != curve[2].val_accuracy


@pytest.mark.parametrize("changes", [{"ema_decay": 0.9}, {"optimizer": "adamw", "lr": 0.003}, {"norms": "frozen", "clip_norm": 0.5}])
def test_every_kind_of_training_resumes_exactly(changes: dict[str, Any], tmp_path: Path) -> None:
    data, model, dense, recipe = colour_data(), colour_net(dropout=0.3), colour_net(), replace(RECIPE, **changes)
    whole, _ = finetune(model, dense, data.train, data.val, recipe, seed=2)
    with pytest.raises(Killed):
        finetune(model, dense, data.train, data.val, recipe, seed=2, checkpoints=tmp_path, key="k", progress=killed_after(8))
    resumed, _ = finetune(model, dense, data.train, data.val, recipe, seed=2, checkpoints=tmp_path, key="k")
    assert same(resumed.state_dict(), whole.state_dict())
    assert not same(whole.state_dict(), model.state_dict())


def test_the_moving_average_is_the_result() -> None:
    """Against the average of the weights after every step, by hand."""
    data, recipe, decay = colour_data(train=48).train, replace(RECIPE, epochs=1, momentum=0.0, choose="last"), 0.5
    steps = [finetune(colour_net(), None, data, None, recipe)[0]]
    averaged, _ = finetune(colour_net(), None, data, None, replace(recipe, ema_decay=decay))
    seen: list[dict[str, Tensor]] = []
    plain = torch.optim.SGD.step

    def step(self: torch.optim.SGD) -> None:
        plain(self)
        seen.append({"head.bias": self.param_groups[0]["params"][-1].detach().clone()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        finetune(colour_net(), None, data, None, recipe)
    expected = colour_net().head.bias.detach().clone()
    for number, weights in enumerate(seen[2:]):  # after the dry run
        d = min(decay, (1 + number) / (10 + number))
        expected = d * expected + (1 - d) * weights["head.bias"]
    assert torch.allclose(averaged.state_dict()["head.bias"], expected, atol=1e-6)
    assert not torch.allclose(steps[0].state_dict()["head.bias"], expected, atol=1e-6)


def test_frozen_norms_keep_their_statistics() -> None:
    model = colour_net()
    weights, _ = train(model, colour_data().train, replace(RECIPE, norms="frozen"))
    assert torch.equal(weights["a_norm.running_mean"], model.state_dict()["a_norm.running_mean"])
    assert not torch.equal(weights["a_norm.weight"], model.state_dict()["a_norm.weight"])


def test_gradients_are_no_longer_than_asked() -> None:
    """Without momentum a step moves the weights by the rate times the length at most."""
    data, model = colour_data(train=16).train, colour_net()
    recipe = Recipe(epochs=1, lr=0.1, batch_size=16, momentum=0.0, weight_decay=0.0, clip_norm=1e-3, warmup_share=0.9, choose="last")
    weights, _ = train(model, data, recipe)
    before = dict(model.named_parameters())
    moved = math.sqrt(sum(float((weights[n] - p.detach()).square().sum()) for n, p in before.items()))
    assert moved == pytest.approx(1e-4, rel=1e-2)


def test_one_class_and_foreign_labels_are_errors() -> None:
    x, y = images(12)
    one = load_data(((x, y * 0), (x, y))).train
    with pytest.raises(DataError, match=r"all 12 training images .* have the label 0"):
        train(colour_net(), one)
    foreign = load_data(((x, y + 4), (x, y + 4))).train
    with pytest.raises(DataError, match=r"labels from 4 to 6 but the network has 3 outputs \(labels 0 to 2\)"):
        train(colour_net(), foreign)


def test_what_is_broken_from_the_start_is_known_at_once(tmp_path: Path) -> None:
    model = colour_net()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    steps: list[int] = []
    with pytest.raises(GateError, match="very first batch is nan, before any weight was changed"):
        finetune(model, None, colour_data().train, None, RECIPE, checkpoints=tmp_path, progress=lambda w, d, t: steps.append(d))
    assert steps == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("capability", "precision"), [("avx512_bf16", "bf16"), ("bf16", "bf16"), ("avx2", "fp32")])
def test_the_automatic_precision_is_bf16_where_the_processor_has_it(
    capability: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    data = colour_data()
    chosen, named = (finetune(colour_net(), None, data.train, None, replace(RECIPE, precision=p))[0] for p in ("auto", precision))
    assert same(chosen.state_dict(), named.state_dict())


def test_bf16_trains_and_leaves_float32() -> None:
    data = colour_data()
    trained, _ = finetune(colour_net(), None, data.train, None, replace(RECIPE, precision="bf16"))
    plain, _ = finetune(colour_net(), None, data.train, None, RECIPE)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert not same(trained.state_dict(), plain.state_dict())
    assert evaluate(trained, data.val).accuracy == 1
