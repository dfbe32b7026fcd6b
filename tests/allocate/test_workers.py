"""Real processes, a real Dask scheduler and a real Ray cluster, all of this machine and started here."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import torch

from edgeprune.allocate.judge import Judge, Verdict, judge_of
from edgeprune.allocate.workers import Workers
from edgeprune.criteria.probe import Probe
from edgeprune.errors import UsageError
from edgeprune.plan import Plan
from tests.networks import images, traced

ROOT = Path(__file__).parents[2]


def judge(name: str = "residual") -> Judge:
    model, graph = traced(name)
    probe = Probe(model, graph, [(images(name, 16), torch.arange(16) % 5)])
    return judge_of(probe, images=8, recalibration_images=8, loss="divergence", steps=0, recover="reconstruct")


def plans(by: Judge) -> list[Plan]:
    return [Plan.uniform(by.graph, keep) for keep in (0.3, 0.5, 0.7, 0.9, 1.0)]


def expected(by: Judge) -> list[Verdict]:
    return [by(plan) for plan in plans(by)]


def test_one_job_is_this_process() -> None:
    by = judge()
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with Workers(by) as workers:
        assert workers.verdicts(plans(by)) == expected(by)
        assert {p.pid for p in psutil.Process().children(recursive=True)} <= before  # what others started may end meanwhile


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_number_of_processes_which_all_end() -> None:
    by = judge()
    for jobs in (2, 3):
        with Workers(by, jobs=jobs) as workers:
            assert workers.verdicts(plans(by)) == expected(by)
    assert [p for p in psutil.Process().children(recursive=True) if "popen_loky" in " ".join(p.cmdline())] == []


class Away(torch.nn.Module):
    """A network that is told where it runs: `inner` in this process, and with something on top in others."""

    def __init__(self, inner: torch.nn.Module, mark: Path) -> None:
        super().__init__()
        self.inner, self.mark, self.home = inner, mark, os.getpid()


class Growing(Away):
    """Keeps 120 MB more at every call, and writes its process down."""

    grown: ClassVar[list[bytes]] = []

    def forward(self, x: Any) -> Any:
        if os.getpid() != self.home:
            self.grown.append(b"1" * 120_000_000)
            time.sleep(0.2)
            with self.mark.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return self.inner(x)


class Fatal(Away):
    """Takes its process down, once: the first one leaves a mark."""

    def forward(self, x: Any) -> Any:
        if os.getpid() != self.home and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)


def judge_away(kind: type[Away], mark: Path) -> Judge:
    from edgeprune.graph.trace import trace

    away = kind(traced("residual")[0], mark)
    probe = Probe(away, trace(away, images("residual")), [(images("residual", 16), torch.arange(16) % 5)])
    return judge_of(probe, images=8, recalibration_images=8, loss="divergence", steps=0, recover="reconstruct")


@pytest.mark.slow
def test_the_work_of_a_lost_worker_is_done_again(tmp_path: Path) -> None:
    by = judge_away(Fatal, tmp_path / "mark")
    with Workers(by, jobs=2) as workers:
        found = workers.verdicts(plans(by))
    assert (tmp_path / "mark").exists()
    assert found == expected(by)


@pytest.mark.slow
def test_a_worker_that_grew_is_replaced_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    by = judge_away(Growing, tmp_path / "mark")
    with Workers(by, jobs=2) as workers:
        found = workers.verdicts(3 * plans(by))
    assert len(set((tmp_path / "mark").read_text().split())) > 2
    assert found == 3 * expected(by)
    assert not [w for w in recwarn if "worker" in str(w.message)]


SEARCH = """
    import torch
    from edgeprune.allocate.workers import Workers
    from tests.allocate.test_workers import judge, plans
    if __name__ == "__main__":
        by = judge()
        with Workers(by, jobs=2) as workers:
            while True:
                workers.verdicts(plans(by))
                print("judged", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_no_processes(tmp_path: Path) -> None:
    script = tmp_path / "search.py"
    script.write_text(textwrap.dedent(SEARCH))
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "judged\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        process.wait(timeout=60)
    finally:
        process.stdout.close()
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert process.returncode != 0
    assert alive == []


@pytest.fixture
def dask_scheduler() -> Iterator[str]:
    """The address of a scheduler with two workers."""
    pytest.importorskip("distributed")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "dask"]
    address = f"127.0.0.1:{port}"
    scheduler = [*dask, "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"]
    worker = [*dask, "worker", f"tcp://{address}", "--nthreads", "1", "--no-dashboard", "--no-nanny"]
    started = [subprocess.Popen(scheduler, **quiet), *(subprocess.Popen(worker, **quiet) for _ in range(2))]
    try:
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of distributed itself
def test_a_dask_cluster_gives_the_same_verdicts(dask_scheduler: str, tmp_path: Path) -> None:
    by, dying = judge(), judge_away(Fatal, tmp_path / "mark")
    with Workers(by, jobs=-1, cluster=f"dask://{dask_scheduler}") as workers:
        assert workers.verdicts(plans(by)) == expected(by)
    with Workers(dying, cluster=f"dask://{dask_scheduler}") as workers:
        assert workers.verdicts(plans(dying)) == expected(dying)
    assert (tmp_path / "mark").exists()


@pytest.fixture
def ray_head() -> Iterator[str]:
    """The address of a cluster of one node, which ends when its process is told to."""
    pytest.importorskip("ray")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    script = textwrap.dedent(HEAD)
    started = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert started.stdin is not None and started.stdout is not None
    try:
        yield next(line for line in started.stdout if line.startswith("127.") or line[:1].isdigit()).strip()
    finally:
        started.stdin.close()
        started.wait(timeout=60)
        started.stdout.close()


HEAD = """
    import importlib.util
    import sys
    from ray.cluster_utils import Cluster
    node = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
    if importlib.util.find_spec("grpc"):
        node["ray_client_server_port"] = 10001
    cluster = Cluster(initialize_head=True, head_node_args=node)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray itself
def test_a_ray_cluster_gives_the_same_verdicts(ray_head: str, tmp_path: Path) -> None:
    by = judge()
    for jobs in (1, 2):  # 1: as many as the cluster has cores
        with Workers(by, jobs=jobs, cluster=f"ray://{ray_head}") as workers:
            assert workers.verdicts(plans(by)) == expected(by)
    dying = judge_away(Fatal, tmp_path / "mark")
    with Workers(dying, cluster=f"ray://{ray_head}") as workers:
        assert workers.verdicts(plans(dying)) == expected(dying)
    assert (tmp_path / "mark").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray itself
def test_a_ray_client_gives_the_same_verdicts(ray_head: str) -> None:
    """From a machine that does not belong to the cluster."""
    pytest.importorskip("grpc")
    by = judge()
    with Workers(by, cluster="ray://127.0.0.1:10001") as workers:
        assert workers.verdicts(plans(by)) == expected(by)


def test_what_cannot_be_reached_or_sent_is_a_usage_error() -> None:
    by = judge()
    for wrong, message in (({"jobs": 0}, "got 0"), ({"cluster": "slurm://x"}, "ray://host:port or dask://host:port")):
        with pytest.raises(UsageError, match=message):
            Workers(by, **wrong)
    model = by.model
    model.generator = (number for number in (1,))  # type: ignore[assignment]
    try:
        with pytest.raises(UsageError, match="cannot be sent to other processes"), Workers(by, jobs=2):
            pass
    finally:
        del model.generator


def test_what_is_installed_in_another_environment_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's packages, the user's, those of a .pth file: only there it is enough to send the name of a class."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "elsewhere.py").write_text(
        "from torch import nn\n\nNUMBERS = (number for number in (1,))\n\n\n"
        "class Part(nn.Identity):\n    def extra_repr(self):\n        return str(NUMBERS)\n"
    )
    monkeypatch.syspath_prepend(folder)
    by = judge()
    by.model.part = importlib.import_module("elsewhere").Part()
    try:
        with Workers(by, jobs=2):
            pass
    finally:
        del by.model.part
