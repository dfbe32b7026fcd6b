"""The user's own layers under a forward that torch.fx wrote down: what `slim` returns where the code holds numbers of channels.

Only the modules whose own forward holds such a number are opened, so that all others stay what they were (blocks, stages, dropout),
with the same names of parameters. Where the numbers stand, one run of the network and one of what torch.fx made of it show: both
dispatch the same operations, in the same order. Code that branches on sizes or values is not for torch.fx: exported.py takes it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from edgeprune.graph.channels import WrittenAxis
from edgeprune.graph.running import Observer, evaluating, first_line, operation_name, quiet_torch

Stays = NDArray[np.bool_]

_SPLITS = ("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
_FILLS = {**dict.fromkeys(("zeros", "ones", "full"), 0), **dict.fromkeys(("new_zeros", "new_ones", "new_full"), 1)}


class Unwritable(Exception):
    """Why torch.fx cannot write a forward down, on one line."""


class Symbolic(fx.GraphModule):
    """A forward written down, over the modules of the network it was made from; `meta["slimmed"]` says how it was slimmed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Symbolic:
        """As fx copies, without the deprecation that torch raises against itself."""
        with quiet_torch():
            twin = super().__deepcopy__(memo)
        assert isinstance(twin, Symbolic)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """As fx pickles, with what it leaves out."""
        return _unpickled, (*super().__reduce__(), dict(self.meta))


def _unpickled(make: Callable[..., fx.GraphModule], args: tuple[Any, ...], meta: dict[str, Any]) -> Symbolic:
    read = make(*args)
    network = Symbolic(read, read.graph)
    network.meta.update(meta)
    return network


def symbolic(model: nn.Module, opened: Collection[str]) -> Symbolic:
    """The network with the forwards of the named modules written down, sharing everything with `model`. Raises Unwritable."""
    written = Symbolic(model, _forward(model, opened))
    for name, module in written.named_modules():
        module.training = model.get_submodule(name).training
    return written


def forward_of(module: nn.Module) -> fx.Graph:
    """A module's own forward, which calls its children as they are. Raises Unwritable, also where it does something else in training."""
    with evaluating(module):
        written = _forward(module, ())
    if not _same_while_training(module, written, ()):
        raise Unwritable("its code does something else while it trains")
    return written


def _forward(model: nn.Module, opened: Collection[str]) -> fx.Graph:
    try:
        graph = _Writer({id(model.get_submodule(name)) for name in opened}).trace(model)
    except Exception as error:  # the user's forward may raise anything when it is given no tensors
        raise Unwritable(first_line(error)[:160]) from error
    for node in graph.nodes:
        if isinstance(node.type, str):  # a postponed annotation, with which fx could not pickle what it wrote
            node.type = None
    return graph


def _same_while_training(model: nn.Module, written: fx.Graph, opened: Collection[str]) -> bool:
    with evaluating(model):  # which gives every module its flag back
        for module in model.modules():
            module.training = True
        return str(_forward(model, opened)) == str(written)


class _Writer(fx.Tracer):
    """Steps into the opened modules alone; without any it is what fx reads a pickled forward back with."""

    def __init__(self, opened: Collection[int] = ()) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the module is called as it is."""
        return id(m) not in self._opened


def located(model: nn.Module, inputs: tuple[Any, ...], keys: Collection[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The modules to open and, for every dispatched operation of `keys` (labels.Place.key), the node that asks for it.

    Raises Unwritable where torch.fx cannot say, gives other operations than the network, or a forward does something else in training.
    """
    inside: list[str] = []
    opened = dict.fromkeys([""])
    own = _Dispatched(lambda key: opened.update(dict.fromkeys(inside)) if key in keys else None)
    hooks = [hook for name, module in model.named_modules() for hook in _hooks(module, name, inside)]
    try:
        with torch.no_grad(), evaluating(model), own:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    with evaluating(model):
        written = symbolic(model, opened)
    if not _same_while_training(model, written.graph, opened):
        raise Unwritable("its code does something else while it trains")
    nodes: dict[str, str] = {}
    run = Located(written)
    again = _Dispatched(lambda key: nodes.update({key: run.at.name}) if key in keys else None)
    try:
        with torch.no_grad(), evaluating(written), again:
            run.run(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise Unwritable(first_line(error)[:160]) from error
    if own.order != again.order:
        raise Unwritable("torch.fx gives other operations")
    return tuple(opened), nodes


def _hooks(module: nn.Module, name: str, inside: list[str]) -> tuple[Any, Any]:
    """`inside` lists the modules that are running, the innermost last."""
    return (
        module.register_forward_pre_hook(lambda *_: inside.append(name)),
        module.register_forward_hook(lambda *_: (inside.pop(), None)[1], always_call=True),
    )


class Located(fx.Interpreter):
    """Runs a graph and knows where it is."""

    def run_node(self, n: fx.Node) -> Any:
        """The node's result, as ever."""
        self.at = n
        return super().run_node(n)


class _Dispatched(Observer):
    """Calls `on(key)` for every operation, and keeps their order."""

    def __init__(self, on: Callable[[str], None]) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.order: list[str] = []
        self._on = on

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """The operation's result, as ever."""
        name = operation_name(func)
        self._on(f"{name} {self.seen[name]}")
        self.seen[name] += 1
        self.order.append(name)
        return func(*args, **(kwargs or {}))


def renumber(network: Symbolic, axes: Iterable[tuple[WrittenAxis, Stays]]) -> None:
    """Put other numbers into a forward, in place: which positions of each axis stay, (n,). Raises Unwritable where a node takes none."""
    nodes = {node.name: node for node in network.graph.nodes}
    for axis, stays in axes:
        node = nodes[axis.node]
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        numbers = [int(stays[:bound].sum()) for bound in axis.bounds]
        if name == "pad":
            _pad(node, axis.axis, numbers[0], int(stays.sum()) - numbers[1])
        elif node.target is operator.getitem:
            _cut(node, axis.axis, slice(*numbers))
        elif name == "narrow":
            node.args, node.kwargs = (node.args[0], axis.axis, numbers[0], numbers[1] - numbers[0]), {}
        elif name in _SPLITS:
            parts = np.diff(numbers).tolist()
            node.op, node.target, node.args, node.kwargs = "call_function", torch.split, (node.args[0], parts, axis.axis), {}
        elif name in _FILLS:
            _fill(node, _FILLS[name], axis.axis, int(stays.sum()))
        else:
            raise Unwritable(f"{name or node.op} takes no other number of channels")
    network.recompile()


def _pad(node: fx.Node, axis: int, front: int, back: int) -> None:
    asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
    at = 2 * (-axis - 1)
    if not isinstance(asked, (list, tuple)) or len(asked) < at + 2:
        raise Unwritable("its padding is computed")
    amounts = [*asked[:at], front, back, *asked[at + 2 :]]
    node.args, node.kwargs = (node.args[0], amounts, *node.args[2:]), {k: v for k, v in node.kwargs.items() if k != "pad"}


def _cut(node: fx.Node, axis: int, to: slice) -> None:
    asked = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if len(asked) <= axis or not all(isinstance(part, slice) for part in asked[: axis + 1]):
        raise Unwritable("its cut is computed")
    node.update_arg(1, (*asked[:axis], to, *asked[axis + 1 :]))


def _fill(node: fx.Node, first: int, axis: int, size: int) -> None:
    """Sizes come as one list or as one argument each."""
    sizes = node.args[first] if len(node.args) > first else node.kwargs.get("size")
    if isinstance(sizes, (list, tuple)):
        sizes = [*sizes[:axis], size, *sizes[axis + 1 :]]
        if len(node.args) > first:
            node.update_arg(first, sizes)
        else:
            node.update_kwarg("size", sizes)
    elif len(node.args) > first + axis:
        node.update_arg(first + axis, size)
    else:
        raise Unwritable("its sizes are computed")
