"""The first of two convs, fitted to what comes out behind the second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.train import pairs
from edgeprune.train.pairs import Conv, pairs_of, step
from edgeprune.train.reconstruct import Recording
from edgeprune.train.targets import could_go, targets_of

PLAIN = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(outputs: int, inputs: int, seed: int) -> Conv:
    return Conv(noise(outputs, inputs, 1, 1, seed=seed), noise(outputs, seed=seed + 1), PLAIN)


def test_the_step_solves_the_damped_least_squares_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six unknowns, more iterations than that: the change is the exact one, of a problem written out row by row."""
    monkeypatch.setattr(pairs, "STEPS", (1.0,))
    first, second = conv(3, 1, seed=1), conv(4, 3, seed=5)
    read, beside = noise(20, 1, 3, 3, seed=8), noise(20, 4, 3, 3, seed=9)
    aim = first.moved(conv(3, 1, seed=11), 0.1)
    wanted = second(aim(read).clamp(min=0)) + beside + 0.01 * noise(20, 4, 3, 3, seed=10)
    found = step(first, second, read, wanted, beside, rectified=False)
    fitted = [i for i in range(20) if i % 4 != 3]
    x = read[fitted].movedim(1, -1).reshape(-1).double().numpy()
    hidden = first(read[fitted]).movedim(1, -1).reshape(-1, 3).double().numpy()
    lacking = (wanted - beside)[fitted].movedim(1, -1).reshape(-1, 4).double().numpy()
    w, b = second.weight[:, :, 0, 0].double().numpy(), second.shift.double().numpy()
    lacking = lacking - np.maximum(hidden, 0) @ w.T - b
    by_channel = w[None] * (hidden > 0)[:, None]  # (rows, outputs, channels)
    matrix = np.concatenate([by_channel * x[:, None, None], by_channel], axis=2).reshape(-1, 6)
    down = matrix.T @ lacking.reshape(-1)
    damping = pairs.DAMPING * float(np.sum((matrix @ down) ** 2)) / float(down @ down)
    change = np.linalg.solve(matrix.T @ matrix + damping * np.eye(6), down)
    assert found is not None
    np.testing.assert_allclose(found.weight.flatten().numpy(), first.weight.flatten().numpy() + change[:3], atol=2e-4)
    np.testing.assert_allclose(found.shift.numpy(), first.shift.numpy() + change[3:], atol=2e-4)


def test_a_step_that_does_not_help_images_aside_is_not_taken() -> None:
    first, second, read = conv(3, 4, seed=1), conv(4, 3, seed=5), noise(16, 4, 3, 3)
    present = second(first(read).clamp(min=0))
    aside = (torch.arange(16) % 4 == 3)[:, None, None, None]
    assert step(first, second, read, torch.where(aside, present, present + noise(16, 4, 3, 3, seed=2)), None, rectified=False) is None
    assert step(first, second, read, present + 0.5, None, rectified=False) is not None


def test_what_a_relu_hides_is_no_error() -> None:
    first, second, read = conv(3, 4, seed=1), conv(4, 3, seed=5), noise(16, 4, 3, 3)
    present = second(first(read).clamp(min=0))
    hidden = torch.where(present < 0, 5 * present, present)
    assert step(first, second, read, hidden, None, rectified=True) is None
    assert step(first, second, read, hidden, None, rectified=False) is not None


class Blocks(nn.Module):
    """Three residual blocks; `extra` reads what the first conv of the first block makes, too."""

    def __init__(self, *, extra: bool = False, norms: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extra = extra
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.ins = nn.ModuleList(nn.Conv2d(8, 12, 3, padding=1, bias=not norms) for _ in range(3))
        self.outs = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1, bias=not norms) for _ in range(3))
        self.norms = nn.ModuleList((nn.BatchNorm2d(n) if norms else nn.Identity()) for _ in range(3) for n in (12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        more: Tensor | float = 0.0
        for i in range(3):
            inner = torch.relu(self.norms[2 * i](self.ins[i](x)))
            if self.extra and i == 0:
                more = inner.mean((1, 2, 3))[:, None]
            x = torch.relu(x + self.norms[2 * i + 1](self.outs[i](inner)))
        return self.head(x.mean((2, 3))) + more  # type: ignore[no-any-return]


def test_pairs_are_convs_that_one_other_conv_reads() -> None:
    for network, wanted in ((Blocks(), ["ins.0", "ins.1", "ins.2"]), (Blocks(extra=True), ["ins.1", "ins.2"])):
        graph = trace(network.eval(), torch.zeros(1, 3, 8, 8))
        found = pairs_of(graph, targets_of(graph, could_go(graph), 16), 64)
        assert [pair.first.weight for pair in found.values()] == [f"{name}.weight" for name in wanted]
        assert {pair.end.kind for pair in found.values()} == {"add"}
        assert {pair.images for pair in found.values()} == {64}


def test_few_images_make_no_pairs() -> None:
    graph = trace(Blocks().eval(), torch.zeros(1, 3, 8, 8))
    targets = targets_of(graph, could_go(graph), 16)
    assert pairs_of(graph, targets, 15) == {}


@pytest.mark.parametrize("norms", [True, False])
def test_a_network_comes_closer_to_the_dense_one_on_new_images(norms: bool) -> None:
    model = Blocks(norms=norms).eval()
    for norm in (m for m in model.norms if isinstance(m, nn.BatchNorm2d)):
        norm.load_state_dict(norm.state_dict() | {"running_mean": 0.1 * torch.rand(norm.num_features)})
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    plan = Plan({g.name: tuple(range(8)) for g in graph.groups if g.channels == 12})
    small, images, new = slim(model, graph, plan), (noise(256, 3, 8, 8, seed=3),), noise(64, 3, 8, 8, seed=4)
    gaps = []
    for in_pairs in (False, True):
        recording = Recording.of(model, graph, images, plan=plan, in_pairs=in_pairs)
        assert len(recording.ends) == (3 if in_pairs else 0)
        fitted = recording.refitted(small, plan)
        with torch.no_grad():
            gaps.append(float((fitted(new) - model(new)).square().mean()))
    assert gaps[1] < 0.95 * gaps[0]
