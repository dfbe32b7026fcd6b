from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.errors import SlimError
from edgeprune.graph.exported import Exported, Unexportable, exported, is_exported, opened
from edgeprune.graph.portable import load, save
from edgeprune.graph.running import quiet_torch
from edgeprune.graph.slim import mask, prove, slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import random_plan, settle


class LeNet(nn.Module):
    """Flattens to a number written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), nn.Conv2d(6, 16, 3)
        self.drop, self.fc, self.out = nn.Dropout(0.5), nn.Linear(400, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.relu(self.norm(self.a(x))), 2)
        h = torch.relu(self.b(F.pad(h, (0, 1, 0, 1)))).view(-1, 400)
        return self.out(self.drop(torch.relu(self.fc(h))))  # type: ignore[no-any-return]


class Scales(nn.Module):
    """Res2Net's idea: parts of a literal width run one after the other, each added to the next."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.convs = width, nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = torch.split(x, self.width, 1)
        out, last = [], parts[0]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = torch.relu(norm(conv(last if i == 0 else last + parts[i])))
            out.append(last)
        return torch.cat([*out, parts[2]], 1)


class Nested(nn.Module):
    """Numbers in every place a forward can have them; the outputs are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.scales = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), Scales(4)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 1)
        self.deep, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        h = self.scales(torch.relu(self.norm(self.stem(x)))) + torch.zeros(1, 12, 1, 1, dtype=x.dtype)
        left, right = h.split([8, 4], 1)
        s = self.left(left) + self.right(right) + self.left(h[:, :8]) + self.right(h[:, -4:])
        s = s + s.new_full((x.shape[0], 8, 8, 8), 0.5)
        s = s.reshape(x.size(0), 8, 64).view(-1, 8, 8, 8)
        s = torch.relu(self.mix(self.deep(s))) * scale
        return {"logits": self.fc(s.view(x.size(0), 6, 64).mean(2)), "maps": [x.sum((2, 3))]}


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.a(x)) + self.b(y)
        return self.fc(h.view(len(x), 8, 64).mean(2)), self.fc(h.amax((2, 3)))


class Branches(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.amax() < 1e9 else self.out(x)


class FixedBatch(LeNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x[i : i + 1] for i in range(len(x))]))


SHAPES: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "lenet": (LeNet, ((3, 16, 16),)),
    "nested": (Nested, ((3, 8, 8),)),
    "two inputs": (TwoInputs, ((3, 8, 8), (3, 8, 8))),
}


def inputs(name: str, n: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, *shape, generator=noise, dtype=torch.float64).to(dtype) for shape in SHAPES[name][1])


def network(name: str, seed: int = 0, kind: type[nn.Module] | None = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (kind or SHAPES[name][0])().double()
        settle(model, *inputs(name, 16))
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.1
    return model


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def thin(name: str, seed: int = 0) -> tuple[Any, Any, Any, Plan]:
    model = network(name)
    graph = trace(model, inputs(name))
    plan = random_plan(graph, seed)
    return model, graph, slim(model, graph, plan), plan


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_networks_with_numbers_in_their_code_are_slimmed_exactly(name: str, seed: int) -> None:
    model, graph, small, plan = thin(name, seed)
    assert isinstance(small, Exported) and graph.exported is not None
    assert set(graph.frozen.values()) == {"output of the network"}
    assert prove(model, graph, plan, small, inputs(name)).max_relative_error < 1e-10
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    twin = mask(model, graph, plan)
    for n in (1, 3, 5):
        got, expected = small(*inputs(name, n, 7)), twin(*inputs(name, n, 7))
        assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-10) for a, b in zip(leaves(got), leaves(expected), strict=True))


def test_the_wrong_channels_are_refused() -> None:
    """The negative control: the same widths, other channels."""
    model = network("nested")
    graph = trace(model, inputs("nested"))
    first = Plan({g.name: tuple(range(g.channels - 1)) for g in graph.groups})
    last = Plan({g.name: tuple(range(1, g.channels)) for g in graph.groups})
    with pytest.raises(SlimError, match="differ by"):
        prove(model, graph, first, slim(model, graph, last), inputs("nested"))


def test_keyword_and_positional_inputs_are_those_of_the_dense_network() -> None:
    _, _, small, _ = thin("lenet")
    x = inputs("lenet", 3)[0]
    assert same(small(x=x), small(x))


@pytest.mark.parametrize("name", ["lenet", "nested"])
def test_training_changes_weights_and_statistics_and_only_training_drops_out(name: str) -> None:
    _, _, small, _ = thin(name)
    x, state = inputs(name, 8, 3), copy.deepcopy(small.state_dict())
    before = small(*x)
    assert same(before, small(*x)), "eval mode draws nothing"
    small.train()
    drawn = small(*x)
    assert same(drawn, small(*x)) == (name != "lenet"), "only the network with a dropout draws"
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    sum(t.square().sum() for t in leaves(drawn)).backward()  # type: ignore[union-attr]  # a sum of tensors
    optimizer.step()
    changed = {key for key, value in small.state_dict().items() if not torch.equal(value, state[key])}
    assert changed >= {"norm.running_mean", "norm.running_var", "norm.weight", *(k for k in state if k.endswith("weight"))}
    statistics = small.norm.running_mean.clone()
    small.eval()
    small(*x)
    assert torch.equal(small.norm.running_mean, statistics)
    assert not same(small(*x), before)


def test_statistics_of_a_cumulative_average_move_too() -> None:
    model = network("lenet")
    model.norm.momentum = None
    graph = trace(model, inputs("lenet"))
    small: Any = slim(model, graph, Plan.uniform(graph, 0.5)).train()
    before = small.norm.running_mean.clone()
    small(*inputs("lenet", 8))
    assert not torch.equal(small.norm.running_mean, before)


def test_a_copy_is_the_same_network_and_so_is_one_slimmed_without_the_memory_of_tracing() -> None:
    model, graph, small, plan = thin("nested")
    x = inputs("nested", 3)
    assert same(copy.deepcopy(small)(*x), small(*x))
    forgotten = copy.copy(graph)
    assert same(slim(model, forgotten, plan)(*x), small(*x))


def test_slim_networks_are_slimmed_again_and_load_like_pruned_once(tmp_path: Path) -> None:
    model, graph, small, _ = thin("nested", 1)
    again = trace(small, inputs("nested"))
    plan = random_plan(again, 2)
    smaller = slim(small, again, plan)
    assert prove(small, again, plan, smaller, inputs("nested")).max_relative_error < 1e-10
    assert trace(smaller, inputs("nested")).macs < again.macs < graph.macs
    save(smaller, tmp_path / "twice.safetensors", plan=plan)
    back = load(tmp_path / "twice.safetensors", model=network("nested", 5))
    assert same(back(*inputs("nested", 3)), smaller(*inputs("nested", 3)))
    assert same(load(tmp_path / "twice.safetensors", model=smaller)(*inputs("nested", 3)), smaller(*inputs("nested", 3)))
    assert same(model(*inputs("nested")), network("nested")(*inputs("nested"))), "the dense network is as it was"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branches, "cannot be exported (its code branches on data)"),
        (FixedBatch, "cannot be exported (its code fixes the size of the batch)"),
    ],
)
def test_what_cannot_be_exported_keeps_the_channels_with_numbers(
    kind: type[nn.Module], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = network("lenet", kind=kind)
    graph = trace(model, inputs("lenet"))
    assert [g.name for g in graph.groups] == ["a", "fc"][-len(graph.groups) :] and graph.exported is None
    assert reason in graph.frozen["b.weight[0]"]
    plan = random_plan(graph, 0)
    assert prove(model, graph, plan, slim(model, graph, plan), inputs("lenet")).max_relative_error < 1e-10
    with pytest.raises(Unexportable):
        exported(model, inputs("lenet", 1))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("decomposed", [False, True])
def test_programs_of_one_batch_size_are_opened_for_any(batch: int, decomposed: bool) -> None:
    model = network("lenet")
    program = torch.export.export(model, inputs("lenet", batch))
    with quiet_torch():
        network_ = opened(program.run_decompositions() if decomposed else program)
    assert is_exported(network_) and not network_.training
    for n in (1, 2, 7):
        assert torch.allclose(network_(*inputs("lenet", n, 2)), model(*inputs("lenet", n, 2)), rtol=1e-12)
    graph = trace(network_, inputs("lenet"))
    assert {g.name: g.channels for g in graph.groups} == {"a": 6, "b": 16, "fc": 20}
    plan = random_plan(graph, 0)
    small = slim(network_, graph, plan).train()
    assert prove(network_, graph, plan, small, inputs("lenet")).max_relative_error < 1e-10
    state = copy.deepcopy(small.state_dict())
    small(*inputs("lenet", 8))
    assert not torch.equal(small.state_dict()["norm.running_var"], state["norm.running_var"])


def test_a_program_as_torch_gives_it_is_slimmed_to_one_that_trains() -> None:
    module = torch.export.export(network("lenet"), inputs("lenet", 1)).module()
    graph = trace(module, inputs("lenet", 1))
    small = slim(module, graph, Plan.uniform(graph, 0.5))
    assert isinstance(small, Exported) and not small.training
    assert small.train()(*inputs("lenet", 4)).shape == (4, 4)
