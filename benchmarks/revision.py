"""Which revision of the repository a figure was measured with."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git_revision() -> str | None:
    """The abbreviated commit, with "-dirty" where tracked files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
