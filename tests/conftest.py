"""Shared fixtures: tiny tasks and models, and the switch between learn2learn and the built-in clone."""

from __future__ import annotations

import os
import tempfile

# Tests never read or write the user's converted data; one folder serves the whole run.
os.environ.setdefault("L2G_CACHE", tempfile.mkdtemp(prefix="l2g-tests-"))

import pytest
import torch

from l2g_meta import clone


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
    from l2g_meta.config import Config
    from l2g_meta.training import train

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
