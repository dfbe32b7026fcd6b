"""Artifacts of 25 networks, dense and cut to half of every width: do they compute what torch computes, and what is inside them.

    python -m benchmarks.artifacts parity [NAME …]      # goes on where it was; networks that are named are run again
    python -m benchmarks.artifacts latency [NAME …]     # artifacts_speed.py: dense, pruned, int8, mixed; both runtimes, 1 and 2 threads

Inputs are real: CIFAR-10 test images and ImageNet samples (EDGEPRUNE_DATA). CIFAR ResNets have their trained weights, the others
random ones whose batch norms saw 32 images. Every network runs in a fresh process with a time limit. Writes
benchmarks/results/artifacts_parity.json and .md.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.graph import DATA, RESULTS, library_model

CIFAR = {"cifar:resnet20": "resnet20-12fca82f.th", "cifar:resnet56": "resnet56-4bfd9763.th"}
NETWORKS = (
    *CIFAR,
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "timm:mobilenetv4_conv_small",
    "timm:efficientnet_lite0",
    "efficientnet_b0",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "densenet121",
    "shufflenet_v2_x1_0",
    "timm:ghostnet_100",
    "timm:repvgg_a0",
    "timm:mobileone_s0",
    "squeezenet1_1",
    "resnet18",
    "resnet50",
    "googlenet",
    "mnasnet1_0",
    "timm:fbnetc_100",
    "timm:convnext_atto",
    "lraspp_mobilenet_v3_large",
    "backbone:ssdlite320_mobilenet_v3_large",
    "mlp",
)
MERGED = ("timm:repvgg_a0", "timm:mobileone_s0")  # training-time branches merged before anything else
CALIBRATION_IMAGES = 32
PARITY_IMAGES = 4
LIMIT_SECONDS = 1500
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str) -> tuple[Any, Any]:
    """(the network in eval mode, real images (36, 3, h, w) normalised): the last four are for the comparison."""
    import torch
    from torch import nn

    total = CALIBRATION_IMAGES + PARITY_IMAGES
    if name in CIFAR or name == "mlp":
        from benchmarks.cifar10 import test_images
        from benchmarks.networks import resnet20, resnet56

        images = _normalised(test_images(1)[0][:total])
        if name == "mlp":
            torch.manual_seed(0)
            layers = [nn.Linear(3072, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
            return nn.Sequential(nn.Flatten(), *layers).eval(), images
        model: Any = resnet20() if name == "cifar:resnet20" else resnet56()
        weights = torch.load(DATA / "weights" / CIFAR[name], map_location="cpu", weights_only=True)["state_dict"]
        model.load_state_dict({key.removeprefix("module."): value for key, value in weights.items()})
        return model.eval(), images
    model = library_model(name.removeprefix("backbone:"))
    if name.startswith("backbone:"):
        model = model.backbone
    if name in MERGED:
        from timm.utils.model import reparameterize_model

        model = reparameterize_model(model).eval()
    return model, _normalised(imagenet(total))


def imagenet(total: int, side: int = 224) -> Any:
    """The first `total` sample images, centre cropped: uint8 (n, side, side, 3)."""
    import numpy as np
    from PIL import Image

    images = []
    with tarfile.open(DATA / "imagenet" / "imagenet_sample1000_256px.tar") as tar:
        for member in tar.getmembers()[:total]:
            file = tar.extractfile(member)
            assert file is not None
            with Image.open(io.BytesIO(file.read())) as image:
                left, top = (image.width - side) // 2, (image.height - side) // 2
                images.append(np.asarray(image.convert("RGB").crop((left, top, left + side, top + side))))
    return np.stack(images)


def _normalised(images: Any) -> Any:
    import torch

    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
    return (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


def examine(name: str) -> dict[str, Any]:
    """Export one network four ways."""
    warnings.simplefilter("ignore")
    import torch

    import edgeprune as ep

    torch.set_num_threads(1)
    model, images = network(name)
    samples = images[-PARITY_IMAGES:]
    if name not in CIFAR:
        calibrate(model, images[:CALIBRATION_IMAGES])
    example = samples[:1]
    graph = ep.trace(model, example)
    pruned = ep.slim(model, graph, ep.Plan.uniform(graph, keep=0.5))
    if name not in CIFAR:
        calibrate(pruned, images[:CALIBRATION_IMAGES])
    row: dict[str, Any] = {"network": name, "macs": graph.macs, "macs_removed": 1 - ep.trace(pruned, example).macs / graph.macs}
    with tempfile.TemporaryDirectory() as folder:
        for kind, net in (("dense", model), ("pruned", pruned)):
            for form in ("onnx", "tflite"):
                row[f"{kind} {form}"] = written(net, example, samples, Path(folder) / f"{kind}.{form}", form)
    return row


def written(model: Any, example: Any, samples: Any, path: Path, form: str) -> dict[str, Any]:
    """What came of one export: the figures of the artifact and its operations, or the error a user would see."""
    from edgeprune.errors import EdgepruneError
    from edgeprune.export import export

    started = time.process_time()
    try:
        artifact = export(model, example, path, format=form, samples=samples)
    except EdgepruneError as error:
        return {"error": str(error), "exit": error.exit_code}
    return {
        "relative": artifact.parity_relative,
        "size_bytes": artifact.size_bytes,
        "cpu_s": round(time.process_time() - started, 2),
        "operations": operations(path),
    }


def operations(path: Path) -> dict[str, int]:
    """How often each operation of a file occurs."""
    from collections import Counter

    if path.suffix == ".tflite":
        from edgeprune.export.flatbuffer import operations as of_tflite

        return dict(of_tflite(path.read_bytes()))
    import onnx

    return dict(Counter(n.op_type for n in onnx.load(path).graph.node))


def calibrate(model: Any, images: Any) -> None:
    """Batch norms get the statistics of real images: random ones let a signal vanish, and with it every error."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.training = False


def parity(names: list[str], seconds: int) -> None:
    """One fresh process per network; rows are kept as they come, and a network that has one is run again only when it is named."""
    path = RESULTS / "artifacts_parity.json"
    rows = {row["network"]: row for row in json.loads(path.read_text())} if path.is_file() else {}
    for name in names or [name for name in NETWORKS if name not in rows]:
        rows[name] = row = in_a_process(name, seconds)
        print(
            f"{name:42} " + " | ".join(_cell(row.get(f"{k} {f}", row)) for k in ("dense", "pruned") for f in ("onnx", "tflite")), flush=True
        )
        ordered = [rows[n] for n in NETWORKS if n in rows]
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        path.with_suffix(".md").write_text(table(ordered))


def in_a_process(name: str, seconds: int) -> dict[str, Any]:
    """The row of a network, or how its process ended."""
    command = [sys.executable, "-m", "benchmarks.artifacts", "one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"network": name, "error": f"over {seconds} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"network": name, "error": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    row: dict[str, Any] = json.loads(lines[-1])
    return row


def _cell(found: dict[str, Any]) -> str:
    return f"{found['relative']:.1e}" if "relative" in found else found.get("error", "not run").replace("|", "/")[:160]


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    kinds = [f"{kind} {form}" for kind in ("dense", "pruned") for form in ("onnx", "tflite")]
    good = {kind: sum(row.get(kind, {}).get("relative", 1) <= 1e-4 for row in rows) for kind in kinds}
    lines = [
        "# Artifacts against torch",
        "",
        f"{len(rows)} of {len(NETWORKS)} networks run. Within 1e-4 of the largest output, on {PARITY_IMAGES} real images: "
        + ", ".join(f"{kind} {n}" for kind, n in good.items())
        + ". `python -m benchmarks.artifacts parity`.",
        "",
        "Pruned: half of every width. Norms: batch norms that are left (they stand before a conv, not behind one). Transposes: TRANSPOSE",
        "operations of the TFLite file, NHWC at both ends. CPU-seconds of the export with its check, dense ONNX and dense TFLite.",
        "",
        "| network | MACs removed | dense onnx | pruned onnx | dense tflite | pruned tflite | norms | transposes dense / pruned | MB onnx "
        "dense / pruned | CPU-s onnx / tflite |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "macs" not in row:
            lines.append(f"| {row['network']} | {_cell(row)} | | | | | | | | |")
            continue
        by = {kind: row[kind] for kind in kinds}
        ops = {kind: found.get("operations", {}) for kind, found in by.items()}
        transposes = " / ".join(str(ops[f"{k} tflite"].get("TRANSPOSE", 0)) if ops[f"{k} tflite"] else "-" for k in ("dense", "pruned"))
        sizes = " / ".join(f"{by[f'{k} onnx'].get('size_bytes', 0) / 1e6:.2f}" for k in ("dense", "pruned"))
        seconds = " / ".join(f"{by[f'dense {f}'].get('cpu_s', 0):.1f}" for f in ("onnx", "tflite"))
        cells = " | ".join(_cell(by[kind]) for kind in ("dense onnx", "pruned onnx", "dense tflite", "pruned tflite"))
        norms = ops["dense onnx"].get("BatchNormalization", 0)
        lines.append(f"| {row['network']} | {row['macs_removed']:.1%} | {cells} | {norms} | {transposes} | {sizes} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the asked part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("parity", "latency", "make", "one"))
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=LIMIT_SECONDS, help="wall-clock limit for one network")
    parser.add_argument("--keep", type=Path, help="folder where the artifacts of `latency` stay for the next time")
    parser.add_argument("--ways", default="", help="of `latency`: measure these ways alone, a comma between them")
    options = parser.parse_args()
    if options.part == "one":
        print(json.dumps(examine(options.names[0])))
    elif options.part == "latency":
        from benchmarks.artifacts_speed import latency

        latency(options.names, options.keep, [way for way in options.ways.split(",") if way])
    elif options.part == "make":
        from benchmarks.artifacts_speed import make

        make(options.names, options.keep)
    else:
        parity(options.names, options.seconds)


if __name__ == "__main__":
    main()
