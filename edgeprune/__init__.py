"""edgeprune: trained CNNs made smaller for small boards.

    import edgeprune as ep
    result = ep.compress(model, example, budget=ep.Budget(latency_ms=30), device="rpi4", data="photos/")

Names are loaded when they are first used, so that light commands never import torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeprune.allocate import allocate as allocate
    from edgeprune.api import compress as compress
    from edgeprune.api import evaluate as evaluate
    from edgeprune.api import predict as predict
    from edgeprune.criteria import score as score
    from edgeprune.data import load_data as load_data
    from edgeprune.device.card import device as device
    from edgeprune.device.card import devices as devices
    from edgeprune.device.measure import measure as measure
    from edgeprune.export import export as export
    from edgeprune.graph.portable import load as load
    from edgeprune.graph.portable import save as save
    from edgeprune.graph.slim import mask as mask
    from edgeprune.graph.slim import prove as prove
    from edgeprune.graph.slim import slim as slim
    from edgeprune.graph.trace import trace as trace
    from edgeprune.load import load_model as load_model
    from edgeprune.plan import Budget as Budget
    from edgeprune.plan import Plan as Plan
    from edgeprune.plan import Scores as Scores
    from edgeprune.sparsify import load_sparse as load_sparse
    from edgeprune.sparsify import save_sparse as save_sparse
    from edgeprune.sparsify import sparsify as sparsify
    from edgeprune.train import Recipe as Recipe

_HOMES = {
    "allocate": "allocate",
    "compress": "api",
    "evaluate": "api",
    "predict": "api",
    "score": "criteria",
    "load_data": "data",
    "device": "device.card",
    "devices": "device.card",
    "measure": "device.measure",
    "export": "export",
    "load": "graph.portable",
    "save": "graph.portable",
    "mask": "graph.slim",
    "prove": "graph.slim",
    "slim": "graph.slim",
    "trace": "graph.trace",
    "load_model": "load",
    "Budget": "plan",
    "Plan": "plan",
    "Scores": "plan",
    "load_sparse": "sparsify",
    "save_sparse": "sparsify",
    "sparsify": "sparsify",
    "Recipe": "train",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605  a list of str


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"edgeprune.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


class _VerbsFirst(ModuleType):
    """`allocate`, `device`, `export` and `load` are verbs users call and sub-packages too: the verbs win as attributes.

    Importing a sub-package sets it as an attribute of its parent; that one assignment is left out here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _VerbsFirst
