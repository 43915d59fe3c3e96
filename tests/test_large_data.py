"""An array of the size of tieredImageNet: what a process holds of it stays small, and what is gathered is right.

What counts is anonymous memory, which the process alone can free. Pages of a mapped file that were read are resident as
long as there is room, and the kernel takes them back when another needs it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2g_meta.algorithm import L2GWrapper
from l2g_meta.classify.classifier import FewShotClassifier
from l2g_meta.classify.photo_folder import PhotoReader, Row, fit_folder, right_of
from l2g_meta.classify.photos import Preparation
from l2g_meta.data import ClassDataset, Episodes, TaskPairs, load
from l2g_meta.data.cache import create_images, write_classes
from l2g_meta.data.identity import identity
from l2g_meta.data.sets import mini_imagenet, tiered_imagenet
from l2g_meta.models.heads import HEADS
from l2g_meta.models.metric import MetricModel

N_IMAGES, N_CLASSES = 448_695, 351  # of tieredImageNet's training split
GB = 1e9

needs_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to see memory")

STATUS = """
import json, os, sys
from pathlib import Path

def resident(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
"""

READ = (
    STATUS
    + """
from l2g_meta.data import TaskPairs
from l2g_meta.data.cache import open_dataset

folder, marked = Path(sys.argv[1]), json.loads(sys.argv[2])
before = resident("RssAnon")
data = open_dataset(folder, name="generated", split="train")
pairs = TaskPairs(data, ways=5, shots=1, queries=15, seed=1)
first = pairs[0]
anonymous, read, gather = 0, set(), type(data).gather
type(data).gather = lambda self, rows, **options: (read.add(len(rows)), gather(self, rows, **options))[1]
for k in range(1, 200):
    pairs[k]
    anonymous = max(anonymous, resident("RssAnon"))
type(data).gather = gather
x = data.gather(marked)
again = pairs[0]
same = all((a == b).all().item() for t, u in zip(first, again) for a, b in zip(t[:4], u[:4]))
print(json.dumps({
    "anonymous": anonymous - before,
    "images": data.images.nbytes,
    "x": ((x * 0.5 + 0.5) * 255).round().int().flatten(1)[:, [0, -1]].tolist(),
    "classes": [int(data.labels[row]) for row in marked],
    "same": same,
    "read": sorted(read),
}))
"""
)


def run(code: str, *arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_linux
def test_tasks_from_an_array_of_the_size_of_tiered_imagenet(tmp_path: Path) -> None:
    """448,695 images, 9.5 GB on a sparse file, of which 200 pairs read 32,000."""
    marked = [0, 1, 123_456, 300_000, N_IMAGES - 1]
    images = create_images(tmp_path, (N_IMAGES, 84, 84, 3))
    for value, row in enumerate(marked, 1):
        images[row] = 10 * value
        images[row, -1, -1, -1] = 10 * value + 1
    del images
    labels = np.arange(N_IMAGES) * N_CLASSES // N_IMAGES
    write_classes(tmp_path, labels, [f"n{c:03}" for c in range(N_CLASSES)])
    file = (tmp_path / "images.npy").stat()
    if file.st_blocks * 512 > GB:
        pytest.skip("needs a file system with sparse files")
    found = run(READ, str(tmp_path), json.dumps(marked))
    assert found["images"] == N_IMAGES * 84 * 84 * 3 > 9.4 * GB
    assert found["anonymous"] < 0.2 * GB
    assert found["x"] == [[10 * value, 10 * value + 1] for value in range(1, 6)]
    assert found["classes"] == labels[marked].tolist() and found["same"]
    assert found["read"] == [2 * 5 * 16]  # of a pair its own images alone, as on mini-ImageNet


CONVERT = (
    STATUS
    + """
from threading import Thread
from l2g_meta.data.sets import tiered_imagenet

anonymous, before = 0, resident("RssAnon")
def watch():
    global anonymous
    while True:
        anonymous = max(anonymous, resident("RssAnon"))
Thread(target=watch, daemon=True).start()
data = tiered_imagenet.load("train", root=sys.argv[1])
print(json.dumps({"anonymous": anonymous - before, "row": data.images[7, 0, 0].tolist(), "n": len(data)}))
"""
)


@needs_linux
def test_a_pickle_is_converted_without_being_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))
    rng, n = np.random.default_rng(0), 6000
    pictures = [rng.integers(0, 256, (84, 84, 3), dtype=np.uint8) for _ in range(20)]
    encoded = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG", compress_level=0)
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8).reshape(-1, 1))
    images = [encoded[i % 20].copy() for i in range(n)]
    (tmp_path / "train_images_png.pkl").write_bytes(pickle.dumps(images, protocol=4))
    (tmp_path / "train_labels.pkl").write_bytes(pickle.dumps({"label_specific": np.arange(n) * 10 // n}, protocol=4))
    found = run(CONVERT, str(tmp_path))
    size = (tmp_path / "train_images_png.pkl").stat().st_size
    assert found["n"] == n and found["row"] == pictures[7][0, 0].tolist()
    assert found["anonymous"] < size / 2, size


class Pooled(torch.nn.Module):
    """The mean colour, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, 3, H, W) -> (n, 3, 1, 1)
        return (x.mean((2, 3)) * self.scale)[..., None, None]


def photos(root: Path, n: int) -> Path:
    """A folder of n classes with the same two images."""
    for k in range(n):
        (folder := root / f"c{k:06}").mkdir(parents=True)
        if k % 10_000 == 0:  # a file has some 65,000 names at most
            Image.new("RGB", (2, 2)).save(first := folder / "0.png")
        else:
            os.link(first, folder / "0.png")
        os.link(first, folder / "1.png")
    return root


def folder_of_classes(root: Path, n: int) -> Callable[[], object]:
    photos(root / "photos", n)
    return lambda: identity(load("folder", "train", root=root / "photos", image_size=2))


def mini_pickle(root: Path, n: int) -> Callable[[], object]:
    rows = {f"c{k}": [2 * k, 2 * k + 1] for k in range(n)}
    values = {"image_data": np.zeros((2 * n, 2, 2, 3), np.uint8), "class_dict": rows}
    (root / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps(values))
    return lambda: mini_imagenet.load("test", root=root, image_size=2)


def tiered_labels(root: Path, n: int) -> Callable[[], object]:
    names = {f"label_{which}_str": [f"{which} {k}" for k in range(n)] for which in ("specific", "general")}
    labels = {f"label_{which}": np.arange(2 * n) // 2 for which in ("specific", "general")}
    (root / "test_labels.pkl").write_bytes(pickle.dumps(labels | names))
    (root / "test_images_png.pkl").write_bytes(b"")
    return lambda: tiered_imagenet._read_labels(root / "test_labels.pkl")


def pairs(root: Path, n: int) -> Callable[[], object]:
    data = ClassDataset(np.zeros((2 * n, 2, 2, 3), np.uint8), np.arange(2 * n) // 2)
    return lambda: [TaskPairs(data, ways=5, shots=1, queries=1)[k] for k in range(20)]


def supports(root: Path, n: int) -> Callable[[], object]:
    photos(root / "support", n)
    preparation = Preparation(2, 3, (0.5,), (0.5,))
    model = MetricModel(Pooled(), HEADS["prototypical"]())
    classifier = FewShotClassifier(model, preparation=preparation, batch_size=256, device="cpu")
    return lambda: fit_folder(classifier, PhotoReader(preparation, 64), root / "support")


def rows_of_classes(root: Path, n: int) -> Callable[[], object]:
    rows = [Row(f"q/c{k}/1.png", f"c{k}", 1.0, "") for k in range(n)]
    return lambda: right_of(rows, [f"c{k}" for k in range(n)])


MANY = [folder_of_classes, mini_pickle, tiered_labels, pairs, supports, rows_of_classes]


def seconds(make: Callable[[Path, int], Callable[[], object]], root: Path, n: int) -> float:
    """Of this process, not of the clock."""
    root.mkdir()
    use = make(root, n)
    began = time.process_time()
    use()
    found = time.process_time() - began
    shutil.rmtree(root)
    return found


@pytest.fixture
def no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L2G_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("make", [tiered_labels, rows_of_classes])
def test_time_does_not_grow_with_the_square_of_the_classes(make, tmp_path: Path, no_waiting: None) -> None:
    once = seconds(make, tmp_path / "few", 4_000)
    assert seconds(make, tmp_path / "many", 32_000) < 24 * once + 0.2  # linear: 8, square: 64


@pytest.mark.slow
@pytest.mark.parametrize("make", MANY)
def test_100_000_classes(make, tmp_path: Path, no_waiting: None, capsys: pytest.CaptureFixture[str]) -> None:
    few, many = seconds(make, tmp_path / "few", 12_500), seconds(make, tmp_path / "many", 100_000)
    with capsys.disabled():
        print(f"\n{make.__name__}: 12,500 classes {few:.2f} s, 100,000 classes {many:.2f} s of one core")
    assert many < 24 * few + 0.5


@pytest.mark.parametrize("head", ["prototypical", "matching"])
def test_1000_way_tasks(head: str) -> None:
    """A pair of them gives finite gradients, in the memory that their scores take."""
    data = ClassDataset(np.random.default_rng(0).integers(0, 256, (4000, 4, 4, 3), np.uint8), np.arange(4000) // 2)
    model = MetricModel(Pooled(), HEADS[head]())
    loss = L2GWrapper(model, 0.01)(*TaskPairs(data, ways=1000, shots=1, queries=1)[0])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.encoder.parameters())
    task = Episodes(data, ways=1000, shots=1, queries=1)[0]
    assert task.check() is task and task.query_y.tolist() == list(range(1000))
