from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeprune.errors import ModelError
from edgeprune.graph.exported import Exported
from edgeprune.graph.portable import load, save
from edgeprune.graph.slim import slim
from edgeprune.graph.symbolic import Symbolic, symbolic
from edgeprune.graph.trace import trace
from edgeprune.plan import Plan
from tests.networks import NETWORKS, build, images, outputs, random_plan

ROOT = Path(__file__).parents[2]
PUBLIC = [f"torchvision:{name}" for name in ("resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small")]
PUBLIC += [f"timm:{name}" for name in ("resnet18", "mobilenetv3_small_050", "efficientnet_b0", "ghostnet_050")]


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
    assert type(back) is type(dense) or any(isinstance(back, kind) and isinstance(small, kind) for kind in (Exported, Symbolic))
    assert same(small, back)
    assert repr(small) == repr(back), "the sizes that layers remember"
    assert all(p.data_ptr() % 64 == 0 for p in back.parameters()), "elsewhere other kernels compute it, with other roundings"
    assert all(torch.equal(t, before[k]) for k, t in dense.state_dict().items())
    for a, b in zip(outputs(small, images(name, 2)), outputs(back, images(name, 2)), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


@pytest.mark.parametrize("name", ["residual", "bottleneck", "option_a", "mobile", "sum_and_slice", "attention"])
def test_networks_without_branches_come_back(name: str, tmp_path: Path) -> None:
    """Without them and thinned, in one step and in two, whichever comes first; from a fresh dense network and from themselves."""
    model = build(name)
    graph = trace(model, images(name))
    empty = dict.fromkeys(graph.branches, ())
    for first in ({}, random_plan(graph, 2).keep, {**random_plan(graph, 2).keep, **empty}, empty):
        small = slim(model, graph, Plan(first))
        later = trace(small, images(name))
        half = Plan.uniform(later, 0.5).keep
        for then in (half, {**half, **dict.fromkeys(later.branches, ())}):
            smaller = slim(small, later, Plan(then))
            file = save(smaller, tmp_path / "small.safetensors", plan=Plan(then))
            back = load(file, model=build(name, seed=9))
            assert same(smaller, back) and same(smaller, load(file, model=back))
            assert all(torch.equal(a, b) for a, b in zip(outputs(smaller, images(name)), outputs(back, images(name)), strict=True))


def test_a_network_without_branches_needs_no_source_code(tmp_path: Path) -> None:
    model = build("residual")
    graph = trace(model, images("residual"))
    small = slim(model, graph, Plan(dict.fromkeys(graph.branches, ())))
    back = load(save(small, tmp_path / "small.pt2", example_inputs=images("residual")))
    assert torch.equal(outputs(back, images("residual", 3))[0], outputs(small, images("residual", 3))[0])
    dense = load(save(model, tmp_path / "dense.pt2", example_inputs=images("residual")))
    written = trace(dense, images("residual"))
    assert set(written.branches) == set(graph.branches), "of exported operations branches can go, too"
    file = save(slim(dense, written, Plan(dict.fromkeys(graph.branches, ()))), tmp_path / "small.safetensors")
    assert torch.equal(outputs(load(file, model=dense), images("residual"))[0], outputs(small, images("residual"))[0])


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


def test_the_header_names_a_class_that_there_is(tmp_path: Path) -> None:
    written = symbolic(build("plain"), ())
    written.meta["slimmed"] = []
    with safe_open(save(written, tmp_path / "x.safetensors"), framework="pt") as tensors:
        assert tensors.metadata()["class"] == "edgeprune.graph.symbolic.Symbolic"


class Layers(nn.Module):
    """Layers that remember sizes, or own tensors that are no parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(width, affine=False), nn.InstanceNorm2d(width, affine=True, track_running_stats=True), nn.PReLU(width)]
        )
        self.register_buffer("scale", 0.5 + torch.rand(width, 1, 1))
        self.register_buffer("shift", torch.rand(width, 1, 1), persistent=False)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm in self.norms:
            x = norm(x) * self.scale + self.shift
        out: Tensor = self.head(x)
        return out


def test_layers_that_remember_sizes_and_buffers(tmp_path: Path) -> None:
    model, x = Layers().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    small: Any = slim(model, graph, Plan.uniform(graph, 0.5))
    assert small.norms[0].num_features == small.norms[1].num_features == small.norms[2].num_parameters == 4
    back: Any = load(save(small, tmp_path / "x.safetensors"), model=Layers())
    assert repr(back) == repr(small)
    assert torch.equal(back.shift, small.shift), "a buffer that no state dict holds"
    assert torch.equal(outputs(small, (x,))[0], outputs(back, (x,))[0])


def test_embeddings_remember_their_size(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Embedding(10, 5), nn.Linear(5, 3))
    back = load(save(small, tmp_path / "x.safetensors"), model=nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3)))
    assert repr(back) == repr(small)
    assert torch.equal(small(torch.arange(10)), back(torch.arange(10)))


@pytest.mark.parametrize("name", ["residual", "grouped", "twice", "attention"])
def test_a_loaded_network_trains(name: str, tmp_path: Path) -> None:
    small, plan = thinner(build(name), name)
    back = load(save(small, tmp_path / "x.safetensors", plan=plan), model=build(name, seed=5)).train()
    before = copy.deepcopy(back.state_dict())
    optimizer = torch.optim.SGD(back.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(back(*images(name, 8)), torch.arange(8) % 5)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [k for k, t in back.state_dict().items() if torch.equal(t, before[k]) and k.endswith(("weight", "running_mean"))]
    assert still == []
    body: Any = back
    if name == "twice":
        assert body.body.left.weight is body.body.right.weight
    assert same(back, load(save(back, tmp_path / "later.safetensors"), model=build(name)))


def test_what_is_frozen_in_the_fresh_network_stays_frozen(tmp_path: Path) -> None:
    small, _ = thinner(build("plain"), "plain")
    fresh = build("plain").requires_grad_(False)
    fresh.get_submodule("fc").requires_grad_(True)
    back = load(save(small, tmp_path / "x.safetensors"), model=fresh)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {"fc.weight", "fc.bias"}


def test_a_loaded_network_can_be_pruned_again(tmp_path: Path) -> None:
    once, plan = thinner(build("inception"), "inception", 1)
    loaded = load(save(once, tmp_path / "once.safetensors", plan=plan), model=build("inception", seed=4)).eval()
    twice, plan = thinner(loaded, "inception", 2)
    back = load(save(twice, tmp_path / "twice.safetensors", plan=plan), model=build("inception", seed=5))
    assert same(twice, back)
    assert trace(back, images("inception")).params < trace(once, images("inception")).params


def test_a_user_loads_in_code_of_their_own(tmp_path: Path) -> None:
    """Another process that knows the class and the file, nothing else."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Mine(nn.Module):\n    def __init__(self, width=16):\n        super().__init__()\n"
        "        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 24, 3), nn.ReLU())\n"
        "        self.head = nn.Linear(24, 5)\n    def forward(self, x):\n        return self.head(self.body(x).mean((2, 3)))\n"
    )
    code = {
        "prune": "graph = ep.trace(net.eval(), x); plan = ep.Plan.uniform(graph, 0.5); small = ep.slim(net, graph, plan)\n"
        "ep.save(small, 'small.safetensors', plan=plan); torch.save(small(x), 'answer.pt')\n",
        "use": "small = ep.load('small.safetensors', model=net).eval(); assert torch.equal(small(x), torch.load('answer.pt'))\n"
        "assert small.body[0].out_channels == 8 and type(small) is Mine\n"
        "small.train(); torch.optim.AdamW(small.parameters()); small(x.repeat(4, 1, 1, 1)).sum().backward()\n",
    }
    for part in code.values():
        text = f"import torch, edgeprune as ep\nfrom mine import Mine\nx = torch.ones(1, 3, 9, 9)\nnet = Mine()\n{part}"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("factory", PUBLIC)
def test_public_networks_come_back_bit_by_bit(factory: str, tmp_path: Path, torchvision: Any) -> None:
    library, _, name = factory.partition(":")
    create: Any = torchvision.models.get_model if library == "torchvision" else pytest.importorskip("timm").create_model
    dense, x = create(name, num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    graph = trace(dense, x)
    plan = random_plan(graph)
    small = slim(dense, graph, plan)
    back = load(save(small, tmp_path / "x.safetensors", plan=plan), model=create(name, num_classes=10))
    assert repr(back) == repr(small)
    assert torch.equal(outputs(small, (x,))[0], outputs(back, (x,))[0])
    optimizer = torch.optim.SGD(back.parameters(), lr=0.01)
    back.train()(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(outputs(small, (x,))[0], outputs(back, (x,))[0])


def test_another_network_is_refused(tmp_path: Path) -> None:
    path = save(thinner(build("plain"), "plain")[0], tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"does not belong to Head: .* missing .* unknown"):
        load(path, model=build("residual"))
    vectors = nn.Sequential(nn.Linear(3, 2))
    path = save(vectors, tmp_path / "linear.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight has 2 dimensions"):
        load(path, model=nn.Sequential(nn.Conv2d(3, 2, 1)))


Header = dict[str, Any]


def rewritten(path: Path, change: Callable[[Header], Any]) -> None:
    """The same weights behind another header."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: Header = json.loads(raw[8 : 8 + length])
    made = change(header)
    text = made if isinstance(made, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: b"{" * 100, "cannot be read"),
        (lambda h: b"[]", "cannot be read"),
        (lambda h: b" " * 110_000_000, "header too large"),
        (lambda h: h["fc.weight"].update(data_offsets=[0, 10**12]), "cannot be read"),
        (lambda h: h["fc.weight"].update(shape=[-5, 6]), "cannot be read"),
        (lambda h: h["fc.weight"].update(dtype="F9"), "cannot be read"),
        (lambda h: h.pop("fc.weight"), "cannot be read"),
        (lambda h: h.update(other=h.pop("fc.weight")), r"1 tensors are missing \(fc\.weight\), 1 are unknown \(other\)"),
        (lambda h: h["__metadata__"].update(format="edgeprune-2"), "not written by"),
        (lambda h: h.pop("__metadata__"), "not written by"),
        (lambda h: h["fc.weight"].update(dtype="I64"), r"fc\.weight holds int64 where the network has float64"),
        (lambda h: h["fc.weight"].update(shape=h["fc.weight"]["shape"][::-1]), r"fc\.weight has the shape \(6, 5\), which is no part"),
        (lambda h: h["fc.weight"].update(shape=[30]), r"fc\.weight has 1 dimensions"),
    ],
)
def test_hostile_headers_are_refused_in_one_paragraph(change: Callable[[Header], Any], text: str, tmp_path: Path) -> None:
    path = save(build("plain"), tmp_path / "x.safetensors")
    rewritten(path, change)
    with pytest.raises(ModelError, match=text) as refused:
        load(path, model=build("plain"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path, model=build("plain"))


def test_other_kernels_and_norms_of_two_lengths_are_refused(tmp_path: Path) -> None:
    path = save(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight has a kernel of \(3, 3\), the network's has \(5, 5\)"):
        load(path, model=nn.Sequential(nn.Conv2d(3, 8, 5, padding=2)))
    save(nn.Sequential(nn.BatchNorm2d(8)), path)
    tensors = load_file(path)
    tensors["0.bias"] = tensors["0.bias"][:5].contiguous()
    save_file(tensors, path, metadata={"format": "edgeprune-1"})
    with pytest.raises(ModelError, match=r"tensors of 0 have different lengths \(weight 8, bias 5, running_mean 8, running_var 8\)"):
        load(path, model=nn.Sequential(nn.BatchNorm2d(8)))


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
