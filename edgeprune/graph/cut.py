"""Branches leave the network's code: the module whose forward adds one to something is written down without it.

torch.fx writes that forward down (the smallest module that has the sum in it; all others stay what they were); the branch's operand of
the sum becomes the constant that its last bias and norm give for zeros, and what only the branch needed is not called any more. The
constant is computed from these tensors in every forward: they keep their names, are pruned like any others and, unless it is zero,
trained on, and it has the precision that the network is cast to. While training it is the same constant: a norm that saw zeros alone
would give its bias.
In a network of operations (exported.py) the same is done to its graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from edgeprune.errors import SlimError
from edgeprune.graph.branches import End
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.exported import Exported, aten, is_exported
from edgeprune.graph.symbolic import Symbolic, Unwritable, forward_of
from edgeprune.plan import Plan

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_", "__iadd__", aten.add.Tensor, aten.add_.Tensor)
_TORCH = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "rsqrt": torch.rsqrt, "reshape": torch.reshape}
_ATEN = {
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "rsqrt": aten.rsqrt.default,
    "reshape": aten.reshape.default,
}
_WHERE = "without"  # in the meta of a module that was written down: the ends of its branches, with names as the module has them


class _Site(NamedTuple):
    """The module (by its name) whose forward holds a sum, that forward, the sum, and the operand that comes from the branch."""

    owner: str
    graph: fx.Graph
    sum: fx.Node
    branch: fx.Node


def without_branches(model: nn.Module, ends: Iterable[End]) -> nn.Module:
    """`model` without the branches that end there, changed in place; another module where its own forward holds the sums.

    Raises SlimError where torch.fx cannot write a forward down.
    """
    for end in ends:
        try:
            site = _site(model, end)
        except Unwritable as problem:
            raise SlimError(
                f"the branch that ends in {end.weight} cannot leave the network's code: {problem}. Keep at least one channel of it: "
                f"--keep-dense {end.weight}, or --min-channels 1."
            ) from problem
        own = model.get_submodule(site.owner)
        local = _renamed(end, site.owner)
        _cut(site, local, _ATEN if is_exported(own) else _TORCH)
        made = Exported(own, site.graph) if isinstance(own, Exported) else Symbolic(own, site.graph)
        made.meta.update(getattr(own, "meta", {}))
        made.meta[_WHERE] = [*made.meta.get(_WHERE, ()), local]
        for name, module in made.named_modules():
            module.training = own.get_submodule(name).training
        if site.owner:
            model.set_submodule(site.owner, made)
        else:
            model = made
    return model


def offered(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """The graph without the branches that the network's code does not let go (`graph.stuck` has the reasons).

    Of a network that is slimmed as an exported graph all that tracing found.
    """
    if graph.exported is not None:
        return graph
    stuck: dict[str, str] = {}
    for name, branch in graph.branches.items():
        try:
            for end in branch.ends:
                _site(model, end)
        except Unwritable as problem:
            stuck[name] = str(problem)
    return replace(graph, stuck=stuck) if stuck else graph


def without_empty(small: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """A slim network without the branches of which the plan keeps no channel, as `without_branches`."""
    empty = [graph.branches[name] for name in plan.empty]
    if not empty:
        return small
    small = without_branches(small, [end for branch in empty for end in branch.ends])
    left = {name for name, _ in small.named_parameters()}
    if rest := {name for branch in empty for name in branch.tensors} & left:
        raise SlimError(
            f"{min(rest)} should go with its branch, but the network's code still uses it: keep one channel (--min-channels 1)."
        )
    return small


def lacking(model: nn.Module) -> list[End]:
    """The ends of all branches that were taken out of a network's own modules."""
    return [
        _renamed(End(*end), name, back=True)
        for name, module in model.named_modules()
        if isinstance(module, Symbolic)
        for end in module.meta.get(_WHERE, ())
    ]


def silent_constants(model: nn.Module) -> set[str]:
    """The tensors of those branches' constants that are zero: no artifact adds these, as long as training leaves them so."""
    tensors = dict(model.state_dict(keep_vars=True))
    found: set[str] = set()
    for name, module in model.named_modules():
        for end in module.meta.get(_WHERE, ()) if isinstance(module, fx.GraphModule) else ():
            there = _renamed(End(*end), name, back=True)
            if not any(bool(tensors[shift].any()) for shift in there.shifts):
                found.update(there.held)
    return found


def _renamed(end: End, owner: str, *, back: bool = False) -> End:
    """The end with names as its owner has them, or (back) as the network does."""
    prefix = f"{owner}." if owner else ""

    def name(full: str | None) -> str | None:
        return full if full is None else prefix + full if back else full.removeprefix(prefix)

    return end._replace(weight=name(end.weight) or "", bias=name(end.bias), norm=name(end.norm))


def _site(model: nn.Module, end: End) -> _Site:
    """Outwards from the layer: the first module whose forward adds what comes of the layer to something."""
    layer = end.weight.rpartition(".")[0]
    owner = layer
    while owner:
        owner = owner.rpartition(".")[0]
        module = model.get_submodule(owner)
        if type(module) is nn.Module:  # holds the modules of a forward that is written down further out
            continue
        graph = module.graph if isinstance(module, fx.GraphModule) else forward_of(module)
        local = _renamed(end, owner)
        found = _sum_behind(graph, local.weight)
        if isinstance(found, tuple):
            if any(not name.startswith(f"{owner}." if owner else "") for name in end.held):
                raise Unwritable("its norm belongs to another module")
            return _Site(owner, graph, *found)
        if not found:
            raise Unwritable(f"{owner or 'the network'} uses it in more than one way")
    raise Unwritable("no sum is behind it")


def _sum_behind(graph: fx.Graph, weight: str) -> tuple[fx.Node, fx.Node] | bool:
    """The sum and its operand; True where what comes of the layer leaves this forward, False where it goes several ways."""
    layer = weight.rpartition(".")[0]
    callers = [n for n in graph.nodes if _runs(n, layer, weight)]
    if len(callers) != 1:
        return False
    node = callers[0]
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return True
        if user.target in _SUMS and len(user.args) == 2 and not user.kwargs and user.args.count(node) == 1:
            return user, node
        node = user
    return False


def _runs(node: fx.Node, layer: str, weight: str) -> bool:
    if node.op == "call_module":
        return layer == node.target or layer.startswith(f"{node.target}.")
    return node.op == "get_attr" and node.target == weight


def _cut(site: _Site, end: End, call: dict[str, Any]) -> None:
    """Put the constant in the branch's place. What is written into the branch's memory goes to new memory."""
    graph, total, branch = site.graph, site.sum, site.branch
    first, second = total.args
    other = second if first is branch else first
    with graph.inserting_before(total):
        value = _constant(graph, end, call)
        if value is None:
            instead = graph.call_function(call["mul"], (other, 1.0))
        elif first is branch:
            instead = graph.call_function(call["add"], (other, value))
        else:
            total.update_arg(1, value)
            instead = total
    if instead is not total:
        total.replace_all_uses_with(instead)
        graph.erase_node(total)
    _erase(graph, branch)
    for node in list(graph.find_nodes(op="get_attr")):
        _erase(graph, node)  # counters of batches, which export lists and nothing reads
    graph.lint()


def _constant(graph: fx.Graph, end: End, call: dict[str, Any]) -> fx.Node | None:
    """What the bias and the norm give for zeros, as (1, channels, 1, …); None where that is nothing."""
    value = None if end.bias is None else graph.get_attr(end.bias)
    if end.norm is not None:
        scale, shift, mean, variance = (graph.get_attr(name) for name in end.held[:4])
        gain = graph.call_function(call["rsqrt"], (graph.call_function(call["add"], (variance, end.eps)),))
        gain = graph.call_function(call["mul"], (gain, scale))
        away = mean if value is None else graph.call_function(call["sub"], (mean, value))
        value = graph.call_function(call["sub"], (shift, graph.call_function(call["mul"], (away, gain))))
    if value is None or not end.axes:
        return value
    return graph.call_function(call["reshape"], (value, [1, -1, *[1] * end.axes]))


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """The node and what nothing but it needed."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if not node.users and node.op != "placeholder":
            waiting += node.all_input_nodes
            graph.erase_node(node)
