"""An array of the size of tieredImageNet: what a process holds of it stays small, and what is gathered is right.

What counts is anonymous memory, which the process alone can free. Pages of a mapped file that were read are resident as
long as there is room, and the kernel takes them back when another needs it.
"""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from l2g_meta.data.cache import create_images, write_classes

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
