"""Which data a run was trained on is in its states, and another is not trained on by accident."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from l2g_meta.data import ClassDataset, load
from l2g_meta.data.identity import changes, identity
from l2g_meta.errors import CheckpointError
from l2g_meta.files.tensors import read_info, save_tensors
from l2g_meta.training.checkpoints import load as load_state
from l2g_meta.training.checkpoints import newest
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(24) // 4
DATA = ClassDataset(IMAGES, LABELS, class_names=tuple("abcdef"))
CONFIG = Config(ways=2, queries=2, pairs=1, iterations=2, eval_every=1, eval_episodes=2, device="cpu")


def altered(row: int, value: int) -> np.ndarray:
    images = IMAGES.copy()
    images[row, 8, 8, 1] = value
    return images


OTHERS = {
    "other names": replace(DATA, class_names=tuple("abcdeg")),
    "other labels": replace(DATA, labels=np.roll(LABELS, 1)),
    "other pixels": replace(DATA, images=altered(7, 256 - int(IMAGES[7, 8, 8, 1]) - 1)),
    "20 images instead of 24": ClassDataset(IMAGES[:20], LABELS[:20], class_names=tuple("abcde")),
    "5 classes instead of 6, 20 images": ClassDataset(IMAGES[:20], LABELS[:20], class_names=tuple("abcde")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_changed_is_named(what: str) -> None:
    found = changes({"train": identity(DATA)}, {"train": identity(OTHERS[what])})
    assert what in found and found.startswith("train: ")
    assert changes({"train": identity(DATA)}, {"train": identity(replace(DATA, images=IMAGES.copy()))}) == ""


@pytest.mark.parametrize("sample", [1, 100, 5000])
def test_of_many_pixels_some_of_each_image_are_looked_at(monkeypatch: pytest.MonkeyPatch, sample: int) -> None:
    monkeypatch.setattr("l2g_meta.data.identity.SAMPLE", sample)
    for row in range(24):
        images = IMAGES.copy()
        images[row] = 255 - images[row]
        assert identity(replace(DATA, images=images)) != identity(DATA)


def test_other_data_are_known_by_their_sizes() -> None:
    data = TensorDataset(torch.rand(6, 3), torch.arange(6) // 3)
    assert identity(data) == identity(TensorDataset(torch.rand(6, 3), torch.arange(6) // 3))
    assert identity(data) != identity(TensorDataset(torch.rand(6, 3), torch.arange(6) // 2))


def test_floats_on_any_layout() -> None:
    x = torch.rand(6, 3, 4, 4)
    for images in (x.to(memory_format=torch.channels_last), x.double().float(), x.bfloat16()):
        same = identity(ClassDataset(images, LABELS[:6])) == identity(ClassDataset(x, LABELS[:6]))
        assert same == (images.dtype == x.dtype)


def test_resuming_with_other_data_needs_force(tmp_path: Path) -> None:
    run, other = tmp_path / "run", OTHERS["other pixels"]
    train(replace(CONFIG, iterations=1), run, data=DATA, validation=DATA, progress=False)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert read_info(run / "last.safetensors")["data"] == {"train": identity(DATA), "validation": identity(DATA)}
    config = replace(CONFIG, iterations=1)
    for data, validation, where in ((other, DATA, "train"), (DATA, other, "validation")):
        with pytest.raises(CheckpointError, match=rf"so far, got {where}: other pixels; restore .*--force"):
            train(config, run, data=data, validation=validation, resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    train(CONFIG, run, data=other, validation=DATA, resume=True, force=True, progress=False)
    assert newest(run)[2]["data"]["train"] == identity(other)
    train(CONFIG, run, data=other, validation=DATA, resume=True, progress=False)


def test_states_of_older_versions_go_on(tmp_path: Path) -> None:
    train(replace(CONFIG, iterations=1), tmp_path / "run", data=DATA, validation=DATA, progress=False)
    for n in (0, 1):
        path = tmp_path / "run" / f"resume-{n}.safetensors"
        tensors, info = load_state(path)
        save_tensors(path, tensors, {name: value for name, value in info.items() if name != "data"})
    config = replace(CONFIG, iterations=1)
    train(config, tmp_path / "run", data=OTHERS["other pixels"], validation=DATA, resume=True, progress=False)


def test_a_converted_data_set_is_known_again() -> None:
    assert identity(load("glyphs", "validation")) == identity(load("glyphs", "validation"))
    assert changes({"train": identity(load("glyphs", "validation"))}, {"train": identity(load("glyphs", "test"))})
