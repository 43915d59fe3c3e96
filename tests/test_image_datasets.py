"""mini-ImageNet, tieredImageNet and image folders: every layout gives the same class-sorted, memory-mapped array."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pooch import HTTPDownloader

from l2g_meta.data import images
from l2g_meta.data.sets import folder, mini_imagenet, tiered_imagenet
from l2g_meta.errors import DataError

SPLITS = ("train", "validation", "test")
N_CLASSES, N_IMAGES = 3, 4


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.fixturenames:
        monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))


def noise(seed: int, height: int = 84, width: int = 84) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_folders(out: Path) -> Path:
    """out/<split>/<class>/*.jpg."""
    for s, split in enumerate(SPLITS):
        for c in range(N_CLASSES):
            class_folder = out / split / f"n{s}{c}"
            class_folder.mkdir(parents=True)
            for i in range(N_IMAGES):
                noise(100 * s + 10 * c + i).save(class_folder / f"{i}.jpg")
    return out


def write_mini_pickles(source: Path, out: Path) -> None:
    """What learn2learn's MiniImagenet reads; the classes in another order than their names."""
    for split in SPLITS:
        rows: list[np.ndarray] = []
        class_dict = {}
        for class_folder in sorted((source / split).iterdir(), reverse=True):
            decoded = [np.asarray(Image.open(f).convert("RGB")) for f in sorted(class_folder.iterdir())]
            class_dict[class_folder.name] = list(range(len(rows), len(rows) + len(decoded)))
            rows += decoded
        data = {"image_data": np.stack(rows), "class_dict": class_dict}
        (out / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(data, protocol=4))


def write_tiered(source: Path, out: Path, shape: tuple[int, ...] = (-1,), **changes: Any) -> None:
    """What learn2learn's TieredImagenet reads; images interleaved, labels in another order than the class names."""
    out.mkdir()
    for short, split in zip(("train", "val", "test"), SPLITS, strict=True):
        names = sorted((p.name for p in (source / split).iterdir()), reverse=True)
        encoded = []
        for i in range(N_IMAGES):
            for name in names:
                buffer = io.BytesIO()
                Image.open(source / split / name / f"{i}.jpg").convert("RGB").save(buffer, "PNG")
                encoded.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(shape))
        labels = np.tile(np.arange(N_CLASSES), N_IMAGES)
        data = {
            "label_specific": labels,
            "label_specific_str": names,
            "label_general": labels // 2,
            "label_general_str": ["a", "b"],
        }
        data = {key: value for key, value in (data | changes).items() if value is not None}
        (out / f"{short}_images_png.pkl").write_bytes(pickle.dumps(encoded, protocol=4))
        (out / f"{short}_labels.pkl").write_bytes(pickle.dumps(data, protocol=4))


def same(a: Any, b: Any) -> bool:
    return a.class_names == b.class_names and torch.equal(a.images, b.images) and np.array_equal(a.labels, b.labels)


@pytest.mark.parametrize("split", SPLITS)
def test_mini_layouts_agree(tmp_path: Path, split: str) -> None:
    nested = write_folders(tmp_path / "a" / "mini-imagenet").parent
    (tmp_path / "b").mkdir()
    write_mini_pickles(nested / "mini-imagenet", tmp_path / "b")
    data = mini_imagenet.load(split, root=nested)
    assert same(data, mini_imagenet.load(split, root=str(nested / "mini-imagenet")))
    assert same(data, mini_imagenet.load(split, root=tmp_path / "b"))
    s = SPLITS.index(split)
    assert data.class_names == (f"n{s}0", f"n{s}1", f"n{s}2") and (data.name, data.split) == ("mini-imagenet", split)
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and data.image_shape == (3, 84, 84)
    assert data.images.dtype == torch.uint8 and isinstance(data.mean, tuple) and data.gather([0]).dtype == torch.float32
    file = nested / "mini-imagenet" / split / f"n{s}1" / "2.jpg"  # 84 is the native size: nothing is resampled
    np.testing.assert_array_equal(data.images[4 + 2].numpy(), np.asarray(Image.open(file)))


def test_validation_may_be_called_val(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "validation").rename(tmp_path / "val")
    assert mini_imagenet.load("validation", root=tmp_path).class_names == ("n10", "n11", "n12")


def test_converted_once_and_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path / "data")
    first = mini_imagenet.load("train", root=root, image_size=8)
    file = next((tmp_path / "cache").glob("mini-imagenet-train-8-*/images.npy"))
    assert isinstance(np.load(file, mmap_mode="r"), np.memmap)
    monkeypatch.setattr(images, "create_images", lambda *_: pytest.fail("converted again"))
    monkeypatch.chdir(tmp_path)
    assert same(first, mini_imagenet.load("train", root="data", image_size=8))
    monkeypatch.undo()
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))
    noise(999).save(root / "train" / "n00" / "0.jpg")
    changed = mini_imagenet.load("train", root=root, image_size=8)
    assert not torch.equal(first.images[0], changed.images[0]) and torch.equal(first.images[1:], changed.images[1:])


def test_resize(tmp_path: Path) -> None:
    root = write_folders(tmp_path)
    data = mini_imagenet.load("test", root=root, image_size=28)
    want = Image.open(root / "test" / "n20" / "0.jpg").resize((28, 28), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(data.images[0].numpy(), np.asarray(want))


def test_an_archive_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pets.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"need a folder of images, got the file .*pets.tar; unpack it \(tar -xf"):
        folder.load("train", root=tmp_path / "pets.tar")


@pytest.mark.parametrize("module", [mini_imagenet, tiered_imagenet, folder])
def test_what_is_missing(tmp_path: Path, module: Any) -> None:
    with pytest.raises(DataError, match=r"need the folder of .* got no root; pass as root .*<split>/<class>/\*\."):
        module.load("train")
    with pytest.raises(DataError, match="which is no folder; pass as root"):
        module.load("train", root=tmp_path / "nowhere")
    with pytest.raises(DataError, match="need a split of train, validation, test, got 'val'"):
        module.load("val", root=tmp_path)
    with pytest.raises(DataError, match="need an image size"):
        module.load("train", root=tmp_path, image_size=0)
    target = tmp_path / "tiered-imagenet" if module is tiered_imagenet else tmp_path
    write_folders(target)
    for class_folder in (target / "test").iterdir():
        for file in class_folder.iterdir():
            file.unlink()
    with pytest.raises(DataError, match="got no image in .'n20', 'n21', 'n22'."):
        module.load("test", root=tmp_path)
    for class_folder in (target / "test").iterdir():
        class_folder.rmdir()
    (target / "test").rmdir()
    with pytest.raises(DataError, match=r"need the test split.* without it; pass as root"):
        module.load("test", root=tmp_path)


def test_broken_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folders(tmp_path)
    noise(0).save(root / "train" / "n00" / "1.jpg", format="GIF")
    with pytest.raises(DataError, match=r"need a readable 8-bit JPEG or PNG, got .*train/n00/1\.jpg"):
        mini_imagenet.load("train", root=root)
    file = root / "validation" / "n10" / "2.jpg"
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DataError, match=r"got .*n10/2\.jpg"):
        mini_imagenet.load("validation", root=root)
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(root / "test" / "n20" / "deep.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        mini_imagenet.load("test", root=root)
    (root / "test" / "n20" / "deep.png").unlink()
    monkeypatch.setattr(images, "MAX_PIXELS", 84 * 84 - 1)
    with pytest.raises(DataError, match="84 x 84 pixels are more than"):
        mini_imagenet.load("test", root=root)
    assert not list((tmp_path / "cache").iterdir()), "nothing half-converted stays"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "image_data"),
        ({"image_data": np.zeros((2, 4, 4, 3))}, "image_data.*got float64"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8)}, "class_dict"),
        ({"image_data": bytes(2000)}, "image_data.*got memoryview"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": bytes(2000)}, "class_dict.*got memoryview"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": bytes(2000)}}, "class_dict"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": np.arange(500)}}, "each of the 2"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {}}, "class_dict"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0, 1], "b": []}}, "class_dict"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0], "b": [0]}}, "each of the 2"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0], "b": [2]}}, "each of the 2"),
        ({"image_data": np.zeros((2, 4, 4, 3), np.uint8), "class_dict": {"a": [0], "b": ["x"]}}, "class_dict"),
    ],
)
def test_odd_mini_pickles(tmp_path: Path, data: Any, message: str) -> None:
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(DataError, match=message):
        mini_imagenet.load("train", root=tmp_path)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_tiered_agrees_with_folders(tmp_path: Path, shape: tuple[int, ...]) -> None:
    source = write_folders(tmp_path / "folders" / "tiered-imagenet")
    (tmp_path / "a").mkdir()
    write_tiered(source, tmp_path / "a" / "tiered-imagenet", shape)
    for split in SPLITS:
        data = tiered_imagenet.load(split, root=tmp_path / "a")
        assert same(data, tiered_imagenet.load(split, root=source.parent))
        assert same(data, tiered_imagenet.load(split, root=tmp_path / "a" / "tiered-imagenet"))


def test_tiered_label_files(tmp_path: Path) -> None:
    source = write_folders(tmp_path / "folders")
    cranes = {"label_specific_str": ["crane", "fox", "crane"], "label_general": None}
    write_tiered(source, tmp_path / "a", **cranes)
    assert tiered_imagenet.load("train", root=tmp_path / "a").class_names == ("crane 0", "crane 2", "fox 1")
    many = np.array(["fox", "ant", "bee", *map(str, range(3, 200))])  # long enough to be a view of the file
    write_tiered(source, tmp_path / "v", label_specific_str=many, label_general=None)
    assert tiered_imagenet.load("train", root=tmp_path / "v").class_names == ("ant", "bee", "fox")
    for i, odd in enumerate((3 * [bytes(2000)], bytes(2000))):
        write_tiered(source, tmp_path / f"w{i}", label_specific_str=odd)
    with pytest.raises(DataError, match='need texts in "label_specific_str"'):
        tiered_imagenet.load("train", root=tmp_path / "w0")
    assert tiered_imagenet.load("train", root=tmp_path / "w1").class_names == ("0", "1", "2")
    write_tiered(source, tmp_path / "x", label_specific=bytes(2000))
    with pytest.raises(DataError, match='need "label_specific"'):
        tiered_imagenet.load("train", root=tmp_path / "x")
    scalars = [np.int64(label) for label in 4 * [5, 7, 9]]
    write_tiered(source, tmp_path / "b", label_specific=scalars, label_specific_str=None)
    assert tiered_imagenet.load("train", root=tmp_path / "b").class_names == ("5", "7", "9")
    write_tiered(source, tmp_path / "c", label_specific=np.zeros(11, int), label_general=None)
    with pytest.raises(DataError, match="need a list of 11 images, as many as labels, got 12"):
        tiered_imagenet.load("train", root=tmp_path / "c")
    for i, odd in enumerate(([np.zeros(9, np.uint8)] * 12, ["text"] * 12)):
        write_tiered(source, tmp_path / f"e{i}")
        (tmp_path / f"e{i}" / "train_images_png.pkl").write_bytes(pickle.dumps(odd))
        with pytest.raises(DataError, match=r"image 2 of .*train_images_png\.pkl"):  # the first of class n00
            tiered_imagenet.load("train", root=tmp_path / f"e{i}")


def serve(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], bytes]) -> None:
    """Downloads give these bytes."""
    monkeypatch.setattr(HTTPDownloader, "__call__", lambda self, url, out, pooch: out.write(answer(url)))


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "folders")
    (tmp_path / "served").mkdir()
    write_mini_pickles(source, tmp_path / "served")
    write_tiered(source, tmp_path / "served" / "tiered-imagenet")
    urls = []

    def answer(url: str) -> bytes:
        urls.append(url)
        name = url.rpartition("/")[2].replace("tiered-imagenet-", "tiered-imagenet/")
        return (tmp_path / "served" / name).read_bytes()

    serve(monkeypatch, answer)
    root = tmp_path / "new"
    (root / "tiered-imagenet").mkdir(parents=True)
    for failed in (
        "mini-imagenet-cache-test.pkl",
        "tiered-imagenet/val_labels.pkl",
        "tiered-imagenet/val_images_png.pkl",
    ):
        (root / failed).write_bytes(b"<html>an earlier failure")
    for _ in range(2):
        assert same(mini_imagenet.load("test", root=root, download=True), mini_imagenet.load("test", root=source))
        assert tiered_imagenet.load("validation", root=root, download=True).n_classes == N_CLASSES
    assert [url.rpartition("/")[2] for url in urls] == [
        "mini-imagenet-cache-test.pkl",
        "tiered-imagenet-val_images_png.pkl",
        "tiered-imagenet-val_labels.pkl",
    ]


def test_a_download_that_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folders(tmp_path / "folders")
    write_mini_pickles(source, tmp_path)
    path = tmp_path / "mini-imagenet-cache-test.pkl"
    content = path.read_bytes()
    path.unlink()
    serve(monkeypatch, lambda url: content)
    assert mini_imagenet.load("test", root=tmp_path, image_size=8, download=True).n_classes == N_CLASSES
    path.write_bytes(content.replace(b"image_data", b"image_date"))
    with pytest.raises(DataError, match=r"got other content than its digest in mini-imagenet-cache-test\.pkl\.sha256"):
        mini_imagenet.load("test", root=tmp_path, image_size=8)


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, lambda url: b"<html>not found")
    with pytest.raises(DataError, match=r"HTML page.*by other means, put it at .*\(--root"):
        mini_imagenet.load("train", root=tmp_path / "root", download=True)

    def no_network(url: str) -> bytes:
        raise ConnectionError("no route to host")

    serve(monkeypatch, no_network)
    with pytest.raises(DataError, match="no route to host"):
        tiered_imagenet.load("train", root=tmp_path / "root", download=True)
    assert [path for path in (tmp_path / "root").rglob("*") if path.is_file()] == []


def test_folder_with_splits(tmp_path: Path) -> None:
    root = write_folders(tmp_path / "pets")
    (root / "train" / "n00" / "notes.txt").write_text("no image")
    (root / "train" / "n00" / "._0.jpg").write_text("no image either")
    (root / "train" / ".cache").mkdir()
    (root / "readme.txt").write_text("no image")
    data = folder.load("train", root=root)
    assert same(data, mini_imagenet.load("train", root=root)) and data.name == "pets"


def test_folder_images_of_any_kind_and_size(tmp_path: Path) -> None:
    class_folder = tmp_path / "train" / "a"
    class_folder.mkdir(parents=True)
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = [255, 0, 0]  # the central square is red
    Image.fromarray(wide).save(class_folder / "0.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(class_folder / "1.PNG")
    Image.fromarray(np.full((50, 40), 200, np.uint8)).save(class_folder / "2.jpeg")
    halves = np.zeros((20, 20, 3), np.uint8)
    halves[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the white left becomes the top
    Image.fromarray(halves).save(class_folder / "3.JPG", quality=95, exif=exif)
    data = folder.load("train", root=tmp_path, image_size=10)
    assert data.images.shape == (4, 10, 10, 3)
    assert (data.images[:2] == torch.tensor([255, 0, 0])).all()
    assert (data.images[2].int() - 200).abs().max() < 3
    assert data.images[3, :4].min() > 200 and data.images[3, 6:].max() < 50


def flat_folder(root: Path, names: Iterator[str] | list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for j in range(2):
            noise(10 * i + j, 6, 6).save(root / name / f"{j}.png")
    return root


def test_folder_splits_classes_by_seed(tmp_path: Path) -> None:
    names = ["train", *(f"c{i}" for i in range(11))]  # a class of locomotives is no split
    root = flat_folder(tmp_path / "a", names)
    loaded = {split: folder.load(split, root=root, image_size=6) for split in SPLITS}
    parts = {split: data.class_names for split, data in loaded.items()}
    assert sorted(sum(parts.values(), ())) == sorted(names) and [len(p) for p in parts.values()] == [8, 2, 2]
    other = flat_folder(tmp_path / "b", names[::-1])
    assert {split: folder.load(split, root=other, image_size=6).class_names for split in SPLITS} == parts
    assert folder.load("test", root=root, image_size=6, split_seed=1).class_names != parts["test"]
    file = root / parts["test"][0] / "1.png"
    np.testing.assert_array_equal(loaded["test"].images[1].numpy(), np.asarray(Image.open(file)))


def test_names_of_classes_are_any_bytes(tmp_path: Path) -> None:
    for name in ["a", "b\udcff", *"cdefghij"]:
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("L", (6, 6)).save(tmp_path / "data" / name / f"{k}.png")
    parts = [folder.load(split, root=tmp_path / "data", image_size=6).class_names for split in SPLITS]
    assert "b\udcff" in sum(map(list, parts), [])


def test_split_classes() -> None:
    splits = folder.split_classes([f"c{i}" for i in range(100)], 3)
    assert {split: len(names) for split, names in splits.items()} == {"train": 64, "validation": 16, "test": 20}
    assert splits == folder.split_classes([f"c{i}" for i in reversed(range(100))], 3)
    assert {split: len(names) for split, names in folder.split_classes(list("abcdef"), 1).items()} == {
        "train": 2, "validation": 2, "test": 2
    }  # fmt: skip
    with pytest.raises(DataError, match="need 6 classes, two each"):
        folder.split_classes(list("abcde"))


def test_folder_errors(tmp_path: Path) -> None:
    root = flat_folder(tmp_path / "own", list("abcdef"))
    (root / "b" / "1.png").unlink()
    with pytest.raises(DataError, match=r"need 2 images per class.*got 1 of .'b'."):
        folder.load("train", root=root)
    (root / "b" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"need a readable 8-bit JPEG or PNG, got .*b/1\.png"):
        for split in SPLITS:
            folder.load(split, root=root)


@pytest.fixture
def real() -> Path:
    if "L2G_DATA" not in os.environ:
        pytest.skip("the real images are not here; set L2G_DATA to the folder that holds them")
    return Path(os.environ["L2G_DATA"]).expanduser()


@pytest.mark.parametrize(("split", "n_classes"), [("train", 64), ("validation", 16), ("test", 20)])
def test_real_mini_imagenet(real: Path, split: str, n_classes: int) -> None:
    if not (real / "mini-imagenet").is_dir():
        pytest.skip(f"no mini-imagenet/ in L2G_DATA ({real})")
    data = mini_imagenet.load(split, root=real, image_size=28)
    assert [len(rows) for rows in data.index] == [600] * n_classes and data.images.shape[1:] == (28, 28, 3)
    assert len(set(data.class_names)) == n_classes and all(name.startswith("n") for name in data.class_names)


def test_real_mini_imagenet_pickle(real: Path, tmp_path: Path) -> None:
    name = "mini-imagenet-cache-validation.pkl"
    if not (real / name).is_file() or not (real / "mini-imagenet").is_dir():
        pytest.skip(f"no mini-imagenet/ and {name} in L2G_DATA ({real})")
    (tmp_path / name).symlink_to(real / name)
    assert same(
        mini_imagenet.load("validation", root=tmp_path, image_size=28),
        mini_imagenet.load("validation", root=real, image_size=28),
    )


@pytest.mark.parametrize("split", SPLITS)
def test_real_tiered_imagenet(real: Path, split: str) -> None:
    if not (real / "tiered-imagenet").is_dir():
        pytest.skip(f"no tiered-imagenet/ in L2G_DATA ({real})")
    data = tiered_imagenet.load(split, root=real, image_size=28)
    part, whole = {"train": (31, 351), "validation": (8, 97), "test": (19, 160)}[split]
    assert data.n_classes in (part, whole)
    assert min(len(rows) for rows in data.index) >= 600
