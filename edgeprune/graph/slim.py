"""A plan becomes a really smaller network, and the proof that it computes what the plan says.

`slim` returns the user's own module with smaller tensors (same class, same code); `mask` returns the dense network with
everything the removed channels own set to zero. Both must compute the same function: `prove` compares them in float64.
"""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from edgeprune.errors import SlimError
from edgeprune.graph.channels import ChannelGraph
from edgeprune.graph.cut import lacking, without_empty
from edgeprune.graph.duplicate import duplicate
from edgeprune.graph.exported import Exported, Unexportable, assembled, copy_graph, exported, is_exported
from edgeprune.graph.mixing import Kept, compute_over_kept
from edgeprune.graph.running import evaluating, few_collections, first_line, fresh, made_up, single_sample, tensors_in
from edgeprune.graph.sizes import Stuck, rewrite
from edgeprune.graph.symbolic import Symbolic, Unwritable, renumber, symbolic
from edgeprune.plan import Plan

_LARGE = 2**20  # elements of a tensor

_EXPORTED: MutableMapping[ChannelGraph, tuple[fx.Graph, dict[str, Tensor], dict[str, Any]]] = WeakKeyDictionary()


@few_collections()
def slim(model: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """A new network without the channels the plan leaves out; `model` is untouched.

    Same class and forward signature, same output shapes, trainable further. Where the network's code holds numbers of channels and the
    plan removes some of these, its layers under a forward with other numbers (`graph.written`), or the exported network with other
    numbers, which computes what the code computes in eval mode (`graph.exported`). Where the plan keeps no channel of a residual
    branch, the module that adds it to something is one of torch.fx without it (cut.py). Raises SlimError when the plan does not belong
    to this graph or the network cannot be copied.
    """
    if graph.exported is None:
        try:
            return _slim_own(model, graph, plan)
        except Unwritable as problem:
            raise SlimError(f"the numbers of channels in the network's code cannot be changed: {problem}. Trace it again.") from problem
    try:
        small = slim_exported(recall(graph, model), graph, plan, of=model)
    except (Stuck, Unexportable) as problem:
        raise SlimError(
            f"the exported network does not take the channels of this plan ({problem}): keep more of them, or trace the network again."
        ) from problem
    return small.train(model.training and (isinstance(model, Exported) or not is_exported(model)))


def borrowed(model: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """What `slim` makes of the user's own module, to run once: parameters are the model's own, or views of them where they can be.

    Raises symbolic.Unwritable where its code does not take other numbers.
    """
    return _slim_own(model, graph, plan, borrow=True)


def _slim_own(model: nn.Module, graph: ChannelGraph, plan: Plan, *, borrow: bool = False) -> nn.Module:
    small = _copied(model, _resized(model, graph, plan, borrow=borrow))
    for layer in small.modules():
        _remember_sizes(layer)
    return without_empty(with_numbers(small, graph, plan), graph, plan)


def with_numbers(small: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """A slim network with the numbers in its code changed; itself where the plan removes nothing that they count.

    Raises symbolic.Unwritable where the code does not take them.
    """
    if graph.written is None:
        return small
    kept = _kept_of_all(graph, plan)
    cut = [(axis, stays) for axis in graph.written.axes if not (stays := kept[axis.channels]).all()]
    if not cut:
        return small
    steps = small.meta.get("slimmed", ()) if isinstance(small, Symbolic) else ()
    network = symbolic(small, graph.written.opened)
    renumber(network, cut)
    network.meta["slimmed"] = [*steps, _step(small, graph.written.inputs, plan)]
    return network


def _step(model: nn.Module, inputs: Any, plan: Plan) -> dict[str, Any]:
    """What to do to a fresh dense network to come where slimming `model` by this plan came: branches that it lacked, example, plan."""
    ends = lacking(model)
    return {"inputs": inputs, **plan.to_json(), **({"without": ends} if ends else {})}


def slim_exported(network: Exported, graph: ChannelGraph, plan: Plan, *, of: nn.Module | None = None, borrow: bool = False) -> Exported:
    """`slim` for a graph of operations: smaller tensors (with `borrow` as `borrowed`), and the numbers of channels it holds.

    `of`: the network that it was exported from. Raises sizes.Stuck.
    """
    assert graph.exported is not None
    small = without_empty(_copied(network, _resized(network, graph, plan, borrow=borrow)), graph, plan)
    assert isinstance(small, Exported)
    kept = _kept_of_all(graph, plan)
    rewrite(small, {(name, axis): kept[channels] for name, axis, channels in graph.exported.axes})
    small.meta["slimmed"] = [*small.meta.get("slimmed", ()), _step(network if of is None else of, graph.exported.inputs, plan)]
    return small


def remember(graph: ChannelGraph, network: Exported, model: nn.Module) -> None:
    """Spare `slim` a second export while the graph lives: the operations are kept, the weights are not."""
    own = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    constants = {n: t for n, t in network.named_buffers(remove_duplicate=False) if n not in own}
    _EXPORTED[graph] = (copy_graph(network.graph), constants, dict(network.meta))


def recall(graph: ChannelGraph, model: nn.Module) -> Exported:
    """The dense network as the graph of operations that `slim` thins, sharing the model's tensors, in eval mode."""
    assert graph.exported is not None
    if graph not in _EXPORTED:
        return exported(model, made_up(graph.exported.inputs))
    operations, constants, meta = _EXPORTED[graph]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    network = assembled(copy_graph(operations), constants | dict(tensors))
    network.meta.update(meta)
    return network


def _resized(model: nn.Module, graph: ChannelGraph, plan: Plan, *, borrow: bool = False) -> dict[int, Any]:
    """The smaller tensors, by the id of the one they replace; with `borrow` also the parameters that stay as they are."""
    gone = removed_positions(graph, plan)
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    resized: dict[int, Any] = {id(p): p for p in model.parameters()} if borrow else {}
    for name in {name for name, _ in gone}:
        tensor, picked = tensors[name].detach(), dict[int, Tensor]()
        for axis in range(tensor.ndim):
            if (name, axis) in gone:
                kept = np.flatnonzero(~gone[name, axis])
                if borrow and len(kept) and kept[-1] - kept[0] + 1 == len(kept):
                    tensor = tensor.narrow(axis, int(kept[0]), len(kept))
                else:
                    picked[axis] = torch.from_numpy(kept).to(tensor.device)
        tensor, old = _picked(tensor, picked), tensors[name]
        resized[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    return resized


def _picked(tensor: Tensor, positions: dict[int, Tensor]) -> Tensor:
    """The positions along each axis; the first two axes at once: one after the other, a large matrix would be there half cut as well."""
    if positions.keys() >= {0, 1} and tensor.numel() > _LARGE:
        tensor = tensor[positions.pop(0)[:, None], positions.pop(1)]
    for axis, kept in positions.items():
        tensor = tensor.index_select(axis, kept)
    return tensor


def mask(model: nn.Module, graph: ChannelGraph, plan: Plan) -> nn.Module:
    """The dense twin: a copy in which all weights of the channels that the plan leaves out are zero; `model` is untouched.

    Norms and sums over channels are computed over the kept ones in it (mixing.py): zeros would count there.
    """
    zeroed = _copied(model)
    tensors = dict(named_tensors(zeroed))
    with torch.no_grad():
        for (name, axis), positions in removed_positions(graph, plan).items():
            tensors[name].index_fill_(axis, torch.from_numpy(np.flatnonzero(positions)).to(tensors[name].device), 0)
    if thin := kept_positions(graph, _keep_vector(graph, plan)):
        compute_over_kept(zeroed, thin)
    return zeroed


def _kept_of_all(graph: ChannelGraph, plan: Plan) -> NDArray[np.bool_]:
    """Whether each channel of all groups stays; the last one is for positions that always do: their channel is -1."""
    return np.append(_keep_vector(graph, plan), True)


def _keep_vector(graph: ChannelGraph, plan: Plan) -> NDArray[np.bool_]:
    keeps = [np.isin(np.arange(g.channels), plan.keep.get(g.name, range(g.channels))) for g in graph.groups]
    return np.concatenate([*keeps, np.zeros(0, dtype=np.bool_)])


def kept_positions(graph: ChannelGraph, keep: NDArray[np.bool_]) -> dict[tuple[str, int], Kept]:
    """For every operation over channels that loses some, but not all: the kept positions of each of its reads.

    `keep`: bool, all channels of all groups in the order of `graph.groups`.
    """
    offsets = np.cumsum([0, *(g.channels for g in graph.groups)])
    kept = np.append(keep, True)  # the last one stands for positions that always stay, whose channel is -1
    found: dict[tuple[str, int], Kept] = {}
    for mixing in graph.mixing:
        stays = [kept[np.where(r.groups < 0, len(kept) - 1, offsets[r.groups] + r.channels)] for r in mixing.reads]
        if all(s.any() for s in stays) and not all(s.all() for s in stays):
            found[mixing.op, mixing.ordinal] = (mixing, tuple(torch.from_numpy(np.flatnonzero(s)) for s in stays))
    return found


@dataclass(frozen=True)
class Proof:
    """How far slim and mask are apart, as a share of how far the output moves between two inputs.

    `kept_only`: norms and sums over channels that mask computes over the kept channels alone (mixing.py); 0 where zeros are exact.
    """

    max_relative_error: float
    samples: int
    dtype: str
    kept_only: int = 0


def prove(model: nn.Module, graph: ChannelGraph, plan: Plan, small: nn.Module, example_inputs: Any) -> Proof:
    """Compare `small` with the masked twin of `model` on the example inputs and on noise of the same scale.

    Runs in float64 (tolerance 1e-9; float32 with 1e-4 where the network cannot). Raises SlimError above the tolerance, or when
    the slim network does not run.
    """
    inputs = single_sample(example_inputs)
    twin, kept_only = mask(model, graph, plan), len(kept_positions(graph, _keep_vector(graph, plan)))
    try:
        twin64, inputs64 = twin.double(), tree_map(_double, inputs)
        with torch.no_grad(), evaluating(twin64):
            twin64(*fresh(inputs64))
        return replace(_compare(copy.deepcopy(small).double(), twin64, inputs64, 1e-9), kept_only=kept_only)
    except RuntimeError:  # the network casts to a fixed type somewhere
        pass
    except SlimError:
        if not (isinstance(small, Exported) and small.meta.get("casts")):
            raise
    return replace(_compare(small, mask(model, graph, plan), inputs, 1e-4), kept_only=kept_only)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _compare(small: nn.Module, twin: nn.Module, inputs: tuple[Any, ...], tolerance: float) -> Proof:
    noise = torch.Generator().manual_seed(0)

    def other(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        random = torch.randn(value.shape, generator=noise, dtype=value.dtype)
        return random * value.std(correction=0).clamp(min=0.1) + value.mean()

    samples = (inputs, tree_map(other, inputs))
    gap, moved, largest = 0.0, 0.0, 0.0
    with torch.no_grad(), evaluating(small), evaluating(twin):
        expected = [list(tensors_in(twin(*fresh(x)))) for x in samples]
        try:
            got = [list(tensors_in(small(*fresh(x)))) for x in samples]
        except Exception as error:  # so may its forward
            raise SlimError(
                f"the slim network does not run ({type(error).__name__}: {first_line(error)[:200]}): its code holds a number of "
                "channels as a fixed number. Write that number as a tensor's size (x.shape[1]) and try again."
            ) from error
    for a, b in zip(expected[0], expected[1], strict=True):
        if a.shape == b.shape and a.numel():
            moved = max(moved, float((a - b).nan_to_num(0.0, 0.0, 0.0).abs().max()))
    for reference, result in zip(expected, got, strict=True):
        for a, b in zip(reference, result, strict=True):
            if a.shape != b.shape:
                raise SlimError(f"the slim network returns {tuple(b.shape)} where the dense one returns {tuple(a.shape)}.")
            if a.numel():
                gap, largest = max(gap, _apart(a, b)), max(largest, float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()))
    # Outputs that hardly move, because the inputs are integers or few channels are left, differ by rounding alone.
    rounding = 64 * torch.finfo(expected[0][0].dtype).eps / tolerance * largest
    scale = max(moved, rounding)
    relative = gap / scale if scale > 0 else gap
    dtype = str(expected[0][0].dtype).removeprefix("torch.")
    if not relative <= tolerance:
        raise SlimError(
            f"the slim network and its masked twin differ by {relative:.2e} of the output's range ({dtype}, tolerance {tolerance:.0e}): "
            "the network uses channels in a way tracing did not see. Nothing was written; please report the network's layer types."
        )
    return Proof(relative, len(expected), dtype)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where only one of both is a number, or where none is: nothing would be compared."""
    if not bool(a.isfinite().any()):
        return math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf).max())


def resize(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of other sizes into a module, in place, and bring the sizes its layers remember up to date."""
    aliases = aliases_of(module)
    for name, tensor in tensors.items():
        for alias in aliases[name]:
            path, _, leaf = alias.rpartition(".")
            owner = module.get_submodule(path)
            old = getattr(owner, leaf)
            if isinstance(old, nn.Parameter):
                if alias == name:
                    shared = nn.Parameter(tensor, requires_grad=old.requires_grad)
                owner._parameters[leaf] = shared
            else:
                owner._buffers[leaf] = tensor
    for layer in module.modules():
        _remember_sizes(layer)


def _remember_sizes(layer: nn.Module) -> None:
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        layer.input_size = getattr(layer, "weight_ih" if isinstance(layer, nn.RNNCellBase) else "weight_ih_l0").shape[1]
    weight = getattr(layer, "weight", None)
    weight = getattr(layer, "running_mean", None) if weight is None else weight  # a norm without scale
    if not isinstance(weight, Tensor):
        return
    if isinstance(layer, nn.modules.conv._ConvNd):
        if 1 < layer.groups == layer.in_channels:
            multiplier = layer.out_channels // layer.groups
            layer.groups = weight.shape[0] // (1 if layer.transposed else multiplier)
            layer.in_channels = layer.groups
            layer.out_channels = layer.groups * multiplier
        elif layer.transposed:
            layer.in_channels, layer.out_channels = weight.shape[0], weight.shape[1] * layer.groups
        else:
            layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape
    elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        layer.num_embeddings, layer.embedding_dim = weight.shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = weight.shape[0]
    elif isinstance(getattr(layer, "normalized_shape", None), tuple):  # layer and RMS norms, also those that libraries bring
        setattr(layer, "normalized_shape", tuple(weight.shape))  # noqa: B010  not declared on a bare Module
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = weight.shape[0] if layer.num_groups == layer.num_channels else layer.num_groups
        layer.num_channels = weight.shape[0]
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = weight.shape[0]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, each once."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def aliases_of(module: nn.Module) -> dict[str, list[str]]:
    """Every name of every tensor, under the name tracing uses (the first one): shared weights have several."""
    first = {id(t): n for n, t in named_tensors(module)}
    names: dict[str, list[str]] = {}
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        names.setdefault(first[id(tensor)], []).append(name)
    return names


def removed_positions(graph: ChannelGraph, plan: Plan) -> dict[tuple[str, int], NDArray[np.bool_]]:
    """For every parameter axis that loses something: which positions go, (length of the axis,)."""
    known = {g.name for g in graph.groups}
    if unknown := sorted(set(plan.keep) - known):
        raise SlimError(
            f"the plan names groups that this network does not have: {', '.join(unknown[:5])}. Trace and plan the same network."
        )
    gone: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group in graph.groups:
        keep = np.unique(np.asarray(plan.keep.get(group.name, range(group.channels)), dtype=np.int64))
        if len(keep) == group.channels:
            continue
        vanishes = not len(keep) and group.name in graph.branches
        if not vanishes and (not len(keep) or keep.min() < 0 or keep.max() >= group.channels):
            raise SlimError(
                f"the plan keeps channels {keep[:5].tolist()} of {group.name}, which has {group.channels}; at least one must stay."
            )
        drop = np.ones(group.channels, dtype=bool)
        drop[keep] = False
        for member in group.members:
            key = (member.parameter, member.axis)
            positions = gone.setdefault(key, np.zeros(graph.shapes[member.parameter][member.axis], dtype=bool))
            positions[member.indices[drop].reshape(-1)] = True
    return gone


def _copied(model: nn.Module, instead: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; tensors whose id is in `instead` are replaced wherever they are used."""
    try:
        return duplicate(model, instead)
    except Exception as error:  # a user's module may raise anything while it is copied
        raise SlimError(f"the network cannot be copied ({type(error).__name__}: {error}); it must survive copy.deepcopy.") from error


def fingerprint(model: nn.Module) -> str:
    """Hash of a network's class, its layers as they describe themselves (strides, activations), and its tensors' names and values."""
    layers = re.sub(r"\bat 0x[0-9a-f]+", "", repr(model))
    digest = hashlib.sha256(f"{type(model).__qualname__} {layers}".encode())
    for name, tensor in named_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
