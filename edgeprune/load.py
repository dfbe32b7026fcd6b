"""From a file to a network that runs: a module in eval mode and an example input, read the safe way.

Nothing in a file is executed unless the caller says so (`trust_pickle`): weights are read with weights_only, exported programs are
checked first (pt2.py), TorchScript is refused. The network's code comes from the user's own factory.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.errors import EdgepruneError, ModelError, UsageError
from edgeprune.graph.exported import opened
from edgeprune.graph.running import few_collections
from edgeprune.pt2 import is_exported_program, load_exported_program
from edgeprune.run import hash_file

DEFAULT_SHAPE = (1, 3, 224, 224)
WRAPPERS = ("state_dict", "model", "model_state_dict", "ema", "state_dict_ema", "model_ema")
PREFIXES = ("module.", "_orig_mod.")  # added by DataParallel and torch.compile
NAMED = 3  # keys of each kind that an error names

State = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network ready to be traced. `notes` says what was done to the file's content on the way (unwrapped, renamed)."""

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    name: str
    sha256: str
    factory: str | None
    notes: tuple[str, ...]


@few_collections()
def load_model(
    path: str | Path, *, factory: str | None = None, input_shape: tuple[int, ...] | None = None,
    sample_shape: tuple[int, ...] | None = None, trust_pickle: bool = False,
) -> LoadedModel:  # fmt: skip
    """The network of a file, on the CPU in eval mode, after one run on an example input.

    `path`: a state dict (.pt, .pth, .th, .safetensors) with `factory` ("pkg.mod:function", "path/to/file.py:function", "timm:NAME",
    "torchvision:NAME"), an exported program (.pt2), or, only with `trust_pickle`, a pickled nn.Module, because unpickling executes code.
    The example is (1, …): `input_shape`, else `sample_shape` (one image of the data), else what the network says of itself (an exported
    program's example, a timm configuration), else 1, 3, 224, 224. Raises ModelError for files and networks that do not work,
    UsageError for options that do not fit together.
    """
    path = Path(path)
    kind = _kind(path)
    notes: list[str] = []
    shape = input_shape or sample_shape
    if kind == "exported program":
        if factory:
            raise UsageError(f"{path} is an exported program, which carries its own network: leave --model out.")
        program = load_exported_program(path, trusted=trust_pickle)
        model: nn.Module = opened(program)
        own_shape = _example_shape(program.example_inputs)
    else:
        content = _read_safetensors(path) if kind == "safetensors" else _read_pickle(path, trusted=trust_pickle)
        model = _build(path, content, factory, notes).cpu().eval()
        own_shape = _configured_shape(model)
    example = _example(shape or own_shape or DEFAULT_SHAPE)
    _try_out(model, example, path)
    return LoadedModel(model, (example,), _clean_name(path, factory), hash_file(path), factory, tuple(notes))


def resolve(spec: str, error: type[EdgepruneError] = UsageError) -> Any:
    """The object behind "pkg.mod:name" or "path/to/file.py:name"; the working directory is importable, as with `python -m`."""
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise error(f"{spec!r} does not name a function: write pkg.mod:function or path/to/file.py:function.")
    with user_code(f"importing {module_name}", error):
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else _import_module(module_name)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise error(f"{module_name} has no {part!r}: {spec!r} must name a function in it.")
        value = getattr(value, part)
    return value


@contextmanager
def user_code(what: str, error: type[EdgepruneError]) -> Iterator[None]:
    """Code that is not ours may raise anything: it comes out as `error` with one paragraph."""
    try:
        yield
    except EdgepruneError:
        raise
    except Exception as reason:
        raise error(
            f"{what} failed with {type(reason).__name__}: {_one_line(reason)}. Try it on its own in Python and repair it there."
        ) from reason


def _kind(path: Path) -> str:
    """What the file is, by its content; raises ModelError for what no network can come from."""
    if path.is_dir():
        raise ModelError(f"{path} is a folder: give the file with the network or its weights.")
    if not path.is_file():
        raise ModelError(f"the model file {path} does not exist; give the path of a .pt2, .pt, .pth or .safetensors file.")
    if not path.stat().st_size:
        raise ModelError(f"the model file {path} is empty: save or download it again.")
    if path.suffix == ".onnx":
        raise ModelError(
            f"{path} is an ONNX file, which cannot be pruned: give the network it was made from (a state dict with --model, or a .pt2)."
        )
    if path.suffix == ".safetensors":
        return "safetensors"
    names = _archive_names(path)
    if is_exported_program(names):
        return "exported program"
    if any(name.endswith("/constants.pkl") for name in names):
        raise ModelError(
            f"{path} is a TorchScript archive, whose compiled code cannot be pruned: export the original nn.Module with torch.export.save "
            "to a .pt2 file, or save its state dict and give --model pkg.mod:factory."
        )
    if path.suffix == ".pt2":
        raise ModelError(f"{path} is not an exported program (damaged, or not written by torch.export.save): write it again.")
    return "pickle"


def _archive_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []  # not a zip archive, or a damaged one: the reader says so


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, *, trusted: bool) -> Any:
    if trusted:
        with user_code(f"unpickling {path}", ModelError):
            return torch.load(path, map_location="cpu", weights_only=False)
    try:
        with warnings.catch_warnings():  # torch warns of old pickle protocols before it refuses them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if not found:
            raise _damaged(path, error) from error
        raise ModelError(
            f"{path} is a pickle that holds more than tensors ({found[1]}) and was not loaded, because unpickling executes "
            "code. Save a state dict instead (torch.save(model.state_dict(), path)) and give --model pkg.mod:factory, or export to .pt2; "
            "if you trust where the file comes from, use --trust-pickle."
        ) from error
    except Exception as error:  # on damaged bytes torch's reader raises whatever it stumbles over
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} is damaged, cut off, or not a model file ({_one_line(error)}): save or download it again.")


def _build(path: Path, content: Any, factory: str | None, notes: list[str]) -> nn.Module:
    """The pickled module, or the factory's network with the file's weights."""
    content = _unwrap(path, content, notes)
    if isinstance(content, torch.jit.ScriptModule):
        raise ModelError(
            f"{path} holds a TorchScript module, whose compiled code cannot be pruned: save the original nn.Module's state dict."
        )
    if isinstance(content, nn.Module):
        if factory:
            raise UsageError(f"{path} holds a whole network: leave --model out, or save its state dict to use the factory {factory}.")
        return content
    state = _strip_prefixes(content, notes)
    if not factory:
        raise UsageError(
            f"{path} holds weights but no network ({len(state)} tensors, {next(iter(state))!r} first): say what builds it with "
            "--model pkg.mod:factory, path/to/file.py:factory, timm:NAME or torchvision:NAME."
        )
    model = build_network(factory)
    _load_weights(model, state, f"{path} and the factory {factory}", notes)
    return model


def _unwrap(path: Path, content: Any, notes: list[str]) -> Any:
    """The state dict or module inside the dictionaries that training scripts wrap around it."""
    while isinstance(content, Mapping) and not (content and all(isinstance(v, Tensor) for v in content.values())):
        found = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping | nn.Module)), None)
        if found is None:
            if any(isinstance(value, Tensor) for value in content.values()):
                return {key: value for key, value in content.items() if isinstance(value, Tensor)}
            keys = ", ".join(map(repr, list(content)[:5])) or "nothing"
            raise ModelError(
                f"{path} holds no weights that are known ({keys}): they are looked for at the top and under {', '.join(WRAPPERS)}."
            )
        notes.append(f"took the weights under {found!r}")
        content = content[found]
    if not isinstance(content, Mapping | nn.Module):
        raise ModelError(f"{path} holds {type(content).__name__}, neither a state dict nor a network: save model.state_dict().")
    return content


def _strip_prefixes(state: State, notes: list[str]) -> State:
    while prefix := next((p for p in PREFIXES if all(str(key).startswith(p) for key in state)), None):
        notes.append(f"removed the prefix {prefix!r} from every key")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def build_network(factory: str) -> nn.Module:
    """The network that pkg.mod:function, file.py:function, timm:NAME or torchvision:NAME builds. Raises UsageError, ModelError."""
    source, _, name = factory.partition(":")
    if source in ("timm", "torchvision"):
        model = _library_model(source, name)
    else:
        function = resolve(factory)
        if not callable(function):
            raise UsageError(f"the factory {factory} is {type(function).__name__}, not a function that builds the network.")
        with user_code(f"the factory {factory}", ModelError):
            model = function()
    if not isinstance(model, nn.Module):
        raise ModelError(f"the factory {factory} returned {type(model).__name__}, not an nn.Module.")
    return model


def _library_model(library: str, name: str) -> Any:
    if importlib.util.find_spec(library) is None:
        raise UsageError(f"--model {library}:{name} needs the package {library}: install it, or give pkg.mod:factory.")
    with user_code(f"building {library}:{name}", ModelError):
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=False)
        import torchvision

        return torchvision.models.get_model(name, weights=None)


def _load_weights(model: nn.Module, state: State, what: str, notes: list[str]) -> None:
    """Copies the weights in; every key must be there with its shape, batch counters excepted (old files lack them)."""
    own = model.state_dict()
    missing = [key for key in own if key not in state and isinstance(own[key], Tensor)]
    counters = [key for key in missing if key.endswith("num_batches_tracked")]
    missing = [key for key in missing if key not in counters]
    unexpected = [key for key in state if key not in own]
    misshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in own if key in state and state[key].shape != own[key].shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    if any(found.values()):
        text = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:NAMED])}{', …' if len(keys) > NAMED else ''})" for kind, keys in found.items() if keys
        )
        raise ModelError(f"the weights of {what} do not fit together: {text}. Give the factory the network was trained with.")
    if broken := next((key for key, value in state.items() if value.is_floating_point() and not _finite(value)), None):
        raise ModelError(f"the weights of {what} hold NaN or infinite values (first in {broken}): take an earlier checkpoint.")
    model.load_state_dict(state, strict=False)
    if counters:
        notes.append(f"{len(counters)} batch counters (num_batches_tracked) are not in the file")


def _finite(value: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity: both show in its extremes, which one pass finds."""
    if value.element_size() == 1:  # torch compares no float8
        value = value.float()
    return not value.numel() or all(map(math.isfinite, torch.stack(value.detach().aminmax()).tolist()))


def _configured_shape(model: nn.Module) -> tuple[int, ...] | None:
    for attribute in ("pretrained_cfg", "default_cfg"):
        size = (getattr(model, attribute, None) or {}).get("input_size")
        if size:
            return (1, *map(int, size))
    return None


def _example_shape(example: tuple[tuple[Any, ...], dict[str, Any]] | None) -> tuple[int, ...] | None:
    """The shape of the one tensor a program was exported with, at batch 1."""
    first = example[0][0] if example and example[0] else None
    return (1, *first.shape[1:]) if isinstance(first, Tensor) else None


def _example(shape: tuple[int, ...]) -> Tensor:
    if len(shape) < 2 or shape[0] != 1 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UsageError(f"the input shape {','.join(map(str, shape))} must be a batch of one and positive sizes, such as 1,3,224,224.")
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _try_out(model: nn.Module, example: Tensor, path: Path) -> None:
    shape = ",".join(map(str, example.shape))
    try:
        with torch.no_grad():
            model(example)
    except Exception as error:
        channels = next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)  # what its first conv takes
        raise ModelError(
            f"the network of {path} fails on an input of shape {shape} ({type(error).__name__}: {_one_line(error)}): give the shape it was "
            f"trained with, for example --input-shape 1,{channels},32,32 (an exported program must take a batch of one)."
        ) from error


def _import_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes defined there must be found again, for example by copy and pickle
    spec.loader.exec_module(module)
    return module


def _clean_name(path: Path, factory: str | None) -> str:
    """The file's name without the hash that download tools append; the factory's where the file's says nothing."""
    stem = re.sub(r"-[0-9a-f]{8,}$", "", path.stem)
    if factory and stem.lower() in ("model", "best", "last", "checkpoint", "weights", "state_dict", "pytorch_model"):
        stem = re.split(r"[:.]", factory)[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:40] or "model"


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200].rstrip(".")


__all__ = ["LoadedModel", "hash_file", "load_model", "resolve", "user_code"]
