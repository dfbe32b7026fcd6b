from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from edgeprune import registry
from edgeprune.errors import UsageError
from edgeprune.registry import entries, find


@pytest.mark.parametrize(
    ("folder", "names", "function"),
    [("criteria", {"l1", "nuclear_norm", "random"}, "score"), ("allocate", {"uniform", "global", "knapsack"}, "allocate")],
)
def test_every_file_is_listed_with_what_it_needs_and_its_source(folder: str, names: set[str], function: str) -> None:
    listed = {e.name: e for e in entries(folder)}
    assert names <= set(listed)
    for name, entry in listed.items():
        assert entry.summary and len(entry.summary) < 160
        assert isinstance(entry.constants["NEEDS"], tuple) and isinstance(entry.constants["PAPER"], str)
        module = find(folder, name, "thing")
        assert callable(getattr(module, function))
        assert entry.constants == {"NEEDS": module.NEEDS, "PAPER": module.PAPER}


def test_unknown_names_get_near_matches_and_the_list() -> None:
    with pytest.raises(UsageError, match=r"no allocator named 'knapsck'\. Did you mean knapsack\? There are: .*uniform") as caught:
        find("allocate", "knapsck", "allocator")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=r"no criterion named 'zzz'\. There are:"):
        find("criteria", "zzz", "criterion")
    with pytest.raises(UsageError):
        find("criteria", "probe", "criterion")  # a file of the folder that is no criterion


def test_listing_imports_no_torch() -> None:
    code = "import sys; from edgeprune.registry import entries as e; assert e('criteria') and e('allocate') and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_packages_join_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("borrowed", "edgeprune.criteria.l1", "edgeprune.criteria")
    asked = []

    def fake(*, group: str) -> list[importlib.metadata.EntryPoint]:
        asked.append(group)
        return [point] if group == "edgeprune.criteria" else []

    monkeypatch.setattr(registry, "entry_points", fake)
    assert "borrowed" in {e.name for e in entries("criteria")}
    assert "borrowed" not in {e.name for e in entries("allocate")}
    assert asked == ["edgeprune.criteria", "edgeprune.allocators"]
    assert find("criteria", "borrowed", "criterion").__name__ == "edgeprune.criteria.l1"
