"""What is particular to watching a network run; inputs, flags and outputs are tested where networks are traced."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from edgeprune.export import export
from edgeprune.graph.exported import exported
from edgeprune.graph.trace import trace
from tests.networks import build, images, outputs, traced

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # whatever the compiler of this torch warns of
def test_a_compiled_network_is_traced_as_the_one_inside_it() -> None:
    compiled_graphs: list[GraphModule] = []

    def backend(graph: GraphModule, _: object) -> object:
        compiled_graphs.append(graph)
        return graph

    network: nn.Module = torch.compile(build("residual"), backend=backend)  # type: ignore[assignment]
    found, expected = trace(network, images("residual")), traced("residual")[1]
    assert [g.name for g in found.groups] == [f"_orig_mod.{g.name}" for g in expected.groups]
    assert found.macs == expected.macs
    assert list(found.frozen.values()) == list(expected.frozen.values())
    assert compiled_graphs == []
    outputs(network, images("residual"))
    assert len(compiled_graphs) == 1, "afterwards the network is compiled as before"


def test_tracing_does_not_import_the_compiler() -> None:
    code = """
import sys, torch
from edgeprune.graph.trace import trace
graph = trace(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)), torch.zeros(1, 3, 8, 8))
assert [g.channels for g in graph.groups] == [8]
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exports_leave_nothing_behind(tmp_path: Path) -> None:
    """The sizes of a traced graph, by which torch keeps some 0.1 MB of every exported network."""

    def environments() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "ShapeEnv" for thing in gc.get_objects())

    x, before = torch.zeros(1, 3, 8, 8), environments()
    for width in range(4, 8):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU()).eval()
        export(model, (x,), tmp_path / f"{width}", format="onnx")
        exported(model, (x,))
    assert environments() <= before + 2  # the last ones may still be in use
