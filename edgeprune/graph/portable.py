"""Save a slim network without pickle and rebuild it from the user's own constructor.

One .safetensors file holds the weights; its header holds the recipe (format, class, plan). Loading gives every tensor of a fresh
dense network the saved size and value, so a network that was slimmed twice loads like one that was slimmed once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, fx, nn

from edgeprune.errors import ModelError
from edgeprune.graph.branches import NORM_TENSORS, End
from edgeprune.graph.cut import lacking, without_branches
from edgeprune.graph.exported import Exported, opened
from edgeprune.graph.running import made_up
from edgeprune.graph.slim import aliases_of, named_tensors, resize, slim
from edgeprune.graph.symbolic import Symbolic
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from edgeprune.pt2 import load_exported_program, save_program
from edgeprune.run import product_version, write_atomic

FORMAT = "edgeprune-1"


def save(module: nn.Module, path: str | Path, *, plan: Plan | None = None, example_inputs: Any = None) -> Path:
    """Write weights, buffers and the plan to `path` (.safetensors), under a temporary name first; returns the path.

    To a .pt2 file goes the whole network (in eval mode, for any batch), so that loading needs no source code; `example_inputs` are
    then needed to export it. Raises ModelError where that fails.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        return save_program(module, path, example_inputs)
    recipe = {"format": FORMAT, "edgeprune": product_version(), "class": _class_of(module)}
    if plan is not None:
        recipe["plan"] = json.dumps(plan.to_json())
    if isinstance(module, (Exported, Symbolic)):
        recipe["exported"] = json.dumps(module.meta.get("slimmed", []))
    if ends := lacking(module):
        recipe["without"] = json.dumps(ends)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named_tensors(module)}
    write_atomic(path, to_bytes(tensors, metadata=recipe))
    return path


def load(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """The saved network, rebuilt from a fresh dense `model` of the same architecture (left untouched); a .pt2 file needs none.

    Raises ModelError for a file that is not one of ours, or tensors the network does not have.
    """
    if Path(path).suffix == ".pt2":
        return opened(load_exported_program(Path(path), trusted=False))
    if model is None:
        raise ModelError(f"{path} holds weights but no network: give load(…, model=) the dense network they were slimmed from.")
    tensors, exported_steps, ends = _read(Path(path))
    small = _slimmed_again(model, exported_steps, tensors)
    small = _without(small, ends)
    own = aliases_of(small)
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ModelError(
            f"{path} does not belong to {type(model).__name__}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}). Build the network with the constructor it was trained with."
        )
    if problem := next(_misfits(small, tensors), None):
        raise ModelError(
            f"{path} does not belong to {type(model).__name__}: {problem}. Build the network with the constructor it was trained with, or "
            "save the slim network again."
        )
    resize(small, tensors)
    return small


def _class_of(module: nn.Module) -> str:
    """The name of its class; torch.fx makes a nameless one of its own for every network."""
    named = type(module).__mro__[1] if isinstance(module, fx.GraphModule) else type(module)
    return f"{named.__module__}.{named.__qualname__}"


def _slimmed_again(model: nn.Module, steps: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy; where an exported network was saved, exported and slimmed by the same plans, unless the model is that network."""
    is_it = isinstance(model, (Exported, Symbolic)) and all(n in tensors and t.shape == tensors[n].shape for n, t in named_tensors(model))
    if is_it or not steps:
        return copy.deepcopy(model)
    for step in steps:
        if ends := step.get("without"):
            model = _without(copy.deepcopy(model), ends)
        graph = trace(model, made_up(step["inputs"]))
        model = slim(model, graph, Plan.from_json(step))
    return model


def _without(model: nn.Module, ends: Iterable[Sequence[Any]]) -> nn.Module:
    """The network, which is changed, without these branches; those that it lacks already are no matter."""
    there = dict(named_tensors(model))
    return without_branches(model, [end for found in ends if (end := End(*found)).weight in there])


def _misfits(dense: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What slimming cannot have done to the dense network: other kinds of numbers, longer axes, other kernels, norms of two lengths."""
    for name, own in named_tensors(dense):
        saved, sizes = tensors[name], (tuple(tensors[name].shape), tuple(own.shape))
        if (saved.is_floating_point(), saved.is_complex()) != (own.is_floating_point(), own.is_complex()):
            yield f"{name} holds {str(saved.dtype).removeprefix('torch.')} where the network has {str(own.dtype).removeprefix('torch.')}"
        elif saved.ndim != own.ndim:
            yield f"{name} has {saved.ndim} dimensions, the network's has {own.ndim}"
        elif any(not 0 < a <= b for a, b in zip(*sizes, strict=True)) and own.numel():
            yield f"{name} has the shape {sizes[0]}, which is no part of the network's {sizes[1]}"
    aliases = {alias: name for name, others in aliases_of(dense).items() for alias in others}
    for path, layer in dense.named_modules():
        own_names = {leaf: aliases[f"{path}.{leaf}".lstrip(".")] for leaf in NORM_TENSORS if isinstance(getattr(layer, leaf, None), Tensor)}
        shapes = {leaf: tuple(tensors[name].shape) for leaf, name in own_names.items()}
        if isinstance(layer, nn.modules.conv._ConvNd) and "weight" in shapes and shapes["weight"][2:] != layer.kernel_size:
            yield f"{path}.weight has a kernel of {shapes['weight'][2:]}, the network's has {layer.kernel_size}"
        if isinstance(layer, nn.modules.batchnorm._NormBase) and len(set(shapes.values())) > 1:
            yield f"the tensors of {path} have different lengths ({', '.join(f'{leaf} {shape[0]}' for leaf, shape in shapes.items())})"


def _read(path: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[Sequence[Any]]]:
    try:
        with safe_open(path, framework="pt") as file:
            recipe = file.metadata() or {}
            if recipe.get("format") != FORMAT:
                raise ModelError(f"{path} was not written by edgeprune.save; load it with the tool that wrote it.")
            steps: list[dict[str, Any]] = json.loads(recipe.get("exported", "[]"))
            ends: list[Sequence[Any]] = json.loads(recipe.get("without", "[]"))
            # Clones, because where a tensor lies in the file is where it lies in memory: off its alignment other kernels compute it,
            # with other roundings.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, steps, ends  # noqa: SIM118  not a dict
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ModelError(f"{path} cannot be read as safetensors ({reason}): it is damaged, cut off or another kind of file.") from error
