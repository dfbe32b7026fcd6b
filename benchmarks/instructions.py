"""ARM instructions per inference of reference networks, dense, as they are exported: the baseline of the gate in `make test-board`.

    python -m benchmarks.instructions    # counts anew and writes results/arm_instructions.json; needs the board of `make test-board`

They change with the exporter and with onnxruntime's version, which is written down beside them. Counts on an emulated CPU, no latency.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgeprune.device.emulated import counts, default_folder, runtime
from edgeprune.export import export
from edgeprune.reference import reference
from edgeprune.train import silent

RESULTS = Path(__file__).parent / "results/arm_instructions.json"
NETWORKS = ("mobile", "residual")


def exported(name: str, folder: Path) -> Path:
    """The artifact of a dense reference network in `folder`."""
    model, example, _ = reference(name)
    return export(model, example, folder / f"{name}.onnx").path


def main() -> int:
    """Write the counts; 1 where there is no emulated board."""
    with tempfile.TemporaryDirectory() as folder:
        found, reason = counts({name: exported(name, Path(folder)) for name in NETWORKS}, progress=silent)
    if not found:
        print(f"nothing was counted: {reason}", file=sys.stderr)
        return 1
    table: dict[str, Any] = {"runtime": runtime(default_folder()), "arm_insns_per_inference": found}
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    print(RESULTS.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
