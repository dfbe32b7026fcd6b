"""Running somebody's network without leaving a trace in it: inputs, eval mode, outputs, errors."""

from __future__ import annotations

import copy
import gc
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from torch import fx


class Observer(TorchDispatchMode):
    """A dispatch mode that sees every operation of a network as it runs, also of one that went through torch.compile.

    torch would import its whole compiler (1.4 s) to keep it away from such a mode. Here nothing is imported, and a compiler that is
    there already is told to stand aside meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._eager = ExitStack()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __enter__(self) -> Self:
        if "torch._dynamo" in sys.modules:
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._eager.close()


def single_sample(example_inputs: Any) -> tuple[Any, ...]:
    """The forward's positional arguments with batches cut to their first sample."""
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    leaves = list(tensors_in(inputs))
    sizes = {t.shape[0] if t.ndim else 0 for t in leaves}
    images = any(t.ndim == 3 for a in inputs if isinstance(a, (list, tuple)) for t in tensors_in(a))  # detectors take lists of these
    if len(sizes) == 1 and sizes.pop() > 1 and not images:
        inputs = tree_map(lambda t: t[:1] if isinstance(t, Tensor) else t, inputs)
    return fresh(inputs)


def fresh(inputs: tuple[Any, ...], layout: torch.memory_format = torch.contiguous_format) -> tuple[Any, ...]:
    """Copies of the tensors, those of four dimensions in this memory format: a forward may write into what it is given."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone(memory_format=layout if value.ndim == 4 else torch.contiguous_format)

    copies: tuple[Any, ...] = tree_map(copied, inputs)
    return copies


def described(value: Any) -> Any:
    """Inputs as plain data: a tensor becomes {"shape": …, "dtype": …}; numbers, texts, lists, tuples and dicts stay what they are."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    return {"items": {key: described(item) for key, item in value.items()}} if isinstance(value, dict) else value


def made_up(description: Any) -> Any:
    """Inputs as `described` said: normal noise where the tensor holds fractions, zeros elsewhere."""
    if isinstance(description, list):
        return tuple(made_up(item) for item in description)
    if not isinstance(description, dict):
        return description
    if "items" in description:
        return {key: made_up(item) for key, item in description["items"].items()}
    dtype = getattr(torch, description["dtype"])
    noise = torch.randn(description["shape"], generator=torch.Generator().manual_seed(0))
    return noise.to(dtype) if dtype.is_floating_point else torch.zeros(description["shape"], dtype=dtype)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own flag back.

    By the flags alone: exported programs refuse `eval()`, and a network's own `train()` may do things that no flag undoes.
    """
    training = [(m, m.training) for m in model.modules()]
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole transformer layer says nothing about its channels
        for module, _ in training:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused_attention)
        for module, flag in training:
            module.training = flag


def layout_for(model: nn.Module, *inputs: Any) -> torch.memory_format:
    """channels_last, which is faster (benchmarks/training.py), unless the network views its maps as only contiguous memory allows.

    inputs: the forward's arguments for a few images, on the CPU.
    """
    if all(x.ndim != 4 for x in tensors_in(inputs)):
        return torch.contiguous_format
    try:
        with torch.no_grad(), evaluating(model):
            in_format(copy.deepcopy(model), torch.channels_last)(*fresh(inputs, torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def in_format(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The module itself, its 4-dimensional tensors in this memory format."""
    convert: Any = module.to  # torch's stubs lack this overload
    convert(memory_format=layout)
    return module


@contextmanager
def contiguous(model: nn.Module) -> Iterator[None]:
    """Contiguous weights for a while, whatever their layout.

    Operations are numbered as they run, and which ones run depends on the layout: of a channels_last map, a flatten makes a copy first.
    """
    found = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided and not t.is_contiguous()]
    try:
        for tensor, data in found:
            tensor.data = data.contiguous()
        yield
    finally:
        for tensor, data in found:
            tensor.data = data


@contextmanager
def few_collections() -> Iterator[None]:
    """Full garbage collections wait, for work whose objects mostly stay.

    One pass over everything that torch has imported takes longer than tracing a small network.
    """
    pace = gc.get_threshold()
    gc.set_threshold(*pace[:2], 1_000_000)
    try:
        yield
    finally:
        gc.set_threshold(*pace)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Ignore the one deprecation torch 2.13 raises against itself when it copies or exports a captured program."""
    with warnings.catch_warnings():
        # torch.utils._pytree.LeafSpec warns whenever one is unpickled or tested, which torch.export and copy.deepcopy do.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        yield


@contextmanager
def silent_torch() -> Iterator[None]:
    """Keep the exporter's progress lines, dumped graphs and log records off the terminal."""
    handlers = [h for name in ("torch", "torch.onnx", "onnxscript") for h in logging.getLogger(name).handlers]
    levels = [h.level for h in handlers]
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def first_line(error: BaseException) -> str:
    """What an error says, on one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def operation_name(func: Any) -> str:
    """The name of a dispatched operation; an in-place variant has the name of the other one."""
    name: str = func.__name__.split(".")[0]
    return name if name.endswith("__") else name.rstrip("_")


def forget(graph: fx.Graph) -> None:
    """Drop what torch would keep for ever of a graph that it exported.

    The cache of what operations gave for its sizes and the tensors it was traced with hold the sizes that hold them, by ways that
    Python's collector does not see; torch's caches of answers about sizes hold the next 256 of them (checked in torch 2.13).
    """
    modes = {id(mode): mode for node in graph.nodes if (mode := getattr(node.meta.get("val"), "fake_mode", None)) is not None}
    for sizes in {id(mode.shape_env): mode.shape_env for mode in modes.values() if mode.shape_env is not None}.values():
        getattr(sizes, "fake_tensor_cache", {}).clear()  # torch's own affair, which another version may keep elsewhere
        sizes.tracked_fakes = None
        for method in vars(type(sizes)).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()
