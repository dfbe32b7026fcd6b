"""Choices about scores, refits and recipes, judged by 5,000 of CIFAR-10's training images that a ResNet-20 was not trained on.

    python -m benchmarks.unseen                 # trains the network (half an hour of one core), then everything that is missing
    python -m benchmarks.unseen scores refits   # words: scores, refits, recipes

The public checkpoints were trained on all 50,000 training images, so on these whatever copies a network best looks best. Here a network is
trained on 45,000 of them and the others decide; the test images stay out of it. scores: the pull of scores by reconstruction (`ridge`) and
whether few images are distrusted (`shrink`), after a refit layer by layer. refits: with the step of train/pairs.py. recipes: an epoch from
the refitted network. `loss` is the cross-entropy with the labels, `kl` the divergence from the dense network's answers. One row per choice
in benchmarks/results/unseen.json, written as it is measured, and unseen.md; `dense` is the accuracy of the network that it was made of,
because training it on another machine gives another one: compare rows that have it in common. Networks stay in runs/bench/unseen.
Needs EDGEPRUNE_DATA with cifar10/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import edgeprune as ep
from benchmarks import networks
from benchmarks.accuracy import AUGMENT
from benchmarks.cifar10 import datasets
from benchmarks.revision import git_revision
from edgeprune.plan import Plan
from edgeprune.run import write_atomic
from edgeprune.train.distill import features_to_learn
from edgeprune.train.finetune import finetune
from edgeprune.train.reconstruct import reconstruct

RESULTS = Path(__file__).parent / "results"
WORK = Path("runs") / "bench" / "unseen"
HELD = 5000
SCORING = 1024
REMOVED = (35, 50, 64)  # percent of the MACs
TRAINING = {"epochs": 18, "lr": 0.1, "warmup_share": 0.1, "distill": False, "crop_padding": 4, "choose": "last"}
SCORES: tuple[dict[str, Any], ...] = ({}, {"ridge": 1e-3}, {"ridge": 1e-2}, {"ridge": 0.5}, {"ridge": 1e-3, "shrink": False})
RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"feature_weight": 0.0},
    {"feature_weight": 0.0, "lr": 0.003},
    {"feature_weight": 0.0, "lr": 0.03},
    {"feature_weight": 0.0, "mixup": 1.0, "distill_weight": 1.0},
    {"feature_weight": 100.0, "lr": 0.03},
    {"feature_weight": 400.0},
)
TUNED = 50  # percent of the MACs that went before recipes are compared


@dataclass(frozen=True)
class Choice:
    """One thing to try: at a budget, scores with these options, a refit, and (not None) an epoch of the preset quick with these changes."""

    removed: int
    scores: dict[str, Any]
    in_pairs: bool
    recipe: dict[str, Any] | None = None


def choices(word: str) -> Iterator[Choice]:
    """Those of a word of the command line."""
    if word == "recipes":
        yield from (Choice(TUNED, {}, in_pairs=True, recipe=recipe) for recipe in RECIPES)
        return
    for removed in REMOVED:
        if word == "refits":
            yield Choice(removed, {}, in_pairs=True)
        else:
            yield from (Choice(removed, options, in_pairs=False) for options in SCORES)


class Bench:
    """The network, its images, and what has been made of it so far."""

    def __init__(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.rest, self.held = ep.load_data(datasets()).train.hold_out(HELD, seed=7)
        self.example = next(self.held.batches(1))[0]
        self._refitted: dict[str, tuple[Plan, nn.Module]] = {}

    @cached_property
    def dense(self) -> nn.Module:
        """ResNet-20 trained on the rest; loaded where it is on disk."""
        torch.manual_seed(3)
        network, file = networks.resnet20(), WORK / "resnet20.safetensors"
        for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight)
        if not file.exists():
            recipe = ep.Recipe.preset("quick", **TRAINING)
            trained, _ = finetune(network, None, self.rest, self.held, recipe, seed=1, checkpoints=WORK, key="dense")
            save_file({name: t.contiguous() for name, t in trained.state_dict().items()}, file)
        network.load_state_dict(load_file(file))
        return network.eval()

    @cached_property
    def graph(self) -> Any:
        """Its channels."""
        return ep.trace(self.dense, self.example)

    @cached_property
    def labels(self) -> Tensor:
        """Of the held images."""
        return torch.cat([y for _, y in self.held.batches(1000)])

    @cached_property
    def wanted(self) -> Tensor:
        """The dense network's answers."""
        return self._answers(self.dense)

    def figures(self, network: nn.Module) -> dict[str, float]:
        """Accuracy in percent, cross-entropy, divergence from the dense network."""
        answers = self._answers(network)
        apart = F.kl_div(F.log_softmax(answers, 1), F.log_softmax(self.wanted, 1), log_target=True, reduction="batchmean")
        accuracy = 100 * float((answers.argmax(1) == self.labels).double().mean())
        return {
            "accuracy": round(accuracy, 2),
            "loss": round(float(F.cross_entropy(answers, self.labels)), 4),
            "kl": round(float(apart), 4),
        }

    def measure(self, choice: Choice) -> dict[str, Any]:
        """One row."""
        plan, network = self._refit(choice)
        if choice.recipe is not None:
            recipe = ep.Recipe.preset("quick", **{"epochs": 1, "crop_padding": 4, **choice.recipe})
            features = features_to_learn(self.graph, plan)
            network, _ = finetune(network, self.dense, self.rest, None, recipe, seed=0, features=features)
        figures = {"dense": self.figures(self.dense)["accuracy"], **self.figures(network)}
        return {**vars(choice), **figures, "channels": sum(len(kept) for kept in plan.keep.values()), "git": git_revision()}

    def _refit(self, choice: Choice) -> tuple[Plan, nn.Module]:
        key = json.dumps([choice.removed, choice.scores, choice.in_pairs])
        if key not in self._refitted:
            images = list(self.rest.batches(128, shuffle_seed=0, limit=SCORING, augment=AUGMENT))
            scores = ep.score(self.graph, self.dense, "reconstruction", data=images, **choice.scores)
            plan = ep.allocate(self.graph, scores, ep.Budget(macs=1 - choice.removed / 100), method="knapsack", round_to=1)
            small = ep.slim(self.dense, self.graph, plan)
            fitted = reconstruct(small, self.dense, self.graph, plan, self.rest, augment=AUGMENT, in_pairs=choice.in_pairs)
            self._refitted = {key: (plan, fitted)}
        return self._refitted[key]

    def _answers(self, network: nn.Module) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(x) for x, _ in self.held.batches(100)])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| MACs | scores | refit | an epoch of quick with | dense | accuracy | loss | kl |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        recipe = "-" if row["recipe"] is None else _named(row["recipe"])
        refit = "in pairs" if row["in_pairs"] else "layer by layer"
        cells = [
            f"-{row['removed']}%",
            _named(row["scores"]),
            refit,
            recipe,
            f"{row['dense']:.1f}",
            f"{row['accuracy']:.1f}",
            f"{row['loss']:.3f}",
            f"{row['kl']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _named(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults"


def main() -> None:
    """Measure what is missing; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=[])
    words = parser.parse_args().words or ["scores", "refits", "recipes"]
    file, bench = RESULTS / "unseen.json", Bench()
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    for choice in (choice for word in words for choice in choices(word)):
        if any(all(row[name] == value for name, value in vars(choice).items()) for row in rows):
            continue
        rows.append(bench.measure(choice))
        content = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
        write_atomic(file, (json.dumps(content, indent=1) + "\n").encode())
        write_atomic(file.with_suffix(".md"), table(rows).encode())
        print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
