import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeprune.errors import ModelError, UsageError
from edgeprune.load import hash_file, load_model

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def raising():
    raise RuntimeError("no such\\nluck")

def number():
    return 3

constant = 4
"""
CONFIGURED = """
def configured():
    model = net()
    model.pretrained_cfg = {"input_size": (3, 12, 14)}
    return model
"""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "factories", raising=False)
    return tmp_path


def wrapped(key: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {"epoch": 3, "best": 0.5, key: state}


@pytest.mark.parametrize(
    ("wrap", "notes"),
    [
        (dict, 0),
        (wrapped("state_dict"), 1),
        (wrapped("model"), 1),
        (wrapped("model_state_dict"), 1),
        (wrapped("ema"), 1),
        (lambda state: {"model": {"state_dict": state}}, 2),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, 1),
        (lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()}, 2),
        (lambda state: {k: v for k, v in state.items() if "batches" not in k}, 1),
    ],
)
@pytest.mark.parametrize("factory", ["factories:net", "factories.py:net"])
def test_state_dict(here: Path, wrap: Callable[[dict[str, Tensor]], Any], notes: int, factory: str) -> None:
    dense = net().eval()
    torch.save(wrap(dense.state_dict()), here / "tiny-0123abcd.th")
    loaded = load_model(here / "tiny-0123abcd.th", factory=factory, input_shape=(1, 3, 8, 8))
    (x,) = loaded.example_inputs
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(loaded.model(x), dense(x))
    assert not loaded.model.training
    assert (loaded.name, loaded.factory, len(loaded.notes)) == ("tiny", factory, notes)
    assert loaded.sha256 == hash_file(here / "tiny-0123abcd.th")


def test_safetensors_and_name_from_factory(here: Path) -> None:
    dense = net().eval()
    save_file(dense.state_dict(), here / "model.safetensors")
    loaded = load_model(here / "model.safetensors", factory="factories:net", sample_shape=(1, 3, 9, 9))
    assert loaded.example_inputs[0].shape == (1, 3, 9, 9)
    assert torch.equal(loaded.model.state_dict()["4.weight"], dense.state_dict()["4.weight"])
    assert loaded.name == "net"


def test_input_shape_goes_before_the_data_and_the_default(here: Path) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    assert load_model("a.pt", factory="factories:net", input_shape=(1, 3, 5, 6), sample_shape=(1, 3, 9, 9)).example_inputs[0].shape == (
        1,
        3,
        5,
        6,
    )
    assert load_model("a.pt", factory="factories:net").example_inputs[0].shape == (1, 3, 224, 224)


def test_network_knows_its_input_shape(here: Path) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    (here / "configured.py").write_text(FACTORY + CONFIGURED)
    assert load_model("a.pt", factory="configured.py:configured").example_inputs[0].shape == (1, 3, 12, 14)


def test_timm_name(here: Path) -> None:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # timm needs a torchvision that fits this torch
        pytest.skip(f"timm cannot be imported: {error}")
    torch.save(timm.create_model("lcnet_035").state_dict(), here / "a.pt")
    assert load_model("a.pt", factory="timm:lcnet_035").example_inputs[0].shape == (1, 3, 224, 224)
    with pytest.raises(ModelError, match="timm:no_such_net"):
        load_model("a.pt", factory="timm:no_such_net")


def test_missing_library(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs the package torchvision"):
        load_model("a.pt", factory="torchvision:resnet18")


def test_mismatch_names_keys_and_counts(here: Path) -> None:
    state = net().state_dict()
    state["4.weight"] = torch.zeros(2, 5)
    state["head.bias"] = state.pop("0.bias")
    torch.save(state, here / "a.pt")
    with pytest.raises(
        ModelError, match=re.escape("1 missing (0.bias); 1 unexpected (head.bias); 1 of another shape (4.weight (2, 5) for (2, 4))")
    ):
        load_model("a.pt", factory="factories:net")


def test_broken_weights(here: Path) -> None:
    state = net().state_dict()
    state["0.bias"][1] = torch.nan
    torch.save(state, here / "a.pt")
    with pytest.raises(ModelError, match=r"NaN or infinite.*0\.bias"):
        load_model("a.pt", factory="factories:net")


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (None, UsageError, "--model pkg.mod:factory"),
        ("factories", UsageError, "does not name a function"),
        ("no_such_module:net", UsageError, "no_such_module"),
        ("no_file.py:net", UsageError, "does not exist"),
        ("factories:no_such", UsageError, "has no 'no_such'"),
        ("factories:raising", ModelError, "RuntimeError: no such"),
        ("factories:number", ModelError, "returned int"),
        ("factories:constant", UsageError, "is int, not a function"),
    ],
)
def test_factory_errors(here: Path, factory: str | None, error: type[Exception], message: str) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    with pytest.raises(error, match=message) as caught:
        load_model("a.pt", factory=factory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8), (1, 0, 8, 8), (1,)])
def test_input_shape_must_be_a_batch_of_one(here: Path, shape: tuple[int, ...]) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    with pytest.raises(UsageError, match="batch of one"):
        load_model("a.pt", factory="factories:net", input_shape=shape)


def test_wrong_input_shape_is_named(here: Path) -> None:
    torch.save(net().state_dict(), here / "a.pt")
    with pytest.raises(ModelError, match=r"1,5,8,8.*--input-shape 1,3,32,32"):
        load_model("a.pt", factory="factories:net", input_shape=(1, 5, 8, 8))


def test_the_shape_to_try_has_the_channels_of_the_first_conv(here: Path) -> None:
    (here / "grey.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Conv2d(1, 2, 3)\n")
    torch.save(nn.Conv2d(1, 2, 3).state_dict(), here / "grey.pt")
    with pytest.raises(ModelError, match="--input-shape 1,1,32,32"):
        load_model("grey.pt", factory="grey.py:net", input_shape=(1, 3, 8, 8))


@pytest.mark.parametrize("suffix", [".pt", ".th", ".safetensors", ".pt2"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.97])
@pytest.mark.filterwarnings("default")  # torch may warn on its way to the error
def test_cut_off_files(here: Path, suffix: str, share: float) -> None:
    path = here / f"a{suffix}"
    save(net().eval(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"damaged|empty"):
        load_model(path, factory="factories:net", input_shape=(1, 3, 8, 8))


def save(model: nn.Module, path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    elif path.suffix == ".pt2":
        torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 8, 8),)), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=path.suffix == ".pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pt", None, "does not exist"),
        ("junk.pt", b"what is this?" * 50, "damaged"),
        ("zeros.th", bytes(4096), "damaged"),
        ("junk.safetensors", b"\xff" * 64, "damaged"),
        ("net.onnx", b"abc", "ONNX"),
    ],
)
def test_files_that_are_no_model(here: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(name, factory="factories:net")


def test_folder_is_no_model(here: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        load_model(here)


@pytest.mark.parametrize("content", [[1, 2], {"lr": 0.1}, {}, 3])
def test_content_that_is_no_model(here: Path, content: object) -> None:
    torch.save(content, here / "a.pt")
    with pytest.raises(ModelError, match=r"no weights|neither a state dict"):
        load_model("a.pt", factory="factories:net")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_does_not_run(here: Path, zipped: bool) -> None:
    canary = here / "canary"
    torch.save({"state_dict": Hostile(canary)}, here / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"executes code.*--trust-pickle"):
        load_model("evil.pt", factory="factories:net")
    assert not canary.exists()
    with pytest.raises(ModelError):
        load_model("evil.pt", factory="factories:net", trust_pickle=True)
    assert canary.exists()  # so the check above could have failed


def test_plain_hostile_pickle_does_not_run(here: Path) -> None:
    (here / "evil.pt").write_bytes(pickle.dumps(Hostile(here / "canary")))
    with pytest.raises(ModelError):
        load_model("evil.pt")
    assert not (here / "canary").exists()


def test_pickled_module_needs_trust(here: Path) -> None:
    dense = net().eval()
    torch.save({"model": dense}, here / "whole.pt")
    with pytest.raises(ModelError, match=r"torch\.nn.*executes code.*state dict"):
        load_model("whole.pt", input_shape=(1, 3, 8, 8))
    loaded = load_model("whole.pt", input_shape=(1, 3, 8, 8), trust_pickle=True)
    assert torch.equal(loaded.model(*loaded.example_inputs), dense(*loaded.example_inputs))
    with pytest.raises(UsageError, match="leave --model out"):
        load_model("whole.pt", factory="factories:net", trust_pickle=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning")
@pytest.mark.parametrize("trust", [True, False])
def test_torchscript_is_refused(here: Path, trust: bool) -> None:
    traced = torch.jit.trace(net().eval(), torch.zeros(1, 3, 8, 8))
    torch.jit.save(traced, str(here / "a.pt"))
    with pytest.raises(ModelError, match=r"TorchScript.*state dict"):
        load_model("a.pt", trust_pickle=trust)


def test_exported_program(here: Path) -> None:
    dense = net().eval()
    save(dense, here / "a.pt2")
    loaded = load_model("a.pt2")
    assert torch.equal(loaded.model(*loaded.example_inputs), dense(*loaded.example_inputs))
    assert loaded.example_inputs[0].shape == (1, 3, 8, 8)
    batch = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded.model(batch), dense(batch)), "it was exported for a batch of one"
    assert not any(module.training for module in loaded.model.modules())
    with pytest.raises(UsageError, match="leave --model out"):
        load_model("a.pt2", factory="factories:net")
