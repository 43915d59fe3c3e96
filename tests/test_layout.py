"""Images are contiguous where a data set hands them out: a network that ends in ``view`` works on all of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead
from l2g_meta.data import DATASETS, ClassDataset, Episodes, MapDataset, TaskPairs, load
from l2g_meta.data.augment import Augment
from l2g_meta.data.batches import Batches
from l2g_meta.models.backbones import ResNet12

SHAPE = {"ways": 2, "shots": 1, "queries": 1}
VARIATIONS = {
    "plain": None,
    "crop": Augment(2),
}


class Flat(nn.Module):
    """Ends as learn2learn's encoders do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(x)
        return x.view(x.size(0), -1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of three images in the folders of each data set."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for base in ("mini-imagenet", "tiered-imagenet", "."):
        for k in range(18):
            file = root / base / "train" / f"class {k // 3}" / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(file)
    return root


def check(x: torch.Tensor) -> None:
    assert x.is_contiguous() and x.ndim == 4
    Flat(x.shape[1])(x)


@pytest.mark.parametrize("how", VARIATIONS)
@pytest.mark.parametrize("name", DATASETS)
def test_tasks_of_every_data_set(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    if name == "glyphs":
        data = load(name, "validation")
    else:
        monkeypatch.setenv("L2G_CACHE", str(tmp_path))
        data = load(name, "train", root=root, image_size=12)
    pairs = TaskPairs(data, **SHAPE, augment=VARIATIONS[how])
    for task in (*pairs[3], Episodes(data, **SHAPE)[0]):
        check(task.support_x)
        check(task.query_x)
    check(Batches(data, 4, augment=VARIATIONS[how])[0][0].query_x)
    task_i, task_j = pairs[0]
    L2GWrapper(MetricModel(Flat(task_i.support_x.shape[1]), PrototypicalHead()), 0.01)(task_i, task_j).backward()


ONE_BY_ONE = [torch.rand(12, 12, 3).permute(2, 0, 1) for _ in range(12)]  # as np.asarray(image) is, turned round
OTHERS = {
    "floats": ClassDataset(torch.rand(12, 12, 12, 3).permute(0, 3, 1, 2), torch.arange(12) // 3),
    "a map": MapDataset(TensorDataset(torch.rand(12, 12, 12, 3).permute(0, 3, 1, 2), torch.arange(12) // 3)),
    "a list": MapDataset([(x, 0) for x in ONE_BY_ONE], labels=[k // 3 for k in range(12)]),
    "on the host": ClassDataset(
        np.zeros((12, 12, 12, 3), np.uint8), np.arange(12) // 3, gathered_on=torch.device("cpu")
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_tasks_of_other_data(name: str) -> None:
    for task in TaskPairs(OTHERS[name], **SHAPE)[0]:
        check(task.support_x)
        check(task.query_x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("build", [Conv4, partial(ResNet12, widths=(4, 4, 4, 4))], ids=["Conv4", "ResNet12"])
def test_our_encoders_choose_their_layout_at_their_entry(build: Callable[..., nn.Module], channels: int) -> None:
    encoder, strides = build(channels), []
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given: strides.append(given[0].stride()))
    encoder(torch.rand(2, channels, 48, 48))
    assert strides and all(stride[1] == 1 for stride in strides)
