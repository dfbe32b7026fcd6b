"""What compress prints where, its exit codes, and what is left behind."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgeprune.errors import BudgetError
from tests.cli.conftest import NET, QUICK, Command, nothing_new
from tests.colours import FACTORY, arrays, colour_net, images, weights


def test_compress_tells_what_was_reached(edgeprune: Command, here: Path) -> None:
    done = edgeprune("compress", *QUICK, "--macs", "0.5")
    assert (done.code, Path("runs/net-rpi4/model.onnx").is_file()) == (0, True)
    lines = done.out.splitlines()
    assert lines[0].startswith("net for rpi4: Asked for MACs of at most")
    assert "Accuracy went from" in lines[0]
    assert lines[1] == "  MACs, counted: multiply-accumulates of conv and linear layers, one image"
    assert lines[2] == "  model.onnx and report.html are in runs/net-rpi4"
    assert len(lines) == 3
    assert "edgeprune: the run folder is runs/net-rpi4" in done.err.splitlines()
    spent = re.findall(r"([a-z][a-z ,]*) ([\d.]+) s", done.err.splitlines()[-1].partition(": ")[2])
    total, parts = float(done.err.splitlines()[-1].split()[1]), [float(seconds) for _, seconds in spent]
    assert any("export" in name for name, _ in spent) and sum(parts) == pytest.approx(total, abs=0.06 * len(parts))
    assert all(line.startswith("edgeprune: ") for line in done.err.splitlines())
    again = edgeprune("compress", *QUICK, "--macs", "0.5")
    assert "runs/net-rpi4-2" in again.out


def test_a_prediction_is_called_so(edgeprune: Command) -> None:
    done = edgeprune("compress", *QUICK, "--latency-ms", "2", "--out", "run")
    assert done.code == 0
    assert "predicted, not measured" in done.out


def test_json_is_one_object_with_every_file(edgeprune: Command, here: Path) -> None:
    options = ["--epochs", "1", "--batch-size", "16", "--lr", "0.05", "--no-flip", "--no-distill", "--seed", "5"]
    done = edgeprune("compress", *QUICK, "--macs", "0.5", "--out", "run", "--json", *options)
    assert done.code == 0
    found = json.loads(done.out)
    on_disk = {str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()}
    assert set(found["files"]) == on_disk
    assert all(Path(p).is_file() for p in found["files"].values())
    assert (found["met"], found["folder"], found["seed"], len(found["curve"])) == (True, "run", 5, 1)
    recipe = json.loads(Path("run/run.json").read_text())["asked"]["recipe"]
    assert recipe["epochs"] == 1
    assert (recipe["batch_size"], recipe["lr"], recipe["flip"], recipe["distill"]) == (16, 0.05, False, False)
    assert "edgeprune: fine-tuning" in done.err


def test_presets_and_what_changes_them(edgeprune: Command, here: Path) -> None:
    """The recipe in run.json: a preset, with the options given; pruned in two rounds."""
    options = [
        "--preset",
        "long",
        "--epochs",
        "1",
        "--lr",
        "0.02",
        "--batch-size",
        "16",
        "--optimizer",
        "adamw",
        "--label-smoothing",
        "0.1",
    ]
    options += ["--mixup", "0.2", "--cutmix", "1", "--feature-weight", "0.5", "--precision", "bf16", "--rounds", "2"]
    done = edgeprune("compress", *QUICK, "--macs", "0.5", "--round-to", "1", "--out", "run", *options)
    assert done.code == 0, done.err
    asked = json.loads(Path("run/run.json").read_text())["asked"]
    recipe = asked["recipe"]
    assert (recipe["epochs"], recipe["lr"], recipe["ema_decay"], recipe["optimizer"]) == (1, 0.02, 0.999, "adamw")
    assert (recipe["label_smoothing"], recipe["mixup"], recipe["cutmix"], recipe["feature_weight"]) == (0.1, 0.2, 1.0, 0.5)
    assert (recipe["precision"], recipe["norms"], asked["rounds"], asked["recover"]) == ("bf16", "batch", 2, "reconstruct")
    assert Path("run/round-1/plan.json").is_file()
    refused = edgeprune("compress", *QUICK, "--macs", "0.5", "--preset", "slow", "--out", "other")
    assert (refused.code, "unknown preset 'slow'; there is: quick, standard, long" in refused.message) == (2, True)


def test_structure_distillation_chooses_the_widths_by_discriminant_information(edgeprune: Command, here: Path) -> None:
    options = ["--round-to", "1", "--epochs", "1", "--batch-size", "16"]
    done = edgeprune("compress", *QUICK, "--macs", "0.5", *options, "--structure-distill", "--out", "run")
    assert done.code == 0, done.err
    asked = json.loads(Path("run/run.json").read_text())["asked"]
    assert (asked["criterion"], asked["allocate"], asked["search"]) == ("di", "di_greedy", {"layer_choice": "structure"})
    assert asked["recipe"]["distill"]
    for other, reason in ((["--no-distill"], "leave --no-distill out"), (["--allocate", "uniform"], "leave --allocate uniform out")):
        refused = edgeprune("compress", *QUICK, "--macs", "0.5", "--structure-distill", *other, "--out", "other")
        assert (refused.code, reason in refused.message, Path("other").exists()) == (2, True, False)


def test_resume_goes_on(edgeprune: Command, here: Path) -> None:
    command = ["compress", *QUICK, "--macs", "0.5", "--out", "run"]
    assert edgeprune(*command).code == 0
    refused = edgeprune(*command)
    assert refused.code == 2
    assert "run already holds a run" in refused.message
    before = weights(Path("run/model.safetensors"))
    assert edgeprune(*command, "--resume").code == 0
    assert weights(Path("run/model.safetensors")).keys() == before.keys()
    lost = edgeprune("compress", *QUICK, "--macs", "0.5", "--resume")
    assert lost.code == 2
    assert "--resume needs --out" in lost.message


def test_users_say_what_stays(edgeprune: Command, here: Path) -> None:
    """ColourNet's groups: a (16, the stream that a and b make) and c (32)."""
    common = ["compress", *QUICK, "--macs", "0.8", "--round-to", "1", "--out", "run"]
    done = edgeprune(*common, "--keep-dense", "c", "--max-remove", "0.5", "--min-channels", "9", "--json")
    assert done.code == 0, done.err
    kept = {g["name"]: g["kept"] for g in json.loads(done.out)["groups"]}
    assert kept["c"] == 32
    assert 9 <= kept["a"] < 16
    asked = json.loads(Path("run/run.json").read_text())["asked"]
    assert (asked["keep_dense"], asked["max_remove"], asked["min_channels"], asked["round_to"]) == (["c"], 0.5, 9, 1)
    page = Path("run/report.md").read_text()
    assert "kept dense as asked (c): c" in page
    assert "no layer was cut below 9 channels" in page
    assert "no group lost more than 50% of its channels" in page
    other = edgeprune(*common, "--keep-dense", "a", "--json", "--resume")  # other rules, another plan: nothing stale is read back
    assert other.code == 0, other.err
    kept = {g["name"]: g["kept"] for g in json.loads(other.out)["groups"]}
    assert kept["a"] == 16
    assert kept["c"] < 32


def test_a_missed_budget_is_a_failed_gate(edgeprune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact turns out larger than the plan promised."""
    from edgeprune import result

    def larger(found: Any) -> dict[str, tuple[float, str]]:
        return {
            "macs": (9e9, "counted"),
            "latency_ms": (1.0, "x"),
            "params": (1, "x"),
            "size_bytes": (1, "x"),
            "peak_memory_bytes": (1, "x"),
        }

    monkeypatch.setattr(result, "_reached", larger)
    done = edgeprune("compress", *QUICK, "--macs", "0.5", "--out", "run", "--json")
    assert done.code == 1
    assert json.loads(done.out)["met"] is False
    assert "misses the budget: MACs 9,000,000,000, asked for at most" in done.message
    assert "quieter machine" not in done.message


def test_an_impossible_budget_says_the_floor(edgeprune: Command, here: Path) -> None:
    done = edgeprune("compress", *QUICK, "--macs", "0.001", "--out", "run")
    assert done.code == 3
    assert "the floor is" in done.message
    assert nothing_new(here)
    Path("mine").mkdir()
    assert edgeprune("compress", *QUICK, "--macs", "0.001", "--out", "mine").code == 3
    assert json.loads(Path("mine/run.json").read_text())["status"] == "failed"
    assert edgeprune("compress", *QUICK, "--macs", "0.5", "--out", "mine", "--resume").code == 0


BRANCHED = """
import torch
from tests.networks import Head, NETWORKS

def make():
    torch.manual_seed(0)
    model = NETWORKS["residual"].make()
    model.fc = torch.nn.Linear(8, 3)
    return model
"""


def test_residual_branches_may_go_as_a_whole(edgeprune: Command, here: Path) -> None:
    """So few MACs are left without a branch only; in two rounds, trained, exported and verified like any other network."""
    Path("branched.py").write_text(BRANCHED)
    made: dict[str, Any] = {}
    exec(BRANCHED, made)
    torch.save(made["make"]().state_dict(), "branched.pt")
    net = ["branched.pt", "--model", "branched.py:make"]
    common = ["compress", *net, *QUICK[len(NET) :], "--macs", "0.3", "--round-to", "8"]
    assert edgeprune(*common, "--out", "none").code == 3
    told = edgeprune("inspect", *net, "--input-shape", "1,3,8,8").out
    assert "With --min-channels 0 2 of them may go whole, with their residual branches: up to " in told
    for folder, more in (("run", []), ("rounds", ["--rounds", "2", "--epochs", "1", "--batch-size", "32"])):
        done = edgeprune(*common, "--min-channels", "0", "--json", "--out", folder, *more)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        kept = {g["name"]: g["kept"] for g in found["groups"]}
        assert kept["body.0.0"] == 8 and 0 in (kept["body.1.a.0"], kept["body.2.a.0"])
        gone = ", ".join(name for name, width in kept.items() if not width)
        assert f"residual branches could go as a whole, as asked: {gone} did" in Path(folder, "report.md").read_text()
        assert edgeprune("verify", folder).code == 0
        assert not any(name.startswith(f"{gone.partition(',')[0]}.") for name in weights(Path(folder, "model.safetensors")))


EARLY: list[tuple[list[str], int, str]] = [
    (QUICK, 2, "no budget given: set at least one of --latency-ms, --energy-mj"),
    ([*QUICK, "--macs", "0"], 2, "positive number"),
    ([*QUICK, "--macs", "nan"], 2, "positive number"),
    ([*QUICK, "--macs", "0.5", "--host", "127.0.0.1:1"], 4, "no connection to 127.0.0.1:1"),
    ([*QUICK, "--macs", "0.5", "--device", "rpi9"], 4, "'rpi9'. Did you mean rpi"),
    ([*QUICK, "--macs", "0.5", "--criterion", "l3"], 2, "'l3'"),
    ([*QUICK, "--macs", "0.5", "--allocate", "best"], 2, "'best'"),
    ([*QUICK, "--macs", "0.5", "--recover", "magic"], 2, "'magic'"),
    ([*QUICK, "--macs", "0.5", "--format", "tflight"], 2, "'tflight'"),
    ([*QUICK, "--macs", "0.5", "--quantize", "int9"], 2, "int9"),
    ([*QUICK, "--macs", "0.5", "--round-to", "0"], 2, "round_to"),
    ([*QUICK, "--macs", "0.5", "--min-channels", "-1"], 2, "min_channels"),
    ([*QUICK, "--macs", "0.5", "--max-remove", "70"], 2, "max_remove"),
    ([*QUICK, "--macs", "0.5", "--keep-dense", "a", "--keep-dense", "haed.*"], 2, "'haed.*' matches no group"),
    ([*QUICK, "--macs", "0.5", "--epochs", "-1"], 2, "epochs cannot be -1"),
    ([*QUICK, "--macs", "0.5", "--batch-size", "1"], 2, "batch_size cannot be 1"),
    ([*QUICK, "--macs", "0.5", "--lr", "nan"], 2, "lr cannot be nan"),
    ([*QUICK, "--macs", "0.5", "--mean", "a,b"], 2, "--mean and --std"),
    ([*QUICK, "--macs", "0.5", "--mean", "0.5,0.5,0.5"], 2, "give both or neither"),
    ([*QUICK, "--macs", "0.5", "--input-shape", "1,3,x"], 2, "'1,3,x'"),
    ([*QUICK, "--macs", "0.5", "--input-shape", "1,3,16,16"], 6, "(3, 8, 8), the model takes (3, 16, 16)"),
    ([*QUICK, "--macs", "0.5", "--input-shape", "1,4,8,8"], 6, "expected input[1, 4, 8, 8] to have 3 channels"),
    ([*QUICK, "--macs", "0.5", "--data", "none.npz"], 6, "none.npz"),
    ([*QUICK, "--macs", "0.5", "--data", "net.pt"], 6, "net.pt"),
    ([*QUICK, "--macs", "0.5", "--out", "net.pt"], 2, "net.pt is a file"),
    ([*QUICK, "--macs", "0.5", "--out", "net.pt/run"], 2, "net.pt is a file"),
    ([*QUICK, "--macs", "0.5", "--out", "/proc/x"], 2, "--out /proc/x cannot be written"),
    (["none.pt", "--model", FACTORY, "--macs", "0.5", "--device", "rpi4"], 6, "none.pt does not exist"),
    (["net.pt", "--macs", "0.5", "--device", "rpi4"], 2, "--model pkg.mod:factory"),
    (["net.pt", "--model", "nowhere:net", "--macs", "0.5", "--device", "rpi4"], 2, "nowhere"),
    ([*NET, "--macs", "0.5", "--device", "rpi4", "--input-shape", "1,3,8,8", "--epochs", "1"], 6, "training images"),
]


@pytest.mark.parametrize(("words", "code", "text"), EARLY, ids=[" ".join(case[0][-2:]).replace("/", "_")[-40:] for case in EARLY])
def test_refused_before_anything_is_written(edgeprune: Command, here: Path, words: list[str], code: int, text: str) -> None:
    done = edgeprune("compress", *words, *([] if "--out" in words else ["--out", "run"]))
    assert (done.code, done.out) == (code, "")
    assert text in done.message
    assert nothing_new(here)


def test_usage_errors_of_the_parser(edgeprune: Command, here: Path) -> None:
    for words in (["compress"], ["compress", *QUICK, "--macs", "half"], ["compress", *QUICK, "--macs", "0.5", "--seed", "-1"], ["fly"]):
        done = edgeprune(*words)
        assert (done.code, done.out) == (2, "")
        assert "Usage:" in done.err
    assert nothing_new(here)


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("exploded",)


def save_labels(path: Path) -> None:
    np.savez(path, allow_pickle=False, **{**arrays(), "y_val": arrays()["y_val"] + 3})


def save_objects(path: Path) -> None:
    np.savez(path, allow_pickle=True, **{**arrays(), "x_val": np.array([Bomb(), Bomb()], dtype=object)})


def save_one_class(path: Path) -> None:
    (path / "only").mkdir(parents=True)
    for number, image in enumerate(images(6)[0]):
        Image.fromarray(image).save(path / "only" / f"{number}.png")


def save_unreadable(path: Path) -> None:
    for name in ("a", "b"):
        (path / name).mkdir(parents=True)
        for number, image in enumerate(images(6)[0]):
            Image.fromarray(image).save(path / name / f"{number}.png")
    (path / "a" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")


def save_short(path: Path) -> None:
    path.write_bytes((path.parent / "data.npz").read_bytes()[:500])


def save_grey(path: Path) -> None:
    np.savez(path, allow_pickle=False, **{k: a[..., :1] if k.startswith("x") else a for k, a in arrays().items()})


DATA: list[tuple[Callable[[Path], None], str, str]] = [
    (save_labels, "bad.npz", "label 5"),
    (save_objects, "bad.npz", "Python objects"),
    (save_one_class, "bad", "only one class"),
    (save_unreadable, "bad", "0.png"),
    (save_short, "bad.npz", "bad.npz"),
    (save_grey, "bad.npz", "1,1,8,8"),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("save", "name", "text"), DATA, ids=[case[0].__name__ for case in DATA])
def test_bad_data(edgeprune: Command, here: Path, save: Callable[[Path], None], name: str, text: str) -> None:
    save(here / name)
    shape = ["--input-shape", "1,3,8,8"] if (here / name).is_dir() else []
    done = edgeprune("compress", *QUICK, "--data", name, "--macs", "0.5", "--out", "run", *shape)
    assert (done.code, done.out) == (6, "")
    assert text in done.message
    if save is save_unreadable:  # found when it is decoded
        assert not [p for p in here.rglob("*") if "tmp" in p.name or p.suffix == ".onnx"]
    else:
        assert nothing_new(here, name)
        assert edgeprune("evaluate", *NET, "--data", name, *shape).code == 6
    gc.collect()  # numpy leaves the file of a damaged .npz to the garbage collector


def test_a_pickle_is_not_run_unless_trusted(edgeprune: Command, here: Path) -> None:
    torch.save({"net": colour_net(), "bomb": Bomb()}, here / "pickled.pt")
    done = edgeprune("compress", "pickled.pt", "--macs", "0.5", "--device", "rpi4", "--input-shape", "1,3,8,8", "--out", "run")
    assert (done.code, done.out) == (6, "")
    assert "--trust-pickle" in done.message
    assert "executes code" in done.message
    assert nothing_new(here, "pickled.pt")
    torch.save(colour_net(), here / "trusted.pt")
    done = edgeprune("inspect", "trusted.pt", "--input-shape", "1,3,8,8", "--trust-pickle")
    assert done.code == 0


GREEDY = """
import torch
from torch import nn

from tests.colours import ColourNet


class Greedy(ColourNet):
    def forward(self, x):
        return super().forward(x) + torch.zeros(1 << 50).sum()


def large():
    return nn.Linear(1 << 25, 1 << 25)
"""


@pytest.mark.parametrize("network", ["Greedy", "large"])
def test_memory_that_runs_out_is_a_paragraph(edgeprune: Command, here: Path, network: str) -> None:
    """In the user's own network, whose other errors are errors of the model."""
    (here / "greedy.py").write_text(GREEDY)
    words = ["net.pt", "--model", f"greedy.py:{network}", "--macs", "0.5", "--device", "rpi4", "--input-shape", "1,3,8,8"]
    done = edgeprune("compress", *words, "--out", "run")
    assert (done.code, done.out) == (1, "")
    assert "memory ran out" in done.message and "--resume" in done.message
    assert nothing_new(here, "greedy.py")


def test_weights_that_do_not_fit(edgeprune: Command, here: Path) -> None:
    torch.save({"layer.weight": torch.zeros(3)}, here / "other.pt")
    done = edgeprune("compress", "other.pt", "--model", FACTORY, "--macs", "0.5", "--device", "rpi4", "--out", "run")
    assert done.code == 6
    assert "do not fit together" in done.message
    assert nothing_new(here, "other.pt")


def test_diverged_training(edgeprune: Command, here: Path) -> None:
    done = edgeprune("compress", *QUICK, "--macs", "0.5", "--epochs", "2", "--batch-size", "16", "--lr", "1e12", "--out", "run")
    assert (done.code, done.out) == (1, "")
    assert "smaller --lr" in done.message
    assert not Path("run/model.safetensors").exists()
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"
    resumed = edgeprune("compress", *QUICK, "--macs", "0.5", "--epochs", "1", "--lr", "0.01", "--out", "run", "--resume")
    assert resumed.code == 0


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch copying its own exported program
def test_an_exported_program(edgeprune: Command, here: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(colour_net(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, here / "net.pt2")
    done = edgeprune("compress", "net.pt2", *QUICK[3:], "--macs", "0.5", "--out", "run", "--epochs", "1", "--batch-size", "16")
    assert done.code == 0, done.err
    assert done.out.startswith("net for rpi4: ")


def test_options_come_from_a_file_and_the_command_line_wins(edgeprune: Command, here: Path) -> None:
    options = {"model": FACTORY, "data": "data.npz", "device": "rpi4", "epochs": 0, "macs": 0.9, "round-to": 2, "keep-dense": ["c"]}
    Path("c.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
    done = edgeprune("compress", "net.pt", "--config", "c.toml", "--macs", "0.5", "--out", "run", "--json")
    assert done.code == 0
    asked = json.loads(Path("run/run.json").read_text())["asked"]
    assert asked["budget"] == {"macs": 0.5}
    assert (asked["device"], asked["round_to"], asked["keep_dense"], asked["recipe"]["epochs"]) == ("rpi4-ort", 2, ["c"], 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("macs = [0.5, 0.4]\nparams = [0.5, 0.4, 0.3]", "must have equally many, got 2 and 3"),
        ("latncy-ms = 30", "which is no option of `edgeprune compress`: did you mean 'latency-ms'?"),
        ("[compress]\nmacs = 0.5", "sets 'compress', which is no option"),
        ("macs = ", "is not valid TOML"),
        ('macs = "half"', "Invalid value for '--macs'"),
    ],
)
def test_what_a_file_of_options_must_not_say(edgeprune: Command, here: Path, text: str, words: str) -> None:
    Path("c.toml").write_text(text)
    done = edgeprune("compress", *QUICK, "--config", "c.toml")
    assert done.code == 2 and words in " ".join(done.err.split())
    assert edgeprune("compress", *QUICK, "--config", "absent.toml").code == 2


def test_a_budget_missed_after_scoring_says_how_to_go_on(edgeprune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it happens on a board, whose measurements come after the scores."""

    def none(*_: Any) -> None:
        raise BudgetError("no plan was measured inside the budget.")

    words = ("compress", *QUICK, "--out", "kept", "--macs", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.choice.Chooser.choose", none)
        refused = edgeprune(*words)
    assert (refused.code, refused.out) == (3, "")
    assert "inside the budget. The scores are kept: another budget with --resume --out kept reads them back." in refused.message
    again = edgeprune(*words, "--resume")
    assert again.code == 0 and "score: read back" in Path("kept/log.txt").read_text()
