"""Networks as torch.export writes them: a graph of operations in which every number of the user's Python can be changed.

An `Exported` network computes what the network it was made from computes in eval mode, for any batch, and is trained further like any
other module: batch norm and dropout follow `train()` and `eval()`. What else a forward does differently while training (auxiliary
outputs, stochastic depth) is not in it.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_leaves, tree_map

from edgeprune.graph.running import evaluating, first_line, forget, fresh, quiet_torch, silent_torch, tensors_in

aten = torch.ops.aten

# Checks of what export saw (types, sizes, guards): a slim network has other sizes, and float64 copies are compared with each other.
_CHECKS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")
_TRAINING_FLAG = {"batch_norm": 5, "dropout": 2, "feature_dropout": 2, "alpha_dropout": 2, "feature_alpha_dropout": 2}
_MANY = 8  # samples; a larger batch is not tried out
_TAKES_SIZES = {"view": 1, "reshape": 1, "_unsafe_view": 1, "expand": 1, "new_zeros": 1, "new_ones": 1, "new_full": 1}


class Unexportable(Exception):
    """Why a network cannot be exported, on one line."""


class Exported(fx.GraphModule):
    """A graph of aten operations; `train()` and `eval()` work as on any module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Exported:
        """As fx copies, without the deprecation that torch raises against itself."""
        with quiet_torch():
            twin = super().__deepcopy__(memo)
        assert isinstance(twin, Exported)
        return twin


def is_exported(model: nn.Module) -> bool:
    """Whether the module is a graph of aten operations, as torch.export and `torch.export.load` give it."""
    if not isinstance(model, fx.GraphModule):
        return False
    nodes = model.graph.nodes
    calls = [n for n in nodes if n.op in ("call_module", "call_method") and n.target != "_guards_fn"]
    return not calls and any(isinstance(n.target, torch._ops.OpOverload) for n in nodes)


def exported(model: nn.Module, inputs: tuple[Any, ...]) -> Exported:
    """The network as a graph that shares the model's tensors: an Exported one as it is, any other in eval mode.

    Raises Unexportable as `exported_program`, which it does not need for a network that is a graph already.
    """
    if isinstance(model, Exported):
        return model
    if is_exported(model):
        assert isinstance(model, fx.GraphModule)
        return opened(model)
    return opened(exported_program(model, inputs))


def exported_program(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """What torch.export makes of the network in eval mode; `inputs` are one sample (dimension 0 of every tensor is the batch).

    Raises Unexportable when torch.export refuses, or when the graph takes only one size of batch. Takes one to three seconds for
    a network of the usual size.
    """
    leaves = list(tensors_in(inputs))
    if not leaves or any(not t.ndim or t.shape[0] != 1 for t in leaves):
        raise Unexportable("its inputs have no batch dimension")
    # Two samples: sizes 0 and 1 are taken as constants.
    pairs = tree_map(lambda t: torch.cat([t, t]) if isinstance(t, Tensor) else t, fresh(inputs))
    batch = tree_map(lambda t: {0: Dim.AUTO} if isinstance(t, Tensor) else None, pairs)
    try:
        with quiet_torch(), silent_torch(), evaluating(model), torch.no_grad():
            program = export(model, pairs, dynamic_shapes=batch, strict=False)
            if _fixed_batch(_module(program)):  # by len(x), for example
                program = export(_any_batch(program), pairs, dynamic_shapes=batch, strict=False)
    except Unexportable:
        raise
    except Exception as error:  # the user's forward, and what torch makes of it, may raise anything
        on_data = "data-dependent" in str(error)
        raise Unexportable("its code branches on data" if on_data else first_line(error)[:160].rstrip(".")) from error
    return program


def _any_batch(program: ExportedProgram) -> Exported:
    network = opened(program)
    if network.meta["fixed_batch"]:
        raise Unexportable("its code fixes the size of the batch")
    return network


def _module(program: ExportedProgram) -> fx.GraphModule:
    with quiet_torch():
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def opened(source: fx.GraphModule | ExportedProgram) -> Exported:
    """The same graph and tensors, for any batch where that is possible, trainable, without the checks of what export saw."""
    module = source if isinstance(source, fx.GraphModule) else _module(source)
    graph = copy_graph(module.graph)
    meta = {"slimmed": module.meta.get("slimmed", []), "casts": module.meta.get("casts", False)}
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    for node in list(graph.nodes):
        if node.target == "_guards_fn" or (operation(node) in _CHECKS):
            graph.erase_node(node)
        elif node.op == "get_attr" and node.target not in tensors:
            tensors[node.target] = operator.attrgetter(node.target)(module)
        elif operation(node) == "to":
            meta["casts"] |= _cast_to_own_type(node, tensors)
        elif node.target is aten.view.default:  # the same, and works on any memory format
            node.target = aten.reshape.default
        elif operation(node) == "_native_batch_norm_legit_no_training":
            _as_batch_norm(node)
    _follow_mode(graph)
    fixed = _fixed_batch(module)
    free = _with_free_batch(graph, tensors) if fixed else None
    network = free or assembled(graph, tensors)
    network.meta.update(meta, fixed_batch=fixed and free is None)
    network.train(isinstance(module, Exported) and module.training)
    if not isinstance(source, fx.GraphModule):
        forget(source.graph)
    return network


def assembled(graph: fx.Graph, tensors: dict[str, Any]) -> Exported:
    """The network of a graph and its tensors by name, in eval mode."""
    for node in graph.nodes:
        node.meta.clear()  # sizes of the original, stack traces
    named = {n.target: tensors[n.target] for n in graph.nodes if n.op == "get_attr" and n.target != "training"}
    network: Exported = Exported(named | {"training": False}, graph).eval()
    return network


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy with the same names of nodes."""
    with quiet_torch():
        return copy.deepcopy(graph)


def operation(node: fx.Node) -> str:
    """The operation's name without its overload; empty for nodes that are no operation."""
    return node.target.__name__.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def _cast_to_own_type(node: fx.Node, tensors: dict[str, Any]) -> bool:
    """A cast to the type of the parameters, which may come from x.to(y.dtype), follows them to another type; whether it is one."""
    after = node.meta.get("val")
    for own in node.graph.find_nodes(op="get_attr"):
        tensor = tensors.get(own.target)
        if isinstance(tensor, nn.Parameter) and isinstance(after, Tensor) and tensor.dtype == after.dtype and own < node:
            node.target, node.args, node.kwargs = aten.to.other, (node.args[0], own), {}
            return True
    return False


def _follow_mode(graph: fx.Graph) -> None:
    """Batch norm and dropout read the module's own flag instead of the constant that was true at export."""
    mode = None
    for node in list(graph.nodes):
        position = _TRAINING_FLAG.get(operation(node))
        if position is None or len(node.args) <= position or node.args[position] is not False:
            continue
        if mode is None:
            with graph.inserting_before(next(iter(graph.nodes))):
                mode = graph.create_node("get_attr", "training", name="training")
        node.update_arg(position, mode)
        if operation(node) == "batch_norm" and node.args[6] == 0.0:
            node.update_arg(6, 0.1)  # export writes 0 for a cumulative average: the statistics would never move


def _as_batch_norm(node: fx.Node) -> None:
    """The decomposed form of batch norm in eval mode gives a tuple, of which only the first part is used."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return
    with node.graph.inserting_before(node):
        norm = node.graph.call_function(aten.batch_norm.default, (*node.args[:5], False, *node.args[5:7], True))
    norm.meta = {"val": node.meta["val"][0]} if "val" in node.meta else {}
    for user in list(node.users):
        user.replace_all_uses_with(norm)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _fixed_batch(module: fx.GraphModule) -> bool:
    """Whether the graph was made for one size of batch; False where it does not say."""
    values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    sizes = [v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim]
    return any(isinstance(n, int) or n.node.maybe_as_int() is not None for n in sizes)


def _with_free_batch(graph: fx.Graph, tensors: dict[str, Any]) -> Exported | None:
    """The network with the batch read from its input where it was a number; None where that gives other results."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    values = [n.meta["val"] for n in inputs]
    sizes = {int(v.shape[0]) if isinstance(v, Tensor) and v.ndim else -1 for v in values}
    if len(sizes) != 1 or -1 in sizes:
        return None
    size = sizes.pop()
    graph, made_from = copy_graph(graph), {}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        batch = graph.call_function(aten.sym_size.int, (inputs[0], 0))
    depends = set(inputs)
    for node in graph.nodes:
        if node in depends or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            made_from[node] = node.args
    for node in list(made_from):
        position = _TAKES_SIZES.get(operation(node))
        asked = node.args[position] if position is not None else ()
        if asked and asked[0] == size and _starts_with(node, size) and (_starts_with(node.args[0], size) or position is None):
            node.update_arg(position, [batch, *asked[1:]])
    # One more sample than before: a loop over the batch that was unrolled would leave it out.
    values = [torch.ones(min(size, _MANY) + 1, *v.shape[1:], dtype=v.dtype) for v in values]
    free = assembled(graph, tensors)
    return free if _works_sample_by_sample(free, values) else None


def _starts_with(node: Any, size: int) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0 and bool(value.shape[0] == size)


def _works_sample_by_sample(network: Exported, values: list[Tensor]) -> bool:
    noise = torch.Generator().manual_seed(0)
    values = [torch.randn(v.shape, generator=noise).to(v.dtype) if v.is_floating_point() else v for v in values]
    try:
        with torch.no_grad():
            both, *single = [
                tree_leaves(network.graph.process_outputs(fx.Interpreter(network).run(*part, enable_io_processing=False)))
                for part in (values, [v[:1] for v in values], [v[1:] for v in values])
            ]
    except (RuntimeError, ValueError, IndexError):
        return False
    pairs = [(b, torch.cat(parts)) for b, *parts in zip(both, *single, strict=True) if isinstance(b, Tensor) and b.ndim]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in pairs)
