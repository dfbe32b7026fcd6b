import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.graph.exported import opened
from edgeprune.pt2 import load_exported_program, save_program
from tests.test_load import Hostile, net

Edit = Callable[[dict[str, Any], Path], None]


def export(path: Path) -> Path:
    torch.export.save(torch.export.export(net().eval(), (torch.zeros(1, 3, 8, 8),)), path)
    return path


def rewrite(path: Path, change: Callable[[str, bytes], bytes], add: tuple[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name.partition("/")[2], content))
        if add:
            archive.writestr(f"{next(iter(entries)).partition('/')[0]}/{add[0]}", add[1])


def edit_graph(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    def change(name: str, content: bytes) -> bytes:
        if name != "models/model.json":
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    rewrite(path, change)


def node(document: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = document["graph_module"]["graph"]["nodes"][0]
    return first


def call_os(document: dict[str, Any], code: str) -> None:
    node(document)["target"] = "torch.os.mkdir"
    node(document)["inputs"] = [{"name": "path", "arg": {"as_string": code}, "kind": 1}]


def hostile_size(document: dict[str, Any], code: str) -> None:
    document["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 1}}}


def hostile_argument(document: dict[str, Any], code: str) -> None:
    document["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={code}"]


def hostile_name(document: dict[str, Any], code: str) -> None:
    node(document)["name"] = f"a\n{code}"


def hostile_enum(document: dict[str, Any], code: str) -> None:
    document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps(
        [1, {"__enum__": True, "fqn": "os:x", "name": code}]
    )


@pytest.mark.parametrize("edit", [call_os, hostile_size, hostile_argument, hostile_name, hostile_enum])
def test_hostile_graph_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any], str], None]) -> None:
    canary = tmp_path / "canary"
    edit_graph(export(tmp_path / "a.pt2"), lambda document: edit(document, f"__import__('os').mkdir({str(canary)!r})"))
    with pytest.raises(ModelError, match=r"can execute code.*--trust-pickle"):
        load_exported_program(tmp_path / "a.pt2", trusted=False)
    assert not canary.exists()


def test_hostile_size_runs_when_trusted(tmp_path: Path) -> None:
    """The negative control: torch.export.load does evaluate what we refuse."""
    canary = tmp_path / "canary"
    edit_graph(export(tmp_path / "a.pt2"), lambda document: hostile_size(document, f"__import__('os').mkdir({str(canary)!r})"))
    with pytest.raises(ModelError):
        load_exported_program(tmp_path / "a.pt2", trusted=True)
    assert canary.exists()


def test_hostile_sample_inputs_do_not_run(tmp_path: Path) -> None:
    canary, evil = tmp_path / "canary", tmp_path / "evil.pt"
    torch.save(((Hostile(canary),), {}), evil)
    rewrite(export(tmp_path / "a.pt2"), lambda name, content: evil.read_bytes() if "sample_inputs" in name else content)
    with pytest.raises(ModelError, match="pickled objects"):
        load_exported_program(tmp_path / "a.pt2", trusted=False)
    assert not canary.exists()
    with pytest.raises(ModelError):
        load_exported_program(tmp_path / "a.pt2", trusted=True)
    assert canary.exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    rewrite(export(tmp_path / "a.pt2"), lambda _, content: content.replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(ModelError, match="pickled weights"):
        load_exported_program(tmp_path / "a.pt2", trusted=False)


@pytest.mark.parametrize("name", ["data/constants/custom_obj_0", "data/aotinductor/model/model.so", "data/weights/model.pt", "../x"])
def test_unknown_entries_are_refused(tmp_path: Path, name: str) -> None:
    rewrite(export(tmp_path / "a.pt2"), lambda _, content: content, add=(name, b"x"))
    with pytest.raises(ModelError, match="can execute code"):
        load_exported_program(tmp_path / "a.pt2", trusted=False)


def test_guards_are_dropped(tmp_path: Path) -> None:
    edit_graph(export(tmp_path / "a.pt2"), lambda document: document.update(guards_code=[f"open({str(tmp_path / 'canary')!r}, 'w')"]))
    load_exported_program(tmp_path / "a.pt2", trusted=False).module()(torch.zeros(1, 3, 8, 8))
    assert not (tmp_path / "canary").exists()


class Ragged(nn.Module):
    """Dynamic sizes, constants, a buffer and a nested output: what a plain program may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.conv(x) * self.scale + torch.tensor([1.0])
        return {"flat": y.view(x.shape[0], -1), "pair": [torch.einsum("bc,cd->bd", y.mean((2, 3)), torch.eye(4)), y]}


def test_dynamic_program(tmp_path: Path) -> None:
    model = Ragged().eval()
    dims = ({0: torch.export.Dim("batch", max=64), 2: torch.export.Dim("height", min=8, max=64)},)
    torch.export.save(torch.export.export(model, (torch.zeros(2, 3, 16, 8),), dynamic_shapes=dims), tmp_path / "a.pt2")
    x = torch.randn(1, 3, 21, 8)
    found = load_exported_program(tmp_path / "a.pt2", trusted=False).module()(x)
    assert torch.equal(found["flat"], model(x)["flat"])
    assert torch.equal(found["pair"][0], model(x)["pair"][0])


def test_training_mode_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(net().train(), (torch.zeros(2, 3, 8, 8),)), tmp_path / "a.pt2")
    with pytest.raises(ModelError, match=r"training mode.*model\.eval"):
        load_exported_program(tmp_path / "a.pt2", trusted=False)


def test_what_we_write_is_data_and_computes_the_same_for_any_batch(tmp_path: Path) -> None:
    model = net().train()
    path = save_program(model, tmp_path / "a.pt2", torch.zeros(1, 3, 8, 8))
    assert all(module.training for module in model.modules())
    with zipfile.ZipFile(path) as archive:
        documents = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
        assert not any(b'"use_pickle": true' in document for document in documents)
        assert not any(name.endswith(".pkl") for name in archive.namelist())
    back = opened(load_exported_program(path, trusted=False))
    for n in (1, 2, 5):
        x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
        assert torch.equal(back(x), model.eval()(x))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_written_as_a_program_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be written to .*a\.pt2.*safetensors"):
        save_program(Branches(), tmp_path / "a.pt2", torch.zeros(1, 3))
    with pytest.raises(UsageError, match="example_inputs"):
        save_program(net(), tmp_path / "a.pt2", None)
    assert not list(tmp_path.iterdir())
