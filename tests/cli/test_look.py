from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import NET, Command


def test_inspect(edgeprune: Command) -> None:
    """ColourNet: a (the stream of a and b, 16 channels at 8 x 8), c (32 at 4 x 4), the head's outputs frozen."""
    done = edgeprune("inspect", *NET, "--input-shape", "1,3,8,8")
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["group", "channels", "parameter", "axes", "MACs", "of", "all", "parameters", "of", "all"]
    dense = 64 * 27 * 16 + 64 * 9 * 16 * 16 + 16 * 9 * 16 * 32 + 32 * 3
    assert f"{100 * (dense - 96) / dense:.1f}%" in done.out.splitlines()[1]
    assert "2 groups of channels can shrink" in done.out
    assert [line.split() for line in done.out.splitlines()[-1:]] == [["output", "of", "the", "network", "1", "head.weight[0]"]]
    assert "64, 32" not in done.out
    with_layers = edgeprune("inspect", *NET, "--input-shape", "1,3,8,8", "--layers")
    assert [line.split()[0] for line in with_layers.out.split("\n\n")[2].splitlines()] == ["layer", "a", "b", "c", "head"]


def test_inspect_as_json_has_everything(edgeprune: Command) -> None:
    found = json.loads(edgeprune("inspect", *NET, "--input-shape", "1,3,8,8", "--json").out)
    stream, c = found["groups"]
    assert (stream["name"], stream["channels"], c["name"], c["channels"]) == ("a", 16, "c", 32)
    per_layer = {x["name"]: x["macs"] for x in found["layers"]}
    assert per_layer == {"a": 64 * 27 * 16, "b": 64 * 9 * 256, "c": 16 * 9 * 512, "head": 96}
    assert sum(per_layer.values()) == found["macs"]
    assert stream["macs"] == found["macs"] - 96
    assert c["macs"] == per_layer["c"] + 96
    assert c["channel_macs"] == 16 * 9 * 16 + 3
    assert c["macs_share"] == c["macs"] / found["macs"]
    assert {"parameter": "b.weight", "axis": 1, "positions_per_channel": 1} in stream["members"]
    left = 64 * 27 + 64 * 9 + 16 * 9 + 3
    assert found["prunable"]["macs"] == pytest.approx(1 - left / found["macs"])
    assert found["frozen"] == {"head.weight[0]": "output of the network"}
    assert found["frozen_by_reason"] == {"output of the network": ["head.weight[0]"]}


def test_inspect_shortens_long_lists(edgeprune: Command, here: Path) -> None:
    (here / "wide.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.heads = torch.nn.ModuleList(torch.nn.Conv2d(3, 4, 1) for _ in range(6))\n"
        "    def forward(self, x):\n        return [h(x) for h in self.heads]\n"
    )
    sys.path.insert(0, str(here))
    import wide  # type: ignore[import-not-found]  # written above

    torch.save(wide.Net().state_dict(), here / "wide.pt")
    done = edgeprune("inspect", "wide.pt", "--model", "wide:Net", "--input-shape", "1,3,8,8")
    assert done.code == 0, done.err
    assert "heads.3.weight[0] and 2 more (--json has all)" in done.out
    assert "0.0% of the MACs" in done.out
    assert "heads.4" not in done.out


def test_profile_of_a_model_is_a_prediction(edgeprune: Command) -> None:
    words = ["profile", *NET, "--input-shape", "1,3,8,8", "--device", "rpi4"]
    done = edgeprune(*words)
    assert done.code == 0
    assert "predicted, not measured" in done.out
    assert {"a", "b", "c", "head"} <= {line.split()[0] for line in done.out.splitlines() if line}
    found = json.loads(edgeprune(*words, "--json").out)
    shares = [float(line.split()[-1].rstrip("%")) for line in done.out.splitlines() if line.endswith(("%", "% "))]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert found["latency_ms"]["low"] < found["latency_ms"]["value"] < found["latency_ms"]["high"]


@pytest.mark.parametrize(("command", "names"), [("criteria", ["l1", "nuclear_norm"]), ("allocators", ["uniform", "global", "knapsack"])])
def test_registries(edgeprune: Command, command: str, names: list[str]) -> None:
    done = edgeprune(command)
    assert set(names) <= {line.split()[0] for line in done.out.splitlines()}
    found = json.loads(edgeprune(command, "--json").out)
    assert set(names) <= found.keys()
    assert all(entry["summary"] and entry["source"] for entry in found.values())
