"""What quantization costs in accuracy: int8 networks, and bits per channel by discriminant information against uniform bits.

    python -m benchmarks.quantize [int8 | channels | mixed | table]      # goes on where it was; needs EDGEPRUNE_DATA

int8: ONNX and TFLite artifacts, calibrated on 256 images. CIFAR-10: calibrated on training images, accuracy on the 10,000 test images;
ResNet-8 is MLPerf Tiny's trained float network (resnet8.py), whose own int8 file is evaluated beside ours. EfficientNet-Lite0:
calibrated on 200 of the 1,000 ImageNet images and evaluated on all of them (the same set: see imagenet.py).
channels: ResNets with every layer int8 and weights of 4 or 5 bits: uniform, and by discriminant information at the largest mean whose
compressed artifact is no larger than the uniform one's. Nothing is chosen on test images. Three seeds.
mixed: the plan against both ends, timed in turns on one thread once it was chosen, CHECKS times; library networks have random weights:
only their times mean something.
Writes benchmarks/results/quantize.json and quantize.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import edgeprune as ep
from benchmarks import artifacts, resnet8
from benchmarks.accuracy import DATA, RESULTS, WEIGHTS
from benchmarks.cifar10 import datasets
from benchmarks.imagenet import MEAN, STD, efficientnet_lite0, images
from edgeprune.data import Data, Split, load_data
from edgeprune.export import Draft, export, load_artifact
from edgeprune.quantize.bits import BitPlan
from edgeprune.quantize.calibrate import Ranges, observe
from edgeprune.quantize.channels import CODEC, channel_bits, transfer_bytes
from edgeprune.quantize.influence import influences
from edgeprune.quantize.mixed import mixed_plan, time_ratio
from edgeprune.quantize.network import Network
from edgeprune.quantize.qdq import observed_tensors, write_qdq
from edgeprune.quantize.quantizer import BitQuantizer, CalibrationImages
from edgeprune.quantize.sensitivity import measured

SEEDS = (0, 1, 2)
MEANS = (4, 5)
INFLUENCE_IMAGES, MEASURED_IMAGES = 512, 128
INT8 = (*WEIGHTS, "resnet8", "efficientnet_lite0")
MIXED = ("resnet56", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_lite0")
CHECKS = 3
RULE = "geometric mean of DI and outputs"  # rows of an older rule are measured again
Row = dict[str, Any]


def network(name: str) -> tuple[torch.nn.Module, Data, Split]:
    """(the trained network, its data, the images to calibrate on)."""
    if name == "efficientnet_lite0":
        x, y = images()
        data = load_data(((x[2::5], y[2::5]), (x, y)), mean=MEAN, std=STD)
        return efficientnet_lite0(), data, data.train
    if name == "resnet8":
        data = load_data(datasets(), mean=resnet8.MEAN, std=resnet8.STD)
        return resnet8.trained(), data, data.train
    loaded = ep.load_model(DATA / "weights" / WEIGHTS[name], factory=f"benchmarks.networks:{name}", input_shape=(1, 3, 32, 32))
    data = load_data(datasets())
    return loaded.model, data, data.train


def accuracy(path: Path, split: Split) -> float:
    """Share of the images that the artifact, run by its runtime, classifies right."""
    run = load_artifact(path)
    right = sum(int((run(x.numpy())[0].argmax(axis=1) == y.numpy()).sum()) for x, y in split.batches(50))
    return right / len(split)


def int8(name: str, folder: Path) -> list[Row]:
    """fp32 and int8 artifacts of one network in both formats."""
    model, data, train = network(name)
    samples = next(iter(data.val.batches(32)))[0]
    rows = []
    for form in ("onnx", "tflite"):
        started = time.process_time()
        float_one = export(model, samples[:1], folder / f"fp32.{form}", format=form, samples=samples)
        quantizer = BitQuantizer(CalibrationImages(train, limit=256))
        made = export(model, samples[:1], folder / f"int8.{form}", format=form, samples=samples, quantizer=quantizer)
        seconds = time.process_time() - started
        rows.append(
            {
                "network": name,
                "format": form,
                "images": len(data.val),
                "calibration_images": len(quantizer.images),
                "fp32": accuracy(float_one.path, data.val),
                "int8": accuracy(made.path, data.val),
                "sqnr_db": made.parity_sqnr_db,
                "bytes": [float_one.size_bytes, made.size_bytes],
                "transfer_bytes": [transfer_bytes(a.path.read_bytes()) for a in (float_one, made)],
                "facts": quantizer.facts,
                "cpu_seconds": round(seconds, 1),
            }
        )
    if name == "resnet8":
        rows.append(resnet8.published(data.val))
    return rows


def channels(name: str, seed: int, folder: Path) -> list[Row]:
    """Uniform bits and bits by influence on one calibration set."""
    model, data, train = network(name)
    samples = next(iter(data.val.batches(32)))[0]
    proto = onnx.load(export(model, samples[:1], folder / "fp32.onnx", samples=samples).path)
    layers = Network(proto).layers
    shapes = {key: layer.weight.shape for key, layer in layers.items()}
    calibration = CalibrationImages(train, limit=256, seed=seed)
    influence = influences(proto, CalibrationImages(train, limit=INFLUENCE_IMAGES, seed=seed).batches())
    influence = measured(proto, influence, [x for x, _ in calibration.batches(MEASURED_IMAGES)])

    del proto.metadata_props[:]  # with the hash of what it was
    draft = Draft(format="onnx", content=proto.SerializeToString(), layers={}, as_fed=lambda array: array)

    def made(bits: dict[str, tuple[int, ...]]) -> tuple[bytes, BitPlan]:
        plan = BitPlan(dict.fromkeys(layers, "int8"), bits)
        return BitQuantizer(calibration, plan, variants=("bias",))(draft), plan

    rows = []
    for mean in MEANS:
        content, plan = made({key: (mean,) * shape[0] for key, shape in shapes.items()})
        limit = transfer_bytes(content)
        facts: dict[str, Any] = {"mean": mean, "mean_bits": plan.mean_bits(shapes), "right": _right(content, data.val, folder)}
        rows.append(_row(name, seed, content, how="uniform", **facts))
        budget = float(mean)
        content, plan = made(channel_bits(proto, influence, budget))
        while (found := transfer_bytes(content)) > limit:
            budget -= max(0.02, 0.8 * budget * (found - limit) / found)
            content, plan = made(channel_bits(proto, influence, budget))
        facts = {"mean": mean, "mean_bits": plan.mean_bits(shapes), "right": _right(content, data.val, folder)}
        rows.append(_row(name, seed, content, how="influence", **facts))
    return rows


def mixed(name: str, folder: Path) -> Row:
    """What `--quantize mixed` chooses for a network, and its time over those of both ends."""
    if name in INT8:
        model, _, train = network(name)
    else:
        model, x = artifacts.network(name)
        artifacts.calibrate(model, x[: artifacts.CALIBRATION_IMAGES])
        x, y = x.numpy(), np.arange(len(x)) % 10
        train = load_data(((x, y), (x, y))).train
    samples = next(iter(train.batches(8)))[0]
    plain = export(model, samples[:1], folder / "fp32.onnx", samples=samples)
    calibration = CalibrationImages(train, limit=64)
    proto = onnx.load(plain.path)
    layers, ranges = Network(proto), Ranges(observed_tensors(Network(proto)))
    observe(proto, calibration.batches(), ranges)

    def write(plan: BitPlan) -> onnx.ModelProto:
        return write_qdq(proto, plan, ranges.found())

    found = mixed_plan(proto, write, calibration.batches)
    made = write(found.plan)
    ends = {"fp32": proto, "int8": write(BitPlan(dict.fromkeys(layers.layers, "int8")))}
    over = {end: [time_ratio(made, other) for _ in range(CHECKS)] for end, other in ends.items()}
    return {"network": name, "facts": dict(found.facts), "over": over}


def _right(content: bytes, split: Split, folder: Path) -> float:
    file = folder / "bits.onnx"
    file.write_bytes(content)
    return accuracy(file, split)


def _row(name: str, seed: int, content: bytes, *, mean: int, how: str, mean_bits: float, right: float) -> Row:
    return {
        "network": name,
        "seed": seed,
        "rule": RULE,
        "asked_mean_bits": mean,
        "bits": how,
        "mean_bits": mean_bits,
        "accuracy": right,
        "bytes": len(content),
        "transfer_bytes": transfer_bytes(content),
    }


def tables(found: dict[str, list[Row]]) -> str:
    """Markdown."""
    lines = [
        "### int8",
        "",
        "| network | format | images | fp32 | int8 | drop, points | file, kB | compressed, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found["int8"]:
        sizes = [" → ".join(f"{b / 1e3:,.0f}" for b in r[key] or ()) for key in ("bytes", "transfer_bytes")]
        lines.append(
            f"| {r['network']} | {r['format']} | {r['images']:,} | {100 * r['fp32']:.2f}% | {100 * r['int8']:.2f}% | "
            f"{100 * (r['fp32'] - r['int8']):.2f} | {sizes[0]} | {sizes[1]} |"
        )
    lines += [
        "",
        "### channels",
        "",
        "| network | bits of weights | mean bits | accuracy (of each calibration) | compressed, kB |",
        "|---|---|---|---|---|",
    ]
    for name in sorted({r["network"] for r in found["channels"]}):
        for mean in MEANS:
            for how in ("uniform", "influence"):
                rows = [r for r in found["channels"] if (r["network"], r["asked_mean_bits"], r["bits"]) == (name, mean, how)]
                if not rows:
                    continue
                each = ", ".join(f"{100 * r['accuracy']:.2f}" for r in rows)
                kilobytes = np.mean([r["transfer_bytes"] for r in rows]) / 1e3
                word = f"{mean} everywhere" if how == "uniform" else "by influence"
                middle = 100 * float(np.mean([r["accuracy"] for r in rows]))
                lines.append(
                    f"| {name} | {word} | {np.mean([r['mean_bits'] for r in rows]):.2f} | {middle:.2f}% ({each}) | {kilobytes:.1f} |"
                )
    lines += [
        "",
        "### mixed",
        "",
        "| network | int8 layers | all-int8 / fp32 | mixed / fp32 | mixed / all-int8 | mixed / the faster, each time | repairs |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found["mixed"]:
        f, over = r["facts"], r["over"]
        ratios = " | ".join(f"{x:.2f}" for x in (f["int8_over_fp32"], np.median(over["fp32"]), np.median(over["int8"])))
        each = ", ".join(f"{x:.3f}" for x in over[f["faster_end"]])
        lines.append(f"| {r['network']} | {f['int8_layers']} of {f['layers']} | {ratios} | {each} | {f['repairs']} |")
    return "\n".join([*lines, "", f"Compressed with {CODEC}.", ""])


def _save(found: dict[str, list[Row]]) -> None:
    (RESULTS / "quantize.json").write_text(json.dumps(found, indent=2) + "\n")
    (RESULTS / "quantize.md").write_text(tables(found))


def main() -> None:
    """Run what is missing, write JSON and Markdown after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("int8", "channels", "mixed", "table"))
    part = parser.parse_args().part
    file = RESULTS / "quantize.json"
    found: dict[str, list[Row]] = {"int8": [], "channels": [], "mixed": []} | (json.loads(file.read_text()) if file.exists() else {})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in INT8 if part in (None, "int8") else ():
            if (name, "tflite") not in {(r["network"], r["format"]) for r in found["int8"]}:
                made = int8(name, Path(folder))
                found["int8"] = [r for r in found["int8"] if r["network"] != name] + made
                _save(found)
        for name in MIXED if part in (None, "mixed") else ():
            if name not in {r["network"] for r in found["mixed"]}:
                found["mixed"].append(mixed(name, Path(folder)))
                _save(found)
        for name in WEIGHTS if part in (None, "channels") else ():
            for seed in SEEDS:
                if (name, seed, RULE) not in {(r["network"], r["seed"], r.get("rule")) for r in found["channels"]}:
                    made = channels(name, seed, Path(folder))
                    found["channels"] = [r for r in found["channels"] if (r["network"], r["seed"]) != (name, seed)] + made
                    _save(found)
    _save(found)
    print(tables(found))


if __name__ == "__main__":
    main()
