from __future__ import annotations

import numpy as np
import pytest

from edgeprune.errors import DataError, UsageError
from edgeprune.quantize import calibrate
from edgeprune.quantize.calibrate import BINS, Histogram, Means, Ranges, observe
from tests.quantize.onnx_nets import batches, images, proto, run


def test_a_histogram_that_grew_is_the_histogram_of_all() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(size=4000).astype(np.float32) * s for s in (0.01, 3.0, 40.0)]
    grown, whole = Histogram(), Histogram()
    for part in parts:
        grown.add(part)
    whole.add(np.concatenate(parts))
    assert grown.reach == whole.reach and grown.counts.sum() == 12000
    # 0.01 wide values lay in bins that later merged: nothing moves by more than the final width
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(whole.counts)).max() == 0
    assert grown.extremes() == whole.extremes()


def test_zeros_are_not_counted() -> None:
    found = Histogram()
    found.add(np.array([0, 0, 0, 1, 2], np.float32))
    assert found.counts.sum() == 2 and found.counts[BINS // 2] == 0


def test_percentile_and_entropy_cut_outliers_off() -> None:
    values = np.abs(np.random.default_rng(0).normal(size=400_000)).astype(np.float32)
    values[0] = 30.0
    found = Histogram()
    found.add(values)
    assert found.extremes()[1] == 30.0
    assert np.quantile(values, 0.9998) < found.percentile()[1] < 6
    assert 2 < found.entropy()[1] < 16
    assert found.percentile()[0] >= 0


def test_entropy_leaves_few_values_alone() -> None:
    found = Histogram()
    found.add(np.array([1, 2, 30], np.float32))
    assert found.entropy() == (1.0, 30.0)


def test_ranges_are_the_union_over_images_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ["input", "output"]
    one, other = Ranges(tensors), Ranges(tensors)
    assert observe(proto(), batches(), one) == 64
    monkeypatch.setattr(calibrate, "_MEMORY_BYTES", 1)  # one image at a time
    observe(proto(), batches(), other)
    x, _ = images()
    y = run(proto(), x)
    for found in (one.found(), other.found()):
        assert found["input"] == pytest.approx((float(x.min()), float(x.max())))
        assert found["output"] == pytest.approx((min(0.0, float(y.min())), max(0.0, float(y.max()))), rel=1e-5)


def test_means_keep_positions() -> None:
    means = Means(["input"])
    observe(proto(), batches(), means)
    np.testing.assert_allclose(means.found()["input"], images()[0].mean(axis=0, dtype=np.float64), atol=1e-6)


def test_errors() -> None:
    with pytest.raises(UsageError, match="median"):
        Ranges(["input"], "median")  # type: ignore[arg-type]  # that is the point
    with pytest.raises(DataError, match="no images"):
        observe(proto(), [], Ranges(["input"]))
    x, y = images()
    with pytest.raises(DataError, match="NaN"):
        observe(proto(), [(np.full_like(x, np.nan), y)], Ranges(["output"]))
