from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeprune.errors import ModelError
from edgeprune.graph.exported import Exported
from edgeprune.graph.portable import load, save
from edgeprune.graph.slim import slim
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import NETWORKS, build, images, outputs, random_plan


def thinner(model: nn.Module, name: str, seed: int = 0) -> tuple[nn.Module, Plan]:
    graph = trace(model, images(name))
    plan = random_plan(graph, seed)
    return slim(model, graph, plan), plan


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(t, theirs[k]) and t.dtype == theirs[k].dtype for k, t in mine.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    small, plan = thinner(build(name), name)
    assert save(small, tmp_path / "small.safetensors", plan=plan) == tmp_path / "small.safetensors"
    dense = build(name, seed=9)
    before = copy.deepcopy(dense.state_dict())
    back = load(tmp_path / "small.safetensors", model=dense)
    assert type(back) is type(dense) or (isinstance(back, Exported) and isinstance(small, Exported))
    assert same(small, back)
    assert all(torch.equal(t, before[k]) for k, t in dense.state_dict().items())
    for a, b in zip(outputs(small, images(name, 2)), outputs(back, images(name, 2)), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("name", ["residual", "literal_flatten", "squeeze_excite", "two_in_two_out"])
def test_a_whole_network_needs_no_source_code(name: str, tmp_path: Path) -> None:
    small, _ = thinner(build(name), name)
    back = load(save(small, tmp_path / "small.pt2", example_inputs=images(name)))
    assert isinstance(back, Exported) and not back.training
    for n in (1, 2, 5):
        for a, b in zip(outputs(small, images(name, n)), outputs(back, images(name, n)), strict=True):
            assert torch.equal(a, b)
    graph = trace(back, images(name))
    smaller = slim(back, graph, random_plan(graph, 1))
    assert trace(smaller, images(name)).macs < graph.macs == trace(small, images(name)).macs


def test_weights_need_their_network(tmp_path: Path) -> None:
    small, _ = thinner(build("plain"), "plain")
    with pytest.raises(ModelError, match="model="):
        load(save(small, tmp_path / "small.safetensors"))


def test_pruned_twice_loads_like_pruned_once(tmp_path: Path) -> None:
    once, _ = thinner(build("squeeze_excite"), "squeeze_excite", 1)
    twice, plan = thinner(once, "squeeze_excite", 2)
    save(twice, tmp_path / "twice.safetensors", plan=plan)
    back = load(tmp_path / "twice.safetensors", model=build("squeeze_excite", seed=3))
    assert same(twice, back)
    assert trace(back, images("squeeze_excite")).macs == trace(twice, images("squeeze_excite")).macs


def test_shared_weights_are_shared_again(tmp_path: Path) -> None:
    small, _ = thinner(build("twice"), "twice")
    back: Any = load(save(small, tmp_path / "x.safetensors"), model=build("twice", seed=2))
    assert back.body.left.weight is back.body.right.weight


def test_half_precision_and_non_contiguous_weights(tmp_path: Path) -> None:
    small, _ = thinner(build("plain"), "plain")
    small = small.to(memory_format=torch.channels_last).half()  # type: ignore[call-overload]
    assert same(small, load(save(small, tmp_path / "x.safetensors"), model=build("plain")))


def test_the_header_says_what_it_is_and_nothing_is_pickled(tmp_path: Path) -> None:
    small, plan = thinner(build("plain"), "plain")
    raw = save(small, tmp_path / "x.safetensors", plan=plan).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    recipe = json.loads(raw[8 : 8 + length])["__metadata__"]
    assert recipe["format"] == "edgeprune-1"
    assert recipe["class"] == "tests.networks.Head"
    assert Plan.from_json(json.loads(recipe["plan"])) == plan
    payload = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    assert len(raw) == 8 + length + payload, "weights and the header, nothing else"
    assert not zipfile.is_zipfile(tmp_path / "x.safetensors")


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = save(thinner(build("plain"), "plain")[0], tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"does not belong to Head: .* missing .* unknown"):
        load(path, model=build("residual"))
    vectors = nn.Sequential(nn.Linear(3, 2))
    path = save(vectors, tmp_path / "linear.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight has 2 dimensions"):
        load(path, model=nn.Sequential(nn.Conv2d(3, 2, 1)))


def test_truncated_foreign_and_absent_files_are_refused(tmp_path: Path) -> None:
    path = save(thinner(build("plain"), "plain")[0], tmp_path / "x.safetensors")
    whole = path.read_bytes()
    for cut in (0, 4, 50, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="cannot be read"):
            load(path, model=build("plain"))
    path.write_bytes(whole + b"tail")
    with pytest.raises(ModelError, match="cannot be read"):
        load(path, model=build("plain"))
    torch.save(build("plain").state_dict(), path)
    with pytest.raises(ModelError, match="cannot be read"):
        load(path, model=build("plain"))
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"not written by edgeprune\.save"):
        load(path, model=build("plain"))
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "absent.safetensors", model=build("plain"))


def test_a_tampered_shape_does_not_pass_for_the_network(tmp_path: Path) -> None:
    path = save(thinner(build("plain"), "plain")[0], tmp_path / "x.safetensors")
    tensors = load_file(path)
    tensors["fc.weight"] = tensors["fc.weight"][:, :-1].contiguous()
    save_file(tensors, path, metadata={"format": "edgeprune-1"})
    back = load(path, model=build("plain"))
    with pytest.raises(RuntimeError):
        outputs(back, images("plain"))
