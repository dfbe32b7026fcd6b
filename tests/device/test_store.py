from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.device.card import Memory, Staircase, device
from edgeprune.device.store import replace_profile, with_memory, write_profiles
from edgeprune.errors import DeviceError


def test_a_card_says_the_same_after_it_was_written(tmp_path: Path) -> None:
    pi = device("rpi4")
    steps = Staircase(widths=(8, 16), latency_ms={"conv3x3 14": (1.0, 1.5)}, channel_multiple=16)
    profile = pi.constants.model_copy(update={"staircase": steps, "power": pi.card.power})
    path = replace_profile(pi, profile, tmp_path / "rpi4.toml")
    again = device(path)
    assert again.constants == profile
    assert again.card.board == pi.card.board and again.card.power == pi.card.power
    assert set(again.card.profiles) == set(pi.card.profiles)
    assert again.channel_multiple == 16


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    pi = device("rpi4")
    path = replace_profile(pi, pi.constants, tmp_path / "rpi4.toml")
    path.write_text("# bought in May\n" + path.read_text())
    write_profiles(path, {"rpi4-ort": pi.constants}, "a test")
    assert path.read_text().startswith("# bought in May\n")
    assert list(device(path).card.profiles) == ["rpi4-ort"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_card_that_would_be_invalid_is_not_written(tmp_path: Path) -> None:
    pi = device("rpi4")
    path = replace_profile(pi, pi.constants, tmp_path / "rpi4.toml")
    before = path.read_text()
    with pytest.raises(DeviceError, match="valid card"):
        write_profiles(path, {"rpi4-other": pi.constants}, "a test")  # the default profile is gone
    assert path.read_text() == before


def test_memory_goes_to_the_profiles_of_its_runtime(tmp_path: Path) -> None:
    pi = device("rpi4")
    path = replace_profile(pi, pi.constants, tmp_path / "rpi4.toml")
    numbers = dict.fromkeys(("base_bytes", "kernel_bytes", "weights", "activations", "pointers", "mape", "worst"), 1.5)
    kept = Memory.model_validate({**numbers, "copied": ("pool",), "networks": 10, "source": "made up"})
    maker = path.read_text().split("`")[1]
    with_memory(path, {"litert": kept})
    profiles = device(path).card.profiles
    assert profiles["rpi4-litert"].memory == kept
    assert profiles["rpi4-ort"] == pi.constants
    assert f"`{maker}`" in path.read_text()
