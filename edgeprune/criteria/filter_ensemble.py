"""Linear filter ensembles: random masks of channels, and a linear model of the loss on their bits.

Model: m in {0, 1}^d, one bit per removable channel, each on with probability p; L(m) = mean cross-entropy of the masked network on fixed
images; L(m) ~ w0 - sum_i theta_i m_i by (ridge) least squares. s_i = theta_i: the loss that having channel i avoids, in nats, averaged
over what else is on (a Banzhaf value at occupancy p). Negative where removing the channel helps; the sign is kept.
Facts: per fit R², standard errors, the ridge, and `reliability`, the share of the coefficients' variance that is not sampling error.
Cost: masks * images forwards. `scope="layer"` masks one group at a time, so that each fit has few unknowns and the layers below the
masked one need not be computed again; `scope="global"` masks all groups at once.
Source: Sándor, Pável, Csató, "Pruning CNN's with Linear Filter Ensembles", ECAI 2020, arXiv 2001.08142. We differ in: only the abstract
was readable. Masks, their losses and the additive model are the paper's; the occupancy, the number of masks, ridge by leave-one-out
error, scopes and the stopping rule are reconstructed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from edgeprune.criteria.probe import Probe
from edgeprune.errors import DataError, UsageError
from edgeprune.graph import ChannelGraph
from edgeprune.graph.masked import Batch, Bits, Masked, Prefix, mean_loss, summed_loss
from edgeprune.graph.running import fresh, layout_for, tensors_in
from edgeprune.plan import Scores
from edgeprune.train import Progress, silent

NEEDS = ("labels", "loss")
PAPER = "Sándor et al., Pruning CNN's with Linear Filter Ensembles, ECAI 2020, arXiv 2001.08142 (reconstructed from its abstract)"

Floats = NDArray[np.float64]
_Names = tuple[str, ...]
RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # as shares of the mean diagonal of the centred Gram matrix
PILOT_MASKS = 8
FIRST_MASKS = 32
CHUNK = 64  # masks that one worker judges at a time
KEPT_BYTES = 512 << 20  # activations held for one group


def score(
    graph: ChannelGraph,
    probe: Probe,
    *,
    scope: str = "layer",
    p: float | None = None,
    keep: float = 0.5,
    masks: int | None = None,
    stable: float = 0.95,
    minutes: float | None = None,
    workers: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> Scores:
    """Loss in nats that each channel avoids, float64, additive, any sign, higher = keep. Shapes: (channels,) per group.

    scope: layer (a fit per group) or global (one fit). p: how often a bit is on; by default max(0.7, `keep`), keep being the share of
    channels that this round leaves: the fit is about networks of that occupancy. Where most masks of a pilot destroy the network (loss
    above 1.5 log classes, where all losses are cut), p goes half of the way to 1 until they do not. masks: at most so many per fit, by
    default max(5 d, 512), or 10 d globally, for d bits. The masks of a fit double until the Spearman correlation of two successive
    estimates reaches `stable` (above 1: never). minutes: no further doubling after that; results then depend on the machine's speed.
    workers: processes, each on one thread; results do not depend on their number. Bits are dealt to the channels in the order of their
    weight, not their number, so that the result does not depend on how channels are numbered.
    Raises UsageError for options out of range, DataError without labels or images, for outputs that are no logits or not finite.
    """
    checks = {"scope": scope in ("layer", "global"), "p": p is None or 0 < p < 1, "keep": 0 < keep <= 1, "workers": workers >= 1}
    checks |= {"masks": masks is None or masks >= 2, "stable": stable > 0, "minutes": minutes is None or minutes > 0}
    for name, good in checks.items():
        if not good:
            raise UsageError(f"the criterion filter_ensemble cannot work with {name} = {locals()[name]!r}; see edgeprune criteria.")
    occupancy = p if p is not None else min(max(0.7, keep), 0.99)
    judge = _Judge.of(probe, _batches(probe))
    order = _order(probe, judge.masked)
    parts = [(g.name,) for g in graph.groups] if scope == "layer" else [tuple(g.name for g in graph.groups)] * bool(graph.groups)
    fits = []
    for number, names in enumerate(parts):
        columns = np.concatenate([order[judge.masked.columns[name]] for name in names])
        most = masks or (max(5 * len(columns), 512) if scope == "layer" else 10 * len(columns))
        fits.append(_Fit(names, columns, occupancy, most, (seed, number)))
    _run(judge, fits, stable, math.inf if minutes is None else time.monotonic() + 60 * minutes, workers=workers, progress=progress)
    theta, errors = np.zeros(judge.masked.channels), np.zeros(judge.masked.channels)
    for fit in fits:
        theta[fit.columns], errors[fit.columns] = fit.estimate.theta, fit.estimate.standard_errors
    facts = {
        "images": judge.images,
        "scope": scope,
        "dense_loss": judge.dense,
        "fits": [fit.facts(judge.limit) for fit in fits],
        "standard_errors": {name: [float(f"{e:.6g}") for e in errors[part]] for name, part in judge.masked.columns.items()},
    }
    return Scores("filter_ensemble", {name: theta[part] for name, part in judge.masked.columns.items()}, facts, additive=True)


@dataclass(frozen=True)
class Estimate:
    """A linear model of losses on bits: theta = minus the slopes, with their standard errors, each (bits,).

    r2: share of the losses' variance explained; loo_r2: the same for masks left out of the fit. ridge: the chosen share.
    """

    theta: Floats
    standard_errors: Floats
    r2: float
    loo_r2: float
    ridge: float

    @property
    def reliability(self) -> float:
        """1 - mean squared standard error / variance of theta, at least 0: what of the spread is not sampling error."""
        spread = float(self.theta.var())
        return max(0.0, 1 - float((self.standard_errors**2).mean()) / spread) if spread > 0 else 0.0


def fit_linear(bits: Bits, losses: Floats, ridges: Sequence[float] = RIDGES) -> Estimate:
    """Ridge regression of losses (masks,) on bits (masks, d) with a free intercept; the ridge of least leave-one-out error.

    The error is the closed form mean((r_t / (1 - h_tt))²). Bits that never change have theta 0 and no error. Raises ValueError for
    fewer than two masks.
    """
    if len(bits) < 2:
        raise ValueError(f"a fit needs at least two masks, got {len(bits)}")
    design = bits.astype(np.float64)
    design -= design.mean(axis=0)
    centred = losses - losses.mean()
    gram = design.T @ design
    values, vectors = np.linalg.eigh(gram)
    values = np.clip(values, 0.0, None)
    usable = values > 1e-9 * max(float(values.max(initial=0.0)), 1e-300)
    values, vectors = values[usable], vectors[:, usable]
    projected = design @ vectors
    aligned = projected.T @ centred
    scale = float(np.trace(gram)) / max(1, gram.shape[0])
    total = float(centred @ centred)
    best: tuple[float, float, Floats, Floats] | None = None
    for ridge in ridges:
        shrunk = values + ridge * scale
        leverage = 1 / len(bits) + (projected**2 / shrunk).sum(axis=1)
        if leverage.max(initial=0.0) > 1 - 1e-6 and ridge < max(ridges):
            continue  # a mask that fits itself says nothing about the others
        residual = centred - projected @ (aligned / shrunk)
        error = float(((residual / np.maximum(1 - leverage, 1e-6)) ** 2).mean())
        if best is None or error < best[0] * (1 - 1e-9):
            best = (error, ridge, shrunk, residual)
    assert best is not None
    error, ridge, shrunk, residual = best
    freedom = max(1.0, len(bits) - 1 - float((values / shrunk).sum()))
    noise = float(residual @ residual) / freedom
    variances = noise * (vectors**2 * (values / shrunk**2)).sum(axis=1)
    left_out = 1 - error * len(bits) / total if total > 0 else 0.0
    explained = 1 - float(residual @ residual) / total if total > 0 else 0.0
    return Estimate(-(vectors @ (aligned / shrunk)), np.sqrt(variances), explained, left_out, ridge)


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation of two estimates; 1 for a single value, 0 where one of them ranks nothing."""
    if len(a) < 2:
        return 1.0
    x, y = (rankdata(v) - (len(v) + 1) / 2 for v in (a, b))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Judge:
    """The masked copy and the fixed images that every mask is judged by."""

    masked: Masked
    batches: list[Batch]
    images: int
    dense: float
    limit: float

    @staticmethod
    def of(probe: Probe, batches: list[Batch]) -> _Judge:
        images = sum(len(labels) for _, labels in batches)
        inputs = batches[0][0]
        masked = Masked(probe.model, probe.graph, memory_format=layout_for(probe.model, *inputs))
        with torch.no_grad():
            logits = next(tensors_in(masked.model(*fresh(inputs))), None)
        dense = mean_loss(masked.model, batches)
        if logits is None or not math.isfinite(dense):
            raise DataError(f"the loss of the network is {dense} (NaN or Inf): check the preprocessing (mean, std) and the weights.")
        return _Judge(masked, batches, images, dense, max(1.5 * math.log(logits.shape[1]), 2 * dense))

    def losses(self, names: tuple[str, ...], keeps: Bits) -> Floats:
        """The loss of every keep vector (masks, channels), which differ in these groups only; cut at the limit. One thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = np.zeros(len(keeps))
            held = 0
            for inputs, labels in self.batches:
                self.masked.set(keeps[0])
                run, held = self._runner(names, inputs, held if len(keeps) > 2 and len(names) == 1 else KEPT_BYTES)
                for t, keep in enumerate(keeps):
                    self.masked.set(keep)
                    found[t] += summed_loss(run(), labels)
        finally:
            self.masked.set(np.ones(self.masked.channels, dtype=np.bool_))
            torch.set_num_threads(threads)
        mean: Floats = np.nan_to_num(found / self.images, nan=self.limit, posinf=self.limit)
        return np.minimum(mean, self.limit)

    def _runner(self, names: tuple[str, ...], inputs: tuple[Any, ...], held: int) -> tuple[Callable[[], Any], int]:
        """How to run these inputs under many masks, and the bytes that all such runners hold by now."""
        if held < KEPT_BYTES and not self.masked.mixes:
            prefix = Prefix(self.masked.model, inputs, self.masked.tensors(names))
            again, whole = (next(tensors_in(out)) for out in (prefix.run(), prefix.outputs))
            if held + prefix.kept_bytes <= KEPT_BYTES and torch.allclose(again, whole, rtol=1e-4, atol=1e-5, equal_nan=True):
                return prefix.run, held + prefix.kept_bytes

        def run() -> Any:
            with torch.no_grad():
                return self.masked.model(*fresh(inputs))

        return run, held


@dataclass(eq=False)
class _Fit:
    """One linear model while it is being sampled: which bits, the masks so far and their losses.

    `columns` are places in the keep vector, in the order in which random bits are dealt to them.
    """

    names: tuple[str, ...]
    columns: NDArray[np.int64]
    p: float
    most: int
    seed: tuple[int, int]
    bits: Bits = field(init=False)
    losses: Floats = field(init=False)
    stopped: str = ""
    spearman: float = 0.0

    def __post_init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        """Start over at the present p; the mask that removes nothing comes first."""
        self._random = np.random.default_rng([*self.seed, round(1e6 * self.p)])
        self.bits = np.zeros((0, len(self.columns)), dtype=np.bool_)
        self.losses = np.zeros(0)
        self._drawn = np.ones((1, len(self.columns)), dtype=np.bool_)

    def draw(self) -> Bits:
        """The masks to judge next, (masks, bits): a pilot, then as many as to double those there are."""
        have = len(self.losses)
        goal = PILOT_MASKS if not have else max(FIRST_MASKS, 2 * have)
        wanted = min(goal, self.most) - have - len(self._drawn)
        more = self._random.random((max(0, wanted), len(self.columns))) < self.p
        drawn, self._drawn = np.concatenate([self._drawn, more]), more[:0]
        return drawn

    def take(self, bits: Bits, losses: Floats, *, limit: float, stable: float, late: bool) -> None:
        """Add judged masks; decide whether to go on, to stop, or to start over nearer to the dense network."""
        pilot = not len(self.losses)
        if pilot and (losses[1:] >= limit).mean() > 0.5 and self.p < 0.99:
            self.p = min((1 + self.p) / 2, 0.99)
            self._restart()
            return
        before = self.estimate.theta if len(self.losses) >= FIRST_MASKS else None
        self.bits, self.losses = np.concatenate([self.bits, bits]), np.concatenate([self.losses, losses])
        self.__dict__.pop("estimate", None)
        if before is not None:
            self.spearman = spearman(before, self.estimate.theta)
        if before is not None and self.spearman >= stable:
            self.stopped = "stable"
        elif len(self.losses) >= self.most:
            self.stopped = "masks"
        elif late:
            self.stopped = "minutes"

    @cached_property
    def estimate(self) -> Estimate:
        """The fit to all masks so far."""
        return fit_linear(self.bits, self.losses)

    def facts(self, limit: float) -> dict[str, Any]:
        """How the fit went, as plain values."""
        e = self.estimate
        figures = {"r2": e.r2, "loo_r2": e.loo_r2, "reliability": e.reliability, "spearman": self.spearman}
        return {
            "groups": list(self.names),
            "p": self.p,
            "masks": len(self.losses),
            "stopped": self.stopped,
            "ridge": e.ridge,
            "clipped": float((self.losses >= limit).mean()),
            **{name: round(value, 6) for name, value in figures.items()},
        }


def _run(judge: _Judge, fits: list[_Fit], stable: float, deadline: float, *, workers: int, progress: Progress) -> None:
    """Sample until every fit has stopped, in rounds, so that with a deadline all fits come equally far."""
    done = 0
    with _pool(workers) as evaluate:
        while pending := [fit for fit in fits if not fit.stopped]:
            drawn = [fit.draw() for fit in pending]
            jobs = [(i, part) for i, bits in enumerate(drawn) for part in np.split(bits, range(CHUNK, len(bits), CHUNK))]
            found: list[list[Floats]] = [[] for _ in pending]
            for (i, part), losses in zip(jobs, evaluate(_tasks(judge, pending, jobs, deadline)), strict=True):
                found[i].append(losses)
                done += len(losses)
                progress("judging masks", done, done + sum(fit.most - len(fit.losses) for fit in pending) - len(part))
            for fit, bits, parts in zip(pending, drawn, found, strict=True):
                losses = np.concatenate(parts)
                fit.take(bits[: len(losses)], losses, limit=judge.limit, stable=stable, late=time.monotonic() > deadline)


def _tasks(judge: _Judge, pending: list[_Fit], jobs: list[tuple[int, Bits]], deadline: float) -> Iterator[tuple[_Judge, _Names, Bits]]:
    """What to judge, one chunk at a time; after the deadline nothing more of fits that have something already."""
    for i, part in jobs:
        late = time.monotonic() > deadline and len(pending[i].losses) > 0
        keeps = np.ones((0 if late else len(part), judge.masked.channels), dtype=np.bool_)
        keeps[:, pending[i].columns] = part[: len(keeps)]
        yield judge, pending[i].names, keeps


def _judged(task: tuple[_Judge, _Names, Bits]) -> Floats:
    judge, names, keeps = task
    return judge.losses(names, keeps) if len(keeps) else np.zeros(0)


@contextmanager
def _pool(workers: int) -> Iterator[Callable[[Iterator[Any]], Iterator[Floats]]]:
    """Judges tasks in order, in this process or in `workers` others; none of them outlives the block."""
    if workers == 1:
        yield lambda tasks: map(_judged, tasks)
        return
    try:
        with Parallel(n_jobs=workers, backend="loky", return_as="generator") as parallel:
            yield lambda tasks: parallel(delayed(_judged)(task) for task in tasks)
    finally:
        get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _batches(probe: Probe) -> list[Batch]:
    """The calibration images, the same for every mask."""
    batches: list[Batch] = []
    for batch in probe.data if probe.data is not None else ():
        inputs, labels = (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, (tuple, list)) else (batch, None)
        if not isinstance(labels, Tensor) or (len(labels) and int(labels.min()) < 0):
            raise DataError("the criterion filter_ensemble follows the loss, so it needs labels: give batches of (inputs, labels).")
        if len(labels):
            batches.append((tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), labels.long()))
    if not batches:
        raise DataError("the calibration data are empty: give at least one batch of images.")
    return batches


def _order(probe: Probe, masked: Masked) -> NDArray[np.int64]:
    """For every group its places in the keep vector, lightest channel first: (channels,), groups one behind the other."""
    order = np.zeros(masked.channels, dtype=np.int64)
    for group in probe.graph.groups:
        weight = np.zeros(group.channels)
        for member in group.members:
            tensor = probe.tensors[member.parameter].detach().double().abs().movedim(member.axis, 0)
            weight += tensor[torch.from_numpy(member.indices)].reshape(group.channels, -1).sum(dim=1).cpu().numpy()
        part = masked.columns[group.name]
        order[part] = part.start + np.argsort(weight, kind="stable")
    return order
