"""Processes that judge candidates: in this machine, or on a Ray or Dask cluster that is already there.

joblib hands out the work: its loky processes here, its ray and dask backends elsewhere. The judge travels once per process of this
machine (joblib maps large arrays) and with every share of the work to a cluster; the classes of networks that are not installed
travel by value, so a cluster needs edgeprune but not the user's files. Verdicts come back in the order of the plans and depend on
nothing but the plan. Work of a worker that was lost is done again; leaving the block, also by Ctrl-C, ends all processes it started.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Self

import cloudpickle
import numpy as np
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.process_executor import BrokenProcessPool
from numpy.typing import NDArray

from edgeprune.allocate.judge import Judge, Verdict
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.plan import Plan

RETRIES = 3
RAY_CLIENT_PORT = 10001  # Ray's own default; its client needs grpc on both sides
Parcel = NDArray[np.uint8]


class Workers:
    """A context manager: `verdicts(plans)` inside it. One job without a cluster: no process is started.

    jobs: processes, -1 for one per core; on a cluster, candidates judged at a time, 1 and -1 for as many as it has cores. cluster:
    "dask://host:port" of a scheduler; "ray://host:port" of the head node of a Ray cluster that this machine belongs to, "ray://auto" to
    find it, "ray://host:10001" of a Ray client server elsewhere. Raises UsageError for what cannot be reached or sent.
    """

    def __init__(self, judge: Judge, *, jobs: int = 1, cluster: str = "") -> None:
        if jobs == 0 or jobs < -1:
            raise UsageError(f"jobs is a number of processes, or -1 for one per core, got {jobs}.")
        if cluster and not cluster.startswith(("ray://", "dask://")):
            raise UsageError(f"a cluster is ray://host:port or dask://host:port, got {cluster!r}.")
        self._judge = judge
        self._jobs = -1 if cluster and jobs == 1 else jobs
        self._cluster = cluster
        self._parcel: Parcel | None = None
        self._open = contextlib.ExitStack()
        self._lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __enter__(self) -> Self:
        if self._cluster or self._jobs != 1:
            self._parcel = _packed(self._judge)
        if self._cluster.startswith("dask://"):
            self._lost = self._open.enter_context(_dask(self._cluster.removeprefix("dask://")))
        elif self._cluster:
            self._lost = self._open.enter_context(_ray(self._cluster))
            self._jobs = _ray_cores() if self._jobs == -1 else self._jobs
        elif self._jobs != 1:
            self._open.callback(_end_processes)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def verdicts(self, plans: Sequence[Plan]) -> list[Verdict]:
        """One per plan. Raises EdgepruneError when workers are lost again and again."""
        if self._parcel is None:
            return [self._judge(plan) for plan in plans]
        name = hashlib.sha256(self._parcel.data).hexdigest()
        keeps = [dict(plan.keep) for plan in plans]
        for attempt in range(1 + RETRIES):
            try:
                with warnings.catch_warnings():  # loky replaces a process whose memory has grown, and says so; nothing is lost by it
                    warnings.filterwarnings("ignore", message="A worker stopped while some jobs were given", category=UserWarning)
                    found = Parallel(n_jobs=self._jobs, batch_size=1, pre_dispatch="all")(
                        delayed(judged)(name, self._parcel, keep) for keep in keeps
                    )
                return [Verdict(loss, accuracy) for loss, accuracy in found]
            except self._lost as error:
                if attempt == RETRIES:
                    raise EdgepruneError(
                        f"workers were lost {attempt + 1} times in a row ({type(error).__name__}): one process may need more memory than "
                        "there is. Use fewer --jobs."
                    ) from error
        raise AssertionError("every attempt returns or raises")


def judged(name: str, parcel: Parcel, keep: dict[str, tuple[int, ...]]) -> tuple[float, float]:
    """Runs in a worker: (loss, accuracy) of one plan by the judge in the parcel, which is unpacked once."""
    if name not in _UNPACKED:
        _UNPACKED.clear()
        _UNPACKED[name] = pickle.loads(parcel.tobytes())
    verdict = _UNPACKED[name](Plan(keep))
    return verdict.loss, verdict.accuracy


_UNPACKED: dict[str, Judge] = {}


def _packed(judge: Judge) -> Parcel:
    for name in _travelling(judge):
        cloudpickle.register_pickle_by_value(sys.modules[name])
    try:
        return np.frombuffer(cloudpickle.dumps(judge), dtype=np.uint8)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(f"this network cannot be sent to other processes ({error}): use --jobs 1 and no cluster.") from error
    finally:
        for name in _travelling(judge):
            cloudpickle.unregister_pickle_by_value(sys.modules[name])


def _travelling(judge: Judge) -> list[str]:
    """The top-level modules of the network's classes that are not installed: a worker could not import them."""
    names = {base.__module__.partition(".")[0] for module in judge.model.modules() for base in type(module).__mro__}
    return sorted(name for name in names - {"builtins", "edgeprune"} if name in sys.modules and not _installed(name))


@lru_cache
def _installed(name: str) -> bool:
    file = getattr(sys.modules[name], "__file__", None)
    if name == "__main__" or file is None:  # cloudpickle takes __main__ by value anyway
        return True
    path = Path(file)  # installers' folders by name: an environment also sees those of the system, the user, another environment
    installed = not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
    return installed or any(path.is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib"))


def _end_processes() -> None:
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def _dask(address: str) -> Iterator[tuple[type[BaseException], ...]]:
    """Joblib sends work to this scheduler while the block lasts; gives the errors that mean a lost worker."""
    try:
        from distributed import Client
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise _missing("dask") from error
    try:
        client = Client(f"tcp://{address}", timeout=20, set_as_default=False)  # type: ignore[no-untyped-call]  # distributed is typed in part
    except (OSError, ValueError) as error:
        raise UsageError(f"no Dask scheduler answers at {address} ({error}): start one (dask scheduler), or correct --cluster.") from error
    try:
        with parallel_config(backend="dask", client=client, wait_for_workers_timeout=30):
            yield (KilledWorker, FutureCancelledError)
    finally:
        client.close()  # type: ignore[no-untyped-call]  # distributed is typed in part


@contextlib.contextmanager
def _ray(address: str) -> Iterator[tuple[type[BaseException], ...]]:
    """The same for Ray."""
    try:
        import ray
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise _missing("ray") from error
    bare = address.removeprefix("ray://")
    client = bare.endswith(f":{RAY_CLIENT_PORT}")
    try:
        ray.init(address=address if client else bare, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        hint = ", with pip install 'ray[client]' here and there where Ray asks for grpc" if client else ""
        raise UsageError(
            f"no Ray cluster answers at {bare} ({error}): start one (ray start --head), or correct --cluster{hint}."
        ) from error
    try:
        register_ray()  # type: ignore[no-untyped-call]  # ray is typed in part
        with parallel_config(backend="ray"):
            yield (ray.exceptions.RayError,)
    finally:
        ray.shutdown()


def _ray_cores() -> int:
    """Of the whole cluster; Ray's joblib backend counts them in ways that a client cannot."""
    import ray

    found = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray is typed in part
    return int(found["CPU"])


def _missing(package: str) -> UsageError:
    return UsageError(f"--cluster {package}://… needs {package}: pip install 'edgeprune[cluster]'.")
