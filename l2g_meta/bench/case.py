"""What the bench times: a case, and its model and tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import L2GError
from l2g_meta.models.backbones import Conv4, ResNet12
from l2g_meta.models.heads import PrototypicalHead
from l2g_meta.models.metric import MetricModel, feature_shape
from l2g_meta.models.relation_network import RelationHead
from l2g_meta.training.build import build_encoder
from l2g_meta.training.checks import check_settings, parsed_options, setting

Layers = Literal["fused", "stock"]  # our ConvBlock's, or PyTorch's: a user's own network
BACKBONES: dict[str, Callable[..., Any]] = {"conv4": partial(Conv4, 3), "resnet12": partial(ResNet12, 3)}
RELATION_BACKBONES: dict[str, Callable[..., Any]] = {  # which leave maps to compare
    "conv4": partial(Conv4, 3, pools=2),
    "resnet12": partial(ResNet12, 3, pooled=False),
}


@dataclass(frozen=True)
class Case:
    """One update on ``pairs`` pairs of tasks of one shape; a field per flag of ``l2g bench``.

    Raises:
        L2GError: for values that cannot be timed.

    Example:
        >>> Case(ways=5, shots=1, queries=15, pairs=2).images
        320
    """

    backbone: str = setting("conv4", "conv4, resnet12, timm:NAME or torchvision:NAME")
    backbone_options: str = setting("", "arguments of a library's encoder, 'NAME=VALUE NAME=VALUE'")
    head: str = setting("prototypical", "prototypical or relation")
    image_size: int = setting(84, "pixels")
    ways: int = setting(5, "classes of a task", least=2)
    shots: int = setting(1, "supports per class")
    queries: int = setting(15, "queries per class")
    pairs: int = setting(1, "pairs of tasks per update")
    inner_steps: int = setting(1, "inner steps on T_i")
    inner_lr: float = setting(0.01, "α, step size of the inner step", least=0)
    device: str = setting("auto", "auto, cpu, cuda, …")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.head not in ("prototypical", "relation"):
            raise L2GError(f"need --head prototypical or relation, got {self.head}")
        known = self.backbone in BACKBONES or self.backbone.startswith(("timm:", "torchvision:"))
        if not known or (not self.ours and self.head == "relation"):
            raise L2GError(
                f"need --backbone {' or '.join(BACKBONES)}, or timm:NAME or torchvision:NAME with --head prototypical, "
                f"got {self.backbone} with {self.head}"
            )
        if self.ours and self.backbone_options:
            raise L2GError(f"--backbone-options belong to timm:NAME and torchvision:NAME, got {self.backbone}")

    @property
    def ours(self) -> bool:
        """Whether the encoder is one of this library's, which have fused layers as well."""
        return self.backbone in BACKBONES

    @property
    def small_image(self) -> int:
        """Pixels of the smallest images that are of use: the relation head needs maps of 4 × 4, a ViT its own."""
        if not self.ours:
            return self.image_size
        return 64 if self.head == "relation" and self.backbone == "resnet12" else 20

    @property
    def images(self) -> int:
        """Images of one update."""
        return 2 * self.pairs * self.ways * (self.shots + self.queries)


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
        FitError: if the images are too small for it.
    """
    image_shape, fused = (3, case.image_size, case.image_size), layers == "fused"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if not case.ours:
            encoder = build_encoder(case.backbone, 3, parsed_options(case.backbone_options.split()))
            model = MetricModel(encoder, PrototypicalHead(), image_shape=image_shape)
        elif case.head == "prototypical":
            model = MetricModel(BACKBONES[case.backbone](fused=fused), PrototypicalHead(), image_shape=image_shape)
        else:
            encoder = RELATION_BACKBONES[case.backbone](fused=fused)
            channels, *size = feature_shape(encoder, image_shape)
            head = RelationHead(channels, tuple(size), fused=fused)  # type: ignore[arg-type]
            model = MetricModel(encoder, head, image_shape=image_shape)
    return model.to(case.device)
