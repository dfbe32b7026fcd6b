import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from edgeprune.data import IMAGENET_MEAN, IMAGENET_STD, Data, Split, load_data
from edgeprune.errors import DataError, UsageError

FUNCTIONS = """
import numpy as np
rng = np.random.default_rng(0)
def part(n):
    return rng.integers(0, 256, (n, 6, 6, 3), np.uint8), np.arange(n) % 3
def pair():
    return part(12), part(6)
def one():
    return part(12)[0]
def raising():
    raise OSError("no network")
constant = 3
"""


def images(n: int, shape: tuple[int, ...] = (6, 6, 3)) -> NDArray[np.uint8]:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)


def labels(n: int, classes: int = 3) -> NDArray[np.int64]:
    return np.arange(n) % classes


def pair(n: int = 12, classes: int = 3) -> Data:
    return load_data(((images(n), labels(n, classes)), (images(6), labels(6))))


def everything(split: Split, **options: Any) -> tuple[Tensor, Tensor]:
    batches = list(split.batches(5, **options))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def image_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", size, (number * 40, i * 10, 7)).save(root / name / f"{i:02d}.png")
    return root


class Pictures(Dataset[Any]):
    """A dataset of Pillow images, uint8 tensors or float tensors, without `targets`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.x = images(9)

    def __len__(self) -> int:
        return 9

    def __getitem__(self, i: int) -> tuple[Any, int]:
        if self.kind == "pillow":
            return Image.fromarray(self.x[i]), i % 3
        tensor = torch.from_numpy(self.x[i]).permute(2, 0, 1)
        return (tensor if self.kind == "uint8" else tensor / 255), i % 3


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_normalised_batches() -> None:
    data = pair()
    x, y = everything(data.train)
    expected = (torch.from_numpy(images(12)).permute(0, 3, 1, 2) / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(3, 1, 1)
    assert torch.allclose(x, expected, atol=1e-6)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert y.tolist() == labels(12).tolist()
    assert data.preprocessing.to_json() == {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "size": [6, 6]}
    assert data.sample_shape == (1, 3, 6, 6)


def test_given_and_grey_constants() -> None:
    x, _ = everything(load_data(((images(6), labels(6)), None), mean=[0.1] * 3, std=[2] * 3).val)
    assert x.max() <= 0.45
    grey = load_data(((images(6, (6, 6)), labels(6)), (images(6, (6, 6)), labels(6))))
    assert (grey.preprocessing.mean, grey.sample_shape) == ((0.5,), (1, 1, 6, 6))


def test_shuffle_and_limit() -> None:
    split = pair().train
    x, y = everything(split, shuffle_seed=3)
    again, _ = everything(split, shuffle_seed=3)
    other, _ = everything(split, shuffle_seed=4)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert sorted(y.tolist()) == sorted(labels(12).tolist())
    assert torch.equal(everything(split, shuffle_seed=3, limit=7)[0], x[:7])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=3, max_size=40), st.data())
def test_hold_out_is_even_and_complete(classes: list[int], draw: st.DataObject) -> None:
    y = np.array([*classes, 0, 1])
    n = draw.draw(st.integers(1, len(y) - 1))
    split = load_data(((images(len(y), (2, 2, 3)), y), (images(6, (2, 2, 3)), labels(6)))).train
    rest, held = split.hold_out(n, 7)
    assert len(held) == n
    assert sorted([*rest.indices, *held.indices]) == list(range(len(y)))
    assert held.indices.tolist() == split.hold_out(n, 7)[1].indices.tolist()
    counts, available = np.bincount(held.labels, minlength=4), np.bincount(y, minlength=4)
    assert max(counts) - min((c for c, a in zip(counts, available, strict=True) if c < a), default=max(counts)) <= 1


def test_hold_out_depends_on_the_seed_and_has_limits() -> None:
    split = pair(30).train
    assert split.hold_out(9, 1)[1].indices.tolist() != split.hold_out(9, 2)[1].indices.tolist()
    assert split.subset([4, 2]).labels.tolist() == [1, 2]
    for n in (0, 30):
        with pytest.raises(DataError, match=f"cannot set {n} of 30"):
            split.hold_out(n, 0)
    rest, held = split.hold_out_tenth(1)
    assert held is not None and held.indices.tolist() == split.hold_out(3, 1)[1].indices.tolist()
    assert len(rest) == 27
    few = split.subset(range(9))
    assert few.hold_out_tenth(1) == (few, None)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_folder_is_split_per_class(tmp_path: Path, seed: int) -> None:
    root = image_folder(tmp_path, {"cat": 10, "dog": 5, "eel": 1})
    data = load_data(root, size=8, seed=seed)
    assert data.classes == ("cat", "dog", "eel")
    assert np.bincount(data.val.labels, minlength=3).tolist() == [2, 1, 0]
    assert len(data.train) == 13
    assert load_data(root, size=8, seed=seed).val.indices.tolist() == data.val.indices.tolist()
    assert data.sample_shape == (1, 3, 8, 8)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_train_and_val_folders(tmp_path: Path, val: str) -> None:
    image_folder(tmp_path / "train", {"cat": 3, "dog": 3})
    image_folder(tmp_path / val, {"dog": 2})
    data = load_data(str(tmp_path), size=(6, 8))
    assert (len(data.train), data.val.labels.tolist(), data.sample_shape) == (6, [1, 1], (1, 3, 6, 8))


def test_val_folder_alone_is_enough_to_evaluate(tmp_path: Path) -> None:
    image_folder(tmp_path / "val", {"cat": 3, "dog": 3})
    data = load_data(tmp_path, size=8)
    assert (len(data.train), len(data.val)) == (0, 6)
    with pytest.raises(DataError, match="no images for this part"):
        next(data.train.batches(2))


def test_images_are_resized_and_cropped_in_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (255, 0, 0)  # the centre square
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(wide).save(tmp_path / name / f"{i}.png")
    x, _ = everything(load_data(tmp_path, size=4, mean=[0] * 3, std=[1] * 3).val)
    assert torch.equal(x[0], torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 4, 4))
    assert load_data(tmp_path).sample_shape == (1, 3, 224, 224)


def test_grey_and_transparent_images_become_rgb_and_one_mean_means_grey(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        (tmp_path / mode).mkdir()
        for i in range(2):
            Image.new(mode, (8, 8)).save(tmp_path / mode / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    x, _ = everything(load_data(tmp_path, size=8).train)
    assert x.shape == (5, 3, 8, 8)
    assert load_data(tmp_path, size=8, mean=[0.5], std=[0.5]).sample_shape == (1, 1, 8, 8)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    photo = Image.new("RGB", (8, 8))
    photo.paste((255, 255, 255), (0, 0, 8, 4))  # white above; upright: white on the right
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            photo.save(tmp_path / name / f"{i}.png", exif=exif)
    x, _ = everything(load_data(tmp_path, size=8, mean=[0] * 3, std=[1] * 3).val)
    assert x[0, :, :, 5:].min() == 1
    assert x[0, :, :, :3].max() == 0


def test_photos_without_classes(tmp_path: Path) -> None:
    image_folder(tmp_path, {".": 10})
    data = load_data(tmp_path, size=8)
    x, y = everything(data.train)
    assert (x.shape, set(y.tolist()), data.classes, data.train.labelled) == ((8, 3, 8, 8), {-1}, None, False)
    assert [len(part) for part in data.train.hold_out(3, 0)] == [5, 3]
    data.check(classes=2)
    with pytest.raises(DataError, match=r"has no labels.*class folders"):
        _ = data.train.labels


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path, {"cat": 4, "dog": 4})
    broken = tmp_path / "dog" / "01.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(DataError, match=r"dog/01\.png cannot be read"):
        load_data(tmp_path, size=8)


def test_an_image_that_breaks_off_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    image_folder(tmp_path, {"cat": 4, "dog": 4})
    whole = tmp_path / "dog" / "01.png"
    broken = whole.with_suffix(".bmp")
    Image.open(whole).save(broken)
    whole.unlink()
    broken.write_bytes(broken.read_bytes()[:-40])
    data = load_data(tmp_path, size=8)
    with pytest.raises(DataError, match=r"dog/01\.bmp cannot be read"):
        everything(data.train), everything(data.val)


def test_files_that_are_no_images_are_left_alone(tmp_path: Path) -> None:
    image_folder(tmp_path, {"cat": 2, "dog": 2, ".cache": 2})
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "cat" / "._00.png").write_text("x")
    data = load_data(tmp_path, size=8)
    assert (data.classes, len(data.train) + len(data.val)) == (("cat", "dog"), 4)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"cat": 4}, "only one class"),
        ({"cat": 4, "dog": 0}, r"class folder .*dog holds no images"),
        ({}, "holds no images"),
        ({"cat": 1, "dog": 1}, "too small"),
        ({"train/cat": 2, "val/cat": 2, "train/dog": 2, "val/eel": 2}, "'eel'"),
    ],
)
def test_folder_errors(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    image_folder(tmp_path, counts)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path, size=8)


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=images(9), y_train=labels(9), x_val=images(6), y_val=labels(6), classes=np.array(["a", "b", "c"]))
    data = load_data(tmp_path / "a.npz")
    assert (len(data.train), len(data.val), data.classes) == (9, 6, ("a", "b", "c"))
    np.savez(tmp_path / "val.npz", x_val=images(6).transpose(0, 3, 1, 2) / 255, y_val=labels(6))
    data = load_data(tmp_path / "val.npz")
    assert (len(data.train), len(data.val), data.preprocessing.mean) == (0, 6, None)
    assert torch.allclose(everything(data.val)[0], torch.from_numpy(images(6)).permute(0, 3, 1, 2) / 255)
    np.savez(tmp_path / "train.npz", x_train=images(30), y_train=labels(30))
    assert [len(part) for part in (load_data(tmp_path / "train.npz").train, load_data(tmp_path / "train.npz").val)] == [24, 6]


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=images(6), y_train=np.array([{"a": 1}] * 6, object))
    with pytest.raises(DataError, match="executes code"):
        load_data(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_npz_errors(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=images(3))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read" if content is not None else "images: name them x_train"):
        load_data(path)


def test_cut_off_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x_train=images(30), y_train=labels(30))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        load_data(path)


NAN = np.full((6, 3, 6, 6), np.nan)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(6), np.zeros(6, int), "only one class"),
        (images(6), np.arange(6) / 2, "integer class numbers"),
        (images(6), np.eye(6, dtype=int), "integer class numbers"),
        (images(6), np.arange(6) - 1, "label -1"),
        (images(6), labels(5), "6 images but 5 labels"),
        (images(6).reshape(6, -1), labels(6), "shape"),
        (images(6, (3, 8, 8)), labels(6), "uint8 images are"),
        (np.zeros((6, 8, 8, 3)), labels(6), "floats"),
        (images(6).astype(int), labels(6), "type int64"),
        (NAN, labels(6), "NaN or infinite values"),
        (images(0), labels(0), "is empty"),
    ],
)
def test_array_errors(x: NDArray[Any], y: NDArray[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(((x, y), (x, y)))


def test_labels_beyond_the_model() -> None:
    pair().check(classes=3)
    with pytest.raises(DataError, match="label 2 but the model has 2 outputs"):
        pair().check(classes=2)


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="training images"):
        load_data(((images(6), labels(6)), (images(6, (8, 8, 3)), labels(6))))
    with pytest.raises(DataError, match="one part"):
        load_data(((images(6), labels(6)), (images(6), None)))
    with pytest.raises(DataError, match="6x6, not 8x8"):
        load_data(((images(6), labels(6)), (images(6), labels(6))), size=8)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (images(6), {"mean": [0.5] * 3}, "belong together"),
        (images(6), {"mean": [0.5], "std": [0.5]}, "must have 3 values"),
        (images(6), {"mean": [0.5] * 3, "std": [0.0] * 3}, "above 0"),
        (np.zeros((6, 3, 6, 6)), {"mean": [0.5] * 3, "std": [0.5] * 3}, "already preprocessed"),
    ],
)
def test_option_errors(x: NDArray[Any], options: dict[str, list[float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_data(((x, labels(6)), (x, labels(6))), **options)  # type: ignore[arg-type]


def test_function(here: Path) -> None:
    data = load_data("mine:pair")
    assert (len(data.train), len(data.val)) == (12, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine:one", "returned ndarray"),
        ("mine:raising", "OSError: no network"),
        ("mine:constant", "is not a function"),
        ("mine:gone", "has no 'gone'"),
        ("no_module:x", "no_module"),
        ("gone/", "does not exist"),
        ("mine.py", "neither a folder nor an .npz"),
    ],
)
def test_spec_errors(here: Path, spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(spec)


@pytest.mark.parametrize("kind", ["pillow", "uint8", "float"])
def test_datasets(kind: str) -> None:
    data = load_data((Pictures(kind), Pictures(kind)))
    x, y = everything(data.train)
    expected = torch.from_numpy(Pictures(kind).x).permute(0, 3, 1, 2) / 255
    if kind != "float":
        expected = (expected - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert torch.allclose(x, expected, atol=1e-6)
    assert y.tolist() == labels(9).tolist()


def test_batches_from_python() -> None:
    x, y = torch.rand(30, 3, 6, 6), torch.from_numpy(labels(30))

    def generate() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, 30, 10):
            yield x[i : i + 10], y[i : i + 10]

    for spec in (DataLoader(TensorDataset(x, y), batch_size=7), generate(), list(generate()), (x, y)):
        data = load_data(spec)
        assert (len(data.train), len(data.val)) == (24, 6)
    both = load_data((DataLoader(TensorDataset(x, y), 7), list(generate())))
    assert torch.equal(everything(both.val)[0], x)
    nothings: list[object] = [[], 3, {"x": x}, x]
    for nothing in nothings:
        with pytest.raises(DataError):
            load_data(nothing)


def test_dataset_with_uneven_images() -> None:
    with pytest.raises(DataError, match=r"image 1 .*must all be alike"):
        everything(load_data([(images(6)[0], 0), (images(6)[0, :4], 1), (images(6)[0], 0)] * 4).train)


def test_fingerprint(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"cat": 3, "dog": 3})
    prints = {load_data(root, size=8).fingerprint, load_data(root, size=8).fingerprint}
    assert len(prints) == 1
    prints |= {load_data(root, size=6).fingerprint, load_data(root, size=8, seed=1).fingerprint}
    Image.new("RGB", (12, 10), (1, 2, 3)).save(root / "cat" / "00.png")
    prints.add(load_data(root, size=8).fingerprint)
    (root / "cat" / "00.png").rename(root / "cat" / "09.png")
    prints.add(load_data(root, size=8).fingerprint)
    prints |= {pair().fingerprint, pair(13).fingerprint, pair(12, 2).fingerprint}
    assert len(prints) == 8


def test_an_abandoned_pass_ends_its_threads(tmp_path: Path) -> None:
    data = load_data(image_folder(tmp_path, {"cat": 8, "dog": 8}), size=8)
    batches = data.train.batches(2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    x, _ = everything(data.train)
    assert len(x) == len(data.train)
