from __future__ import annotations

import pytest

from edgeprune.errors import UsageError
from edgeprune.quantize import BitPlan

PLAN = BitPlan({"a": "int8", "b": "fp16", "c": "int8"}, {"a": (2, 8)})


def test_json_and_hash() -> None:
    again = BitPlan.from_json(PLAN.to_json())
    assert again == PLAN and again.sha256 == PLAN.sha256
    assert BitPlan({"a": "int8"}).sha256 != PLAN.sha256


def test_mean_bits_weighs_by_size() -> None:
    # a: 2 * 3 + 8 * 3 bits, b: 16 * 4, d (not named, fp32): 32 * 2
    assert PLAN.mean_bits({"a": (2, 3), "b": (1, 4), "d": (2, 1)}) == pytest.approx((30 + 64 + 64) / 12)


@pytest.mark.parametrize(
    ("layers", "channels", "words"),
    [
        ({"a": "int7"}, {}, "int7"),
        ({"a": "int8"}, {"a": (9,)}, "9 in a"),
        ({"a": "fp16"}, {"a": (4,)}, "fp16"),
        ({}, {"a": (4,)}, "fp32"),
    ],
)
def test_impossible_plans(layers: dict[str, str], channels: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BitPlan(layers, channels)  # type: ignore[arg-type]  # that is the point
