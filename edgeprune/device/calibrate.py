"""Fits a profile to a board that can be measured: small networks that tell kernel kinds apart, run there by the measuring protocol.

Each probe is a chain of one kernel kind at one size, a block as real networks have it, or a whole network; families are (kind,
channels), so the error that is reported is that of sizes the fit has not seen. What was measured is kept after every probe: a
calibration that is interrupted goes on where it was. Widths are measured apart, one by one, for the staircase: how fast a channel is at
which width.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeprune.device.card import Device, Precision, Profile, Staircase
from edgeprune.device.card import device as find_device
from edgeprune.device.connection import Connection
from edgeprune.device.fit import COLUMNS, Fitted, Prior, Sample, constants_of, fit_profile, refine
from edgeprune.device.fleet import shared
from edgeprune.device.kernels import FLOAT_BYTES, KernelsAt, kernels
from edgeprune.device.measure import QUICK, Measurement, Schedule, measure_on
from edgeprune.errors import DeviceError
from edgeprune.graph.trace import trace

if TYPE_CHECKING:
    from edgeprune.quantize.quantizer import BitQuantizer

Progress = Callable[[str, int, int], None]
FORMATS = {"onnxruntime": "onnx", "litert": "tflite"}
# (kernel side, groups); 0 groups: one per channel
_CONVS = {"conv1x1": (1, 1), "conv3x3": (3, 1), "conv_other": (5, 1), "depthwise": (3, 0), "depthwise_large": (5, 0), "grouped": (3, 8)}
_SIZES = ((32, 32), (64, 14), (128, 28), (256, 14))
ANCHORS = ("mobile", "residual")  # whole networks, of reference.py
_STEM_CHANNELS = 4
_LEAST_BYTE_NS = 0.002  # 500 bytes a nanosecond: more than the first-level cache of any core gives
_MEMORY = ("activation", "elementwise", "scale", "pool", "cat", "resize")
# As for the compress loop, with as few processes as give an interval: many networks matter more than the interval of each.
_SCHEDULE: Schedule = {**QUICK, "processes": 3}
# A width is as good as another when its time per channel is within this share of it.
_SAME_SPEED = 0.02
_EXPORTING = threading.Lock()  # torch's random state, and the exporters', belong to the process
STAIRCASE_WIDTHS, STAIRCASE_SIDES, STAIRCASE_KINDS = tuple(range(40, 73, 4)), (14, 28), ("conv1x1", "conv3x3", "depthwise")


@dataclass(frozen=True)
class Probe:
    """One network to measure: `depth` links of a kernel kind with `channels` at `side` x `side`, a "block", "linear" or an anchor."""

    kind: str
    channels: int
    side: int
    depth: int = 4

    @property
    def name(self) -> str:
        """conv3x3-64x14x4."""
        return f"{self.kind}-{self.channels}x{self.side}x{self.depth}"

    def build(self) -> tuple[nn.Module, Tensor]:
        """(the network, an example input); its weights are the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.kind in ANCHORS:
                from edgeprune.reference import reference

                return reference(self.kind)[:2]
            links = [_link(self.kind, self.channels) for _ in range(self.depth)]
            # Kernels that only move memory are met behind a convolution, in the layout that it leaves.
            stem = [nn.Conv2d(_STEM_CHANNELS, self.channels, 1)] if self.kind in _MEMORY else []
            read = _STEM_CHANNELS if stem else self.channels
            shape = (1, read) if self.kind == "linear" else (1, read, self.side, self.side)
            return nn.Sequential(*stem, *links).eval(), torch.rand(shape)


def probes(quick: bool) -> tuple[Probe, ...]:
    """The networks of a calibration: about 50, or 14 for a quick one."""
    anchors = [Probe(kind, 3, 32, 1) for kind in ANCHORS]
    if quick:
        convs = [Probe(kind, 64, 14) for kind in ("conv1x1", "conv3x3", "depthwise")]
        convs += [Probe(kind, 128, 28) for kind in ("conv1x1", "conv3x3")]
        rest = [Probe("elementwise", 64, 28, 6), Probe("activation", 64, 28, 6), Probe("pool", 64, 28), Probe("linear", 512, 1, 3)]
        return (*convs, *rest, Probe("block", 32, 28), Probe("block", 96, 14), Probe("conv3x3", 16, 8, 2), *anchors)
    convs = [Probe(kind, c, s) for kind in _CONVS for c, s in _SIZES]
    memory = [Probe(kind, c, s, 6) for kind in _MEMORY for c, s in ((16, 32), (64, 28), (128, 28))]
    linear = [Probe("linear", c, 1, 3) for c in (128, 512, 1024)]
    blocks = [Probe("block", c, s) for c, s in ((16, 56), (32, 28), (96, 14), (192, 7))]
    return (*convs, *memory, *linear, *blocks, *anchors)


def calibrate(
    device: Device, *, quick: bool = False, precision: Precision | None = None, store: Path, progress: Progress = lambda *_: None
) -> Fitted:
    """A profile for `device`, which must be attached, fitted to networks measured there; the present profile is the prior.

    `precision`: of the networks that are measured, by default the profile's own; int8 ones are quantized as `--quantize int8` does.
    A board without a profile starts from that of a Raspberry Pi 4. Measurements are kept in `store` (JSON), and what is there is not
    measured again; several hosts share them. A full calibration also measures the staircase. Takes about 5 s a network, 50 of them and
    54 widths, or 14 networks with `quick`. Raises DeviceError for a device that is not attached, and for hosts of different kinds.
    """
    if not device.attached:
        raise DeviceError(f"{device.profile} is not attached, so there is nothing to calibrate it by: give --host user@board.")
    present, chosen = start(device, precision), probes(quick)
    everything = [_sample(probe, ms) for probe, ms in _measured(device, present, chosen, store, "networks", progress=progress)]
    samples = [sample for sample in everything if _was_run(sample)]
    absent = ", ".join(sample.network for sample in everything if not _was_run(sample))
    shape = dict(zip(COLUMNS, constants_of(present).tolist(), strict=True))
    prior = Prior(shape, 0.1 if quick else 0.01, present.cache_bytes)
    kept = ("runtime", "threads", "precision", "clock_mhz", "description", "power", "memory", "input_block", "output_block")
    facts = {key: getattr(present, key) for key in kept}
    where = f"{device.name} at {' and '.join(device.hosts)}" if device.host else device.name
    prior_words = f"constants drawn to those of {device.profile} before; interval: split conformal"
    words = {
        "source": f"{len(samples)} small {'' if present.precision == 'fp32' else f'{present.precision} '}networks measured on {where}"
        + (f"; left out, as faster than their bytes can be moved (the runtime skips them): {absent}" if absent else ""),
        "method": f"nonnegative least squares on relative errors, {prior_words}",
        "held_out": "networks of unseen kinds and widths, five folds",
    }
    made = fit_profile(samples, prior, facts, words)
    if quick:
        return made
    steps = staircase(device, present, store=store, progress=progress)
    return Fitted(made.profile.model_copy(update={"staircase": steps}), made.held_out_ms, made.covered)


def start(device: Device, precision: Precision | None = None) -> Profile:
    """What a calibration starts from: the present profile; for a board that has none, a Raspberry Pi 4's constants as its own."""
    if device.predicts:
        present = device.constants
        if precision in (None, present.precision):
            return present
        words = {"description": present.description.replace(present.precision, str(precision)), "precision": precision}
        return present.model_copy(update={**words, "staircase": None, "input_block": 1, "output_block": 1})
    if precision == "int8":
        raise DeviceError(f"{device.name} has no profile to start from: calibrate it in fp32 first.")
    board, description = device.card.board, f"ONNX Runtime, fp32, {device.threads} thread(s)"
    own = {"threads": device.threads, "clock_mhz": board.clock_mhz, "description": description, "power": None, "staircase": None}
    return find_device("rpi4-ort").constants.model_copy(update=own)


def staircase(device: Device, present: Profile, *, store: Path, progress: Progress = lambda *_: None) -> Staircase:
    """Milliseconds against width for kinds of convolution and sizes, and the multiple of channels that is fastest per channel."""
    chosen = [Probe(kind, width, side, 3) for kind in STAIRCASE_KINDS for side in STAIRCASE_SIDES for width in STAIRCASE_WIDTHS]
    ms = dict(_measured(device, present, chosen, store, "widths", progress=progress))
    rows = {f"{k} {s}": tuple(ms[Probe(k, w, s, 3)] for w in STAIRCASE_WIDTHS) for k in STAIRCASE_KINDS for s in STAIRCASE_SIDES}
    return Staircase(widths=STAIRCASE_WIDTHS, latency_ms=rows, channel_multiple=best_multiple(STAIRCASE_WIDTHS, list(rows.values())))


def best_multiple(widths: Sequence[int], rows: Sequence[Sequence[float]]) -> int:
    """The smallest multiple of channels whose widths are as fast per channel as those of any larger one, 4 to 16.

    A convolution is compared with the straight line through its own times, so that fixed costs do not favour wide layers.
    """
    w = np.array(widths, dtype=np.float64)
    above = []
    for row in rows:
        t = np.array(row)
        above.append(t / np.polyval(np.polyfit(w, t, 2), w))
    slow = np.mean(above, axis=0)
    means = {m: float(slow[w % m == 0].mean()) for m in (4, 8, 16) if (w % m == 0).sum() >= 2}
    best = min(means.values())
    return min(m for m, value in means.items() if value <= best + _SAME_SPEED)


def anchored(profile: Profile, path: Path) -> tuple[Profile, Any, Any, list[str]]:
    """(profile adapted to the measurements in a file, errors before, errors after, names); see `fit.refine`.

    The file is a JSON list of {"model": "timm:NAME", "torchvision:NAME", "pkg.mod:function" or "file.py:function", "input_shape":
    [1, 3, 224, 224], "latency_ms": 41.5}. Raises DeviceError for another content, and what loading a model raises.
    """
    from edgeprune.load import build_network

    try:
        entries = [(str(e["model"]), tuple(map(int, e["input_shape"])), float(e["latency_ms"])) for e in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DeviceError(
            f"the anchors in {path} cannot be used ({type(error).__name__}: {error}): it must be a JSON list of "
            '{"model": "timm:resnet18", "input_shape": [1, 3, 224, 224], "latency_ms": 41.5}.'
        ) from error
    samples = [Sample(name, name, ms, _kernels(build_network(name), torch.zeros(shape))) for name, shape, ms in entries]
    made, before, after = refine(profile, samples)
    return made, before, after, [name for name, _, _ in entries]


def _measured(
    device: Device, present: Profile, chosen: Sequence[Probe], store: Path, what: str, *, progress: Progress
) -> list[tuple[Probe, float]]:
    """The milliseconds of every probe: from the store, or measured now, by all hosts together, and put there."""
    known: dict[str, float] = json.loads(store.read_text()) if store.exists() else {}
    left = [probe for probe in chosen if probe.name not in known]
    kinds: dict[str, str] = {}
    progress(what, len(chosen) - len(left), len(chosen))
    for number, (probe, found, host) in enumerate(
        shared(device.hosts, left, lambda board, probe: _measurement(device, present, board, probe)), 1
    ):
        kinds[" with ".join(str(found.fingerprint[key]) for key in ("board", "cpu", "runtime"))] = host
        if len(kinds) > 1:
            raise DeviceError(f"the hosts are not of one kind, so they cannot share a calibration: {' and '.join(kinds)}.")
        # The fastest run where other programs had the CPU, because theirs is not the network's time.
        known[probe.name] = found.min_ms if found.problems else found.latency_ms
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(".tmp")
        partial.write_text(json.dumps(known, indent=0))
        partial.replace(store)
        progress(what, len(chosen) - len(left) + number, len(chosen))
    return [(probe, known[probe.name]) for probe in chosen]


def _measurement(device: Device, present: Profile, board: Connection, probe: Probe) -> Measurement:
    from edgeprune.export import export

    form = FORMATS.get(present.runtime)
    if form is None:
        raise DeviceError(
            f"{device.profile} runs {present.runtime}, for which nothing is exported: {' and '.join(FORMATS)} can be calibrated."
        )
    with tempfile.TemporaryDirectory() as folder:
        with _EXPORTING:
            network, example = probe.build()
            quantizer = _quantizer(example) if present.precision == "int8" else None
            artifact = export(network, example, Path(folder) / "probe", format=form, quantizer=quantizer)
        return measure_on(board, artifact.path, threads=device.threads, **_SCHEDULE)


def _quantizer(example: Tensor) -> BitQuantizer:
    """Calibrated on noise: how fast int8 kernels are does not depend on what they compute."""
    from edgeprune.data import Preprocessing, Split
    from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages
    from edgeprune.sources import Arrays

    noise = np.random.default_rng(0).random((8, *example.shape[1:]), dtype=np.float32)
    split = Split(Arrays("noise", noise), None, np.arange(len(noise)), Preprocessing(None, None, (1, 1)))
    return BitQuantizer(CalibrationImages(split), variants=("plain",), least_sqnr_db=-np.inf)


def _sample(probe: Probe, latency_ms: float) -> Sample:
    return Sample(probe.name, f"{probe.kind}-{probe.channels}", latency_ms, _kernels(*probe.build()))


def _was_run(sample: Sample) -> bool:
    """False for a network that a converter or runtime reduced to nothing: its time says nothing about its kernels."""
    at = sample.at
    moved = FLOAT_BYTES * float((at.input_elements + at.output_elements + at.weight_elements).sum())
    return sample.latency_ms * 1e6 > moved * _LEAST_BYTE_NS


def _kernels(network: nn.Module, example: Tensor) -> KernelsAt:
    graph = trace(network.eval(), example)
    return kernels(graph).at(graph.dense_widths)


def _link(kind: str, channels: int) -> nn.Module:
    if kind in _CONVS:
        side, groups = _CONVS[kind]
        return nn.Sequential(nn.Conv2d(channels, channels, side, 1, side // 2, groups=groups or channels), nn.ReLU())
    if kind == "linear":
        return nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
    if kind == "block":
        return _Block(channels)
    return {"activation": nn.SiLU(), "pool": nn.AvgPool2d(3, 1, 1)}.get(kind, _Memory(kind))


class _Block(nn.Module):
    """An inverted residual, as mobile networks have them: kinds in the mix in which they meet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1), nn.ReLU(), nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.ReLU(), nn.Conv2d(wide, channels, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Memory(nn.Module):
    """Kernels that only move memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        if self.kind == "elementwise":
            return x + y
        if self.kind == "scale":
            return x * y.mean((2, 3), keepdim=True)
        if self.kind == "cat":
            # Parts of both: what is one of the operands whole, converters take from there.
            return torch.cat([x, y], 1)[:, x.shape[1] // 2 : -(x.shape[1] // 2)]
        return nn.functional.avg_pool2d(nn.functional.interpolate(y, scale_factor=2.0), 2)
