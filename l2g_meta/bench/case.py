"""What the bench times: a case, and its model and tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.models.heads import HEADS
from l2g_meta.models.metric import MetricModel, build_head, feature_shape
from l2g_meta.training.build import build_encoder
from l2g_meta.training.checks import check_settings, parsed_options, setting

Layers = Literal["fused", "stock"]  # our ConvBlock's, or PyTorch's: a user's own network
OURS = ("conv4", "resnet12")  # have both
MAPS: dict[str, dict[str, Any]] = {"conv4": {"pools": 2}, "resnet12": {"pooled": False}}  # for a head that compares


@dataclass(frozen=True)
class Case:
    """One update on ``pairs`` pairs of tasks of one shape; a field per flag of ``l2g bench``.

    Raises:
        L2GError: for values that cannot be timed.

    Example:
        >>> Case(ways=5, shots=1, pairs=2).queries
        15
    """

    backbone: str = setting("conv4", "encoder, as of l2g train: conv4, resnet12, timm:NAME, torchvision:NAME, …")
    backbone_options: str = setting("", "its arguments, 'NAME=VALUE NAME=VALUE'")
    head: str = setting("prototypical", "metric head", choices=tuple(HEADS))
    image_size: int = setting(84, "pixels")
    ways: int = setting(5, "classes of a task", least=2)
    shots: int = setting(1, "supports per class")
    queries: int = setting(15, "queries per class")
    pairs: int = setting(1, "pairs of tasks per update")
    inner_steps: int = setting(1, "inner steps on T_i")
    inner_lr: float = setting(0.01, "α, step size of the inner step", least=0)
    precision: str = setting("fp32", "as of l2g train; bf16 is of our rows alone", choices=("fp32", "tf32", "bf16"))
    device: str = setting("auto", "auto, cpu, cuda, …")

    def __post_init__(self) -> None:
        check_settings(self)


def task_stream(case: Case) -> TaskPairs:
    """Pairs of tasks from random uint8 images that lie on the device."""
    generator = np.random.default_rng(0)
    per_class, classes = case.shots + case.queries, 2 * case.ways
    images = generator.integers(0, 256, (classes * per_class, case.image_size, case.image_size, 3), dtype=np.uint8)
    data = ClassDataset(images, np.repeat(np.arange(classes), per_class))
    return TaskPairs(data, ways=case.ways, shots=case.shots, queries=case.queries, seed=0, device=case.device)


def build(case: Case, *, layers: Layers) -> MetricModel:
    """The model of a case, always with the same weights.

    Raises:
        FitError: if there is no such encoder, it does not fit the head, or the images are too small for it.
    """
    shape, options = (3, case.image_size, case.image_size), parsed_options(case.backbone_options.split())
    fused: dict[str, Any] = {"fused": layers == "fused"}
    maps = MAPS.get(case.backbone, {}) if case.head == "relation" else {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        encoder = build_encoder(case.backbone, 3, maps | options | (fused if case.backbone in OURS else {}))
        own = fused if case.head == "relation" else {}
        head = build_head(HEADS[case.head], feature_shape(encoder, shape), **own)
        return MetricModel(encoder, head, image_shape=shape).to(case.device)
