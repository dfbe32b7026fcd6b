"""Save a slim network without pickle and rebuild it from the user's own constructor.

One .safetensors file holds the weights; its header holds the recipe (format, class, plan). Loading gives every tensor of a fresh
dense network the saved size and value, so a network that was slimmed twice loads like one that was slimmed once.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.graph.slim import aliases_of, named_tensors, resize
from edgeprune.plan import Plan
from edgeprune.run import product_version, write_atomic

FORMAT = "edgeprune-1"


def save(module: nn.Module, path: str | Path, *, plan: Plan | None = None) -> Path:
    """Write weights, buffers and the plan to `path` (.safetensors), under a temporary name first; returns the path."""
    path = Path(path)
    recipe = {"format": FORMAT, "edgeprune": product_version(), "class": f"{type(module).__module__}.{type(module).__qualname__}"}
    if plan is not None:
        recipe["plan"] = json.dumps(plan.to_json())
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in named_tensors(module)}
    write_atomic(path, to_bytes(tensors, metadata=recipe))
    return path


def load(path: str | Path, *, model: nn.Module) -> nn.Module:
    """The saved network, rebuilt from a fresh dense `model` of the same architecture (left untouched).

    Raises ModelError for a file that is not one of ours, or tensors the network does not have.
    """
    tensors = _read(Path(path))
    small = copy.deepcopy(model)
    own = aliases_of(small)
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ModelError(
            f"{path} does not belong to {type(model).__name__}: {len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}). Build the network with the constructor it was trained with."
        )
    ranks = {name: t.ndim for name, t in named_tensors(small)}
    if wrong := [name for name, t in tensors.items() if t.ndim != ranks[name]]:
        raise ModelError(f"{path} does not belong to {type(model).__name__}: {wrong[0]} has {tensors[wrong[0]].ndim} dimensions.")
    resize(small, tensors)
    return small


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ModelError(f"{path} was not written by edgeprune.save; load it with the tool that wrote it.")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}.") from error
