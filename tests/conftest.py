"""Shared fixtures: tiny tasks and models, and the switch between learn2learn and the built-in clone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable

# Tests never read or write the user's converted data; one folder serves all tests of a process.
os.environ["L2G_CACHE"] = tempfile.mkdtemp(prefix="l2g-tests-")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2g_meta.inner import clone


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def blobs(root: Path, classes: int, each: int, *, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Path:
    """A folder of PNG files, ``root/class00/0.png``: blurred noise, alike within a class."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        folder, centre = root / f"class{c:02d}", rng.integers(0, 200, (4, 4, 3))
        folder.mkdir(parents=True)
        for k in range(each):
            pixels = (centre + rng.integers(0, 56, (4, 4, 3))).astype(np.uint8)
            Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(folder / f"{k}.png")
    return root


@pytest.fixture(name="blobs", scope="session")
def _blobs() -> Callable[..., Path]:
    return blobs


@pytest.fixture(scope="session")
def blob_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained for two updates on a folder of 16-pixel images, kept beside it as ``data``."""
    from l2g_meta.training.config import Config
    from l2g_meta.training.loop import train

    base = tmp_path_factory.mktemp("blobs")
    for k, split in enumerate(("train", "validation", "test")):
        blobs(base / "data" / split, 6, 12, seed=k, size=(20, 16))
    config = Config(
        data="folder", root=str(base / "data"), image_size=16, ways=3, queries=2, pairs=1, iterations=2, eval_every=2,
        eval_episodes=4, device="cpu",
    )  # fmt: skip
    train(config, base / "run", progress=False)
    return base / "run"


@pytest.fixture(params=["learn2learn", "built-in"])
def either_backend(request, monkeypatch):
    """Runs a test with learn2learn's clone and with the built-in one."""
    clone.backend.cache_clear()
    if request.param == "built-in":
        monkeypatch.setattr(clone, "has_learn2learn", lambda: False)
    else:
        pytest.importorskip("learn2learn", reason="learn2learn is not installed")
    yield request.param
    clone.backend.cache_clear()


@pytest.fixture(scope="session")
def trained_glyphs(tmp_path_factory):
    """Three short runs on glyphs: two seeds of episodic training, one of L2G."""
    from l2g_meta.training.config import Config
    from l2g_meta.training.loop import train

    folder, runs = tmp_path_factory.mktemp("trained"), []
    for name, method, seed in (("episodic-seed0", "episodic", 0), ("episodic-seed1", "episodic", 1), ("l2g", "l2g", 0)):
        config = Config(
            method=method,
            seed=seed,
            iterations=8,
            eval_every=4,
            eval_episodes=5,
            pairs=1,
            backbone="conv4-32",
            device="cpu",
        )
        train(config.resolved(), folder / name)
        runs.append(folder / name)
    return runs
