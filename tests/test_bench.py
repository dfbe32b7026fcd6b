import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgeprune import bench
from edgeprune.bench import Figures, changes, lower_bound, regressions
from edgeprune.errors import UsageError
from edgeprune.train import silent


def times(seed: int, *, ratio: float = 1.0, noise: float = 0.15, count: int = 12) -> tuple[tuple[float, float], ...]:
    """Process medians of a network and of what was measured beside it, on a machine whose speed drifts for both."""
    random = np.random.default_rng(seed)
    drift = np.exp(random.normal(0, 0.4, count))
    own = np.exp(random.normal(0, noise, (count, 2)))
    return tuple((float(ratio * d * a), float(d * b)) for d, (a, b) in zip(drift, own, strict=True))


def test_the_same_code_raises_no_false_alarm() -> None:
    alarms = 0
    for seed in range(100):
        now, then = {"n": Figures({}, times(2 * seed))}, {"n": Figures({}, times(2 * seed + 1))}
        alarms += len(regressions(changes(now, then), 10))
        alarms += len(regressions(changes(now, then, paired=True), 10))
    assert alarms == 0


@pytest.mark.parametrize("paired", [True, False])
def test_a_real_slowdown_is_found_through_noise(paired: bool) -> None:
    found = 0
    for seed in range(50):
        now, then = {"n": Figures({}, times(seed, ratio=1.4, noise=0.05))}, {"n": Figures({}, times(1000 + seed, noise=0.05))}
        found += len(regressions(changes(now, then, paired=paired), 10))
    assert found == 50


def test_the_bound_lies_below_the_difference_of_the_medians_and_meets_it_without_noise() -> None:
    noisy = np.log([1.1, 1.3, 0.9, 1.2, 1.0])
    assert lower_bound(noisy, np.zeros(1)) < np.median(noisy)
    assert lower_bound(np.full(5, 0.2), np.full(5, 0.1)) == pytest.approx(0.1)


def test_exact_figures_count_in_the_direction_that_hurts() -> None:
    before = {"n": Figures({"size_bytes": 1000.0, "accuracy": 90.0, "macs": 500.0})}
    after = {"n": Figures({"size_bytes": 1200.0, "accuracy": 95.0, "macs": 400.0, "new": 1.0}), "other": Figures({"macs": 1.0})}
    found = {c.figure: c for c in changes(after, before)}
    assert set(found) == {"size_bytes", "accuracy", "macs"}
    assert found["size_bytes"].worse == pytest.approx(0.2) and found["accuracy"].worse < 0 and found["macs"].worse < 0
    assert [c.figure for c in regressions(tuple(found.values()), 10)] == ["size_bytes"]
    assert not regressions(tuple(found.values()), 25)
    assert "1,000 -> 1,200 (20.00% worse)" in found["size_bytes"].words()
    same = changes(before, before)
    assert {c.words() for c in same} == {"n: size_bytes 1,000, unchanged", "n: accuracy 90, unchanged", "n: macs 500, unchanged"}


def test_instructions_have_a_limit_of_their_own() -> None:
    """One percent passes, more does not, whatever is allowed for the other figures; another runtime's counts are not compared."""
    then = {"n": Figures({"macs": 1.0}, instructions={"cortex-a72": 1_000_000, "cortex-a76": 500_000})}

    def worse(count: int, *, limit: float = 10.0, alike: bool = True) -> list[str]:
        now = {"n": Figures({"macs": 1.0}, instructions={"cortex-a72": count})}
        return [c.words() for c in regressions(changes(now, then, same_board=alike), limit)]

    assert worse(1_010_000) == worse(900_000) == worse(2_000_000, alike=False) == []
    assert worse(1_010_001) == ["n: arm_insns_per_inference on cortex-a72 1,000,000 -> 1,010,001 (1.00% worse)"]
    assert worse(1_006_000, limit=0.5)


def test_why_no_instructions_were_counted_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_EMULATED_BOARD", str(tmp_path / "none"))
    figures = bench.counted({"n": Figures({"macs": 1.0})}, tmp_path, progress=silent)
    assert figures["n"].instructions == {} and figures["n"].not_counted
    entry = bench.words(figures, (), ())["networks"]["n"]
    assert entry["arm_insns_per_inference"] is None
    assert entry["arm_insns_per_inference_is_null_because"] == figures["n"].not_counted
    bench.write(tmp_path / "b.json", figures)
    assert bench.read(tmp_path / "b.json")[0] == figures


def test_latency_of_another_machine_is_not_compared() -> None:
    now, then = {"n": Figures({}, times(1, ratio=3.0))}, {"n": Figures({}, times(2))}
    assert changes(now, then, same_machine=False) == ()


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    figures = {"n": Figures({"macs": 5.0}, ((1.0, 2.0), (3.0, 4.0)), {"cortex-a72": 7}, "")}
    bench.write(tmp_path / "b.json", figures)
    assert bench.read(tmp_path / "b.json") == (figures, json.loads(json.dumps(bench.machine())))


@pytest.mark.parametrize("content", ["", "[]", '{"networks": {"n": {}}}', '{"networks": {"n": {"exact": {"a": "x"}, "beside_ms": []}}}'])
def test_what_is_no_baseline_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(UsageError, match="is no baseline"):
        bench.read(tmp_path / "b.json")
    with pytest.raises(UsageError, match="cannot be read"):
        bench.read(tmp_path / "absent.json")


def test_the_yardstick_is_the_same_file_every_time_and_runs(tmp_path: Path) -> None:
    first, second = bench.yardstick(tmp_path / "a.onnx"), bench.yardstick(tmp_path / "b.onnx")
    assert first.read_bytes() == second.read_bytes()
    session = onnxruntime.InferenceSession(str(first), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"input": np.ones((1, 3, 32, 32), np.float32)})
    assert out.shape == (1, 32, 32, 32) and np.isfinite(out).all() and out.max() > 0


def test_figures_of_the_same_code_are_the_same(tmp_path: Path) -> None:
    first = bench.run(["mobile"], tmp_path / "a", latency=False, progress=silent)
    second = bench.run(["mobile"], tmp_path / "b", latency=False, progress=silent)
    assert first == second and first["mobile"].exact["macs"] > 0
    assert (tmp_path / "a" / "mobile.onnx").stat().st_size == first["mobile"].exact["size_bytes"]


def test_an_unknown_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown reference network 'resnet'"):
        bench.run(["resnet"], tmp_path, latency=False, progress=silent)


def test_a_revision_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot check out"):
        bench.beside("no-such-revision", [], progress=silent)


@pytest.mark.slow
def test_this_revision_beside_itself_changes_nothing_exact() -> None:
    root = Path(__file__).resolve().parents[1]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    ours, theirs = bench.beside(head, ["residual"], progress=silent)
    found = changes(ours, theirs, paired=True)
    assert {c.figure: c.worse for c in found if c.figure != "latency_ms"} == {"size_bytes": 0, "macs": 0, "params": 0}
    assert len(ours["residual"].beside_ms) == 3 * bench.TURNS
