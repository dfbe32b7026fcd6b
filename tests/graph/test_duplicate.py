from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.graph.duplicate import duplicate
from tests.networks import NETWORKS, build, images, outputs


def shape_of(value: Any, seen: dict[int, int]) -> Any:
    """Types, values and sharing of everything below an object: equal for an object and a faithful copy of it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if isinstance(value, Tensor):
        return (type(value), tuple(value.stride()), value.requires_grad, value.tolist())
    if isinstance(value, dict):
        return (type(value), [(k, shape_of(v, seen)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value), [shape_of(v, seen) for v in value])
    return (
        (type(value), shape_of(vars(value), seen))
        if hasattr(value, "__dict__") and not callable(value)
        else (type(value), module(value, seen))
    )


def module(value: Any, seen: dict[int, int]) -> Any:
    return shape_of(vars(value), seen) if isinstance(value, nn.Module) else None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_duplicate_is_what_deepcopy_makes(name: str) -> None:
    model = build(name)
    made = duplicate(model)
    assert shape_of(made, {}) == shape_of(copy.deepcopy(model), {})
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, images(name)), outputs(made, images(name)), strict=True))
    ours = {id(v) for m in model.modules() for v in (m, *vars(m).values()) if isinstance(v, (nn.Module, dict, list, set))}
    assert not ours & {id(v) for m in made.modules() for v in (m, *vars(m).values())}, "nothing that can change is shared"


class Counting(nn.Module):
    """Copies in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(2, 2)
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        twin = Counting()
        memo[id(self)] = twin
        twin.inside, twin.copies = copy.deepcopy(self.inside, memo), self.copies + 1
        return twin


class Odd(nn.Module):
    """Attributes of many kinds, shared and circular ones among them."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Counting()
        self.list: list[Any] = [1, [2]]
        self.same = self.list
        self.table = OrderedDict(a={"b": torch.ones(2)})
        self.named = {"me": (self,), 3: {4}}
        self.__dict__["parent"] = self
        self.again = self.own.inside
        self.hook = self.register_forward_hook(_doubled)


def _doubled(layer: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    return 2 * out


def test_shared_circular_and_odd_attributes_are_copied_like_deepcopy_does() -> None:
    model = Odd()
    made: Any = duplicate(model)
    assert made.own.copies == 1 and made.again is made.own.inside and made.again is not model.again
    assert made.same is made.list and made.list == [1, [2]] and made.list[1] is not model.list[1]
    assert made.named["me"][0] is made and made.parent is made
    assert made.table["a"]["b"] is not model.table["a"]["b"] and type(made.table) is OrderedDict
    assert list(made._forward_hooks.values()) == [_doubled]


def test_what_is_given_instead_is_used_wherever_the_tensor_is() -> None:
    model = build("twice")
    body: Any = model.body
    thin = nn.Parameter(torch.zeros(3))
    made: Any = duplicate(model, {id(body.left.weight): thin})
    assert made.body.left.weight is thin and made.body.right.weight is thin
    assert body.left.weight is not thin


def test_deep_networks_need_no_deep_recursion() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(300):
        model = nn.Sequential(model)
    assert len(list(duplicate(model).modules())) == 301
    with pytest.raises(RecursionError):
        copy.deepcopy(model)
