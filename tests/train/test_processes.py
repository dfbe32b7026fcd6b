"""Several processes compute what one computes: batch norms, a whole run by accelerate's launcher, and who writes files."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn

from edgeprune.cli import main
from edgeprune.train.processes import _GlobalStatistics, processes
from tests.colours import FACTORY, weights, write_npz, write_weights


def test_one_process_is_alone() -> None:
    here = processes()
    assert (here.index, here.count, here.leads) == (0, 1, True)
    assert here.told({"a": 1}) == {"a": 1}
    tensor = torch.ones(3)
    here.sum([tensor])
    assert torch.equal(tensor, torch.ones(3))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one, which goes through all exchanges."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (8, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norms_are_torch_s(group: None, shape: tuple[int, ...], affine: bool) -> None:
    """Outputs, running statistics and gradients, also of channels far from zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.01 + torch.arange(5).view(1, 5, *[1] * (len(shape) - 2)) * 3
    plain = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(5, momentum=0.3, affine=affine)
    ours = copy.deepcopy(plain)
    found: list[list[Tensor]] = []
    for norm, mode in ((plain, None), (ours, _GlobalStatistics())):
        given = x.clone().requires_grad_()
        if mode is None:
            out = norm(given)
        else:
            with mode:
                out = norm(given)
        (out * torch.arange(out.numel()).view(out.shape).cos()).sum().backward()
        assert given.grad is not None
        found.append([out.detach(), given.grad, *(p.grad for p in norm.parameters() if p.grad is not None), *norm.buffers()])
    assert len(found[0]) == len(found[1]) == (7 if affine else 5)
    for theirs, own in zip(*found, strict=True):
        assert torch.allclose(own, theirs, rtol=1e-3, atol=2e-4 * float(theirs.abs().max()))


def test_batch_norms_in_eval_mode_are_left_alone() -> None:
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)
    with _GlobalStatistics():
        assert torch.equal(norm(x), norm(x))
    assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


WORDS = [
    *f"compress net.pt --model {FACTORY} --data data.npz --device rpi4 --macs 0.5".split(),
    *"--epochs 3 --lr 0.02 --batch-size 16 --precision fp32 --seed 3 --json".split(),
]


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of the README: 87 images in batches of 16, the last one of 7, so parts are uneven too."""
    write_weights(tmp_path / "net.pt")
    write_npz(tmp_path / "data.npz")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgeprune", *WORDS, "--out", "one"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    capsys.readouterr()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "edgeprune"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *WORDS, "--out", "two"], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one object: one process prints
    one, two = (json.loads(Path(folder, "result.json").read_text()) for folder in ("one", "two"))
    assert printed["curve"] == two["curve"]
    assert [e["train_loss"] for e in two["curve"]] == pytest.approx([e["train_loss"] for e in one["curve"]], rel=1e-4)
    assert [e["val_loss"] for e in two["curve"]] == pytest.approx([e["val_loss"] for e in one["curve"]], rel=1e-3)
    first, second = weights(Path("one/model.safetensors")), weights(Path("two/model.safetensors"))
    assert all(torch.allclose(second[name], t, rtol=1e-3, atol=1e-4) for name, t in first.items() if t.is_floating_point())
    ignored = {"checkpoints/epochs"}
    files = [sorted(str(p.relative_to(f)) for p in Path(f).rglob("*") if str(p.parent.name) not in ignored) for f in ("one", "two")]
    assert files[0] == files[1]
    log = Path("two/log.txt").read_text()
    assert log.count("started:") == log.count("finetune:") == log.count("export:") == 1
    assert done.stderr.count("the run folder is two") == 1
