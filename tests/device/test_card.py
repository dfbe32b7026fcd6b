from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from edgeprune.device.card import MacKind, MemoryKind, device, devices
from edgeprune.errors import DeviceError, UnknownDevice

SHIPPED = sorted((Path(__file__).parents[2] / "devices").glob("*.toml"))
KINDS = {*get_args(MacKind), *get_args(MemoryKind)}


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_card_loads_and_prices_every_kernel_kind(path: Path) -> None:
    board = device(path.stem)
    facts = board.card.board
    assert all((facts.soc, facts.runtimes, facts.wheels, facts.sources))
    assert facts.threads <= facts.cores
    for profile in board.card.profiles:
        found = device(profile)
        assert (found.name, found.profile) == (path.stem, profile)
        assert set(found.constants.kernels) == KINDS
        assert board.attached or 85 <= found.constants.fit.coverage <= 95
        assert found.channel_multiple in (4, 8, 16)


def test_the_boards_of_the_contract_are_there() -> None:
    assert {"rpi3", "rpi4", "rpi5", "rpi-zero2w", "jetson-nano", "jetson-orin-nano", "host"} <= set(devices())


def test_a_card_without_a_profile_can_be_measured_but_not_predict(tmp_path: Path) -> None:
    text = (SHIPPED[-1].parent / "rpi4.toml").read_text().split("# Written by")[0]
    (tmp_path / "toaster.toml").write_text(text.replace('default_profile = "rpi4-ort"\n', ""))
    bare = device(tmp_path / "toaster.toml")
    assert (bare.profile, bare.threads, bare.predicts, bare.resolved) == ("toaster", 4, False, "")
    assert "cannot predict" in bare.description
    with pytest.raises(DeviceError, match=r"toaster has no fitted profile.*can be measured.*calibrate"):
        _ = bare.constants
    (tmp_path / "toaster.toml").write_text(text)
    with pytest.raises(DeviceError, match="'rpi4-ort' is not one of the profiles"):
        device(tmp_path / "toaster.toml")


def test_a_card_that_was_edited_is_read_again_however_soon(tmp_path: Path) -> None:
    """Within one tick of the file system's clock both versions have the same time."""
    card, text = tmp_path / "rpi4.toml", (SHIPPED[-1].parent / "rpi4.toml").read_text()
    for threads in (4, 2):
        card.write_text(text.replace("threads = 4", f"threads = {threads}"))
        os.utime(card, ns=(0, 0))
        assert device(card).card.board.threads == threads


def test_a_host_attaches_the_board() -> None:
    pi = device("rpi4", host="pi@board")
    assert (pi.host, pi.attached, pi.profile) == ("pi@board", True, "rpi4-ort")
    assert not device("rpi4").attached
    with pytest.raises(DeviceError, match="host is this machine"):
        device("host", host="pi@board")


def test_names_lists_boards_and_profiles() -> None:
    assert {"host", "host-ort", "rpi4", "rpi4-ort"} <= set(devices())
    assert list(devices()) == sorted(devices())


def test_a_board_resolves_to_its_default_profile_and_says_so() -> None:
    pi = device("rpi4")
    assert (pi.name, pi.profile, pi.attached, pi.threads) == ("rpi4", "rpi4-ort", False, 4)
    assert "rpi4-ort" in pi.resolved
    assert device("rpi4-ort").resolved == ""
    assert device("host").attached


def test_an_unknown_name_names_its_neighbours() -> None:
    with pytest.raises(UnknownDevice, match=r"'rpi44'.*Did you mean rpi4.*Known devices: .*host"):
        device("rpi44")


def test_a_path_and_the_config_folder_work(tmp_path: Path) -> None:
    text = (SHIPPED[-1].parent / "rpi4.toml").read_text().replace("rpi4-", "toaster-")
    (tmp_path / "toaster.toml").write_text(text)
    assert device(tmp_path / "toaster.toml").profile == "toaster-ort"
    assert "toaster" not in devices()
    folder = tmp_path / "config" / "edgeprune" / "devices"
    folder.mkdir(parents=True)
    (folder / "toaster.toml").write_text(text)
    assert {"toaster", "toaster-ort"} <= set(devices())
    assert device("toaster-ort").name == "toaster"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("[board]", "[board", "not valid TOML"),
        ("cores = 4", "coers = 4", r"unknown key board\.coers \(did you mean cores\?\)"),
        ("mac_ns = ", "mac_nss = ", r"mac_nss \(did you mean mac_ns\?\)"),
        ("kendall_tau = ", "kendal_tau = ", r"kendal_tau \(did you mean kendall_tau\?\)"),
        ("threads = 4", 'threads = "many"', r"threads.*'many'"),
        ("threads = 4", "threads = 0", r"threads.*0"),
        ("mac_ns = ", "mac_ns = -", r"mac_ns.*greater than or equal to 0"),
        ('default_profile = "rpi4-ort"', 'default_profile = "rpi4-x"', "'rpi4-x' is not one of the profiles"),
        ("\npool = {", "\npol = {", r"profiles\.rpi4-ort\.kernels"),
        ("rpi4-ort", "pi-ort", "begins with the board's"),
    ],
)
def test_a_malformed_card_is_refused_in_one_paragraph(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    text = (SHIPPED[-1].parent / "rpi4.toml").read_text()
    assert old in text
    (tmp_path / "rpi4.toml").write_text(text.replace(old, new))
    with pytest.raises(DeviceError, match=complaint) as caught:
        device(tmp_path / "rpi4.toml")
    assert "\n" not in str(caught.value)
    assert "rpi4.toml" in str(caught.value)


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be read"):
        device(tmp_path / "none.toml")


def test_a_host_that_is_named_twice_is_one() -> None:
    assert device("rpi4", host="pi@a, pi@b,pi@a").hosts == ("pi@a", "pi@b")
