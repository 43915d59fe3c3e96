"""Which rows run here, and the model and tasks that they are timed with."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from l2g_meta.bench.case import Case
from l2g_meta.bench.variants import VARIANTS, Layers, Pairs, Variant
from l2g_meta.data.augment import Augment
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import L2GError, did_you_mean
from l2g_meta.models.backbones import Conv4, ResNet12
from l2g_meta.models.heads import PrototypicalHead, RelationHead
from l2g_meta.models.metric import MetricModel, feature_shape
from l2g_meta.training.build import build_encoder
from l2g_meta.training.checks import parsed_options

BACKBONES: dict[str, Callable[..., Any]] = {"conv4": partial(Conv4, 3), "resnet12": partial(ResNet12, 3)}
RELATION_BACKBONES: dict[str, Callable[..., Any]] = {  # which leave maps to compare
    "conv4": partial(Conv4, 3, pools=2),
    "resnet12": partial(ResNet12, 3, pooled=False),
}
LR = 1e-3  # β, Adam's step size in a whole update


def available(
    names: Sequence[str] | None = None,
    *,
    device: str = "cpu",
    ours: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Variant]:
    """The rows of these names, or all; those that cannot run here are left out, with a line, if they were not named.

    Raises:
        L2GError: for an unknown name, or a named row whose package or device is missing.
    """
    for name in names or ():
        if name not in VARIANTS:
            raise L2GError(f"need variants of {'; '.join(VARIANTS)}; got {name!r}{did_you_mean(name, VARIANTS)}")
    chosen = {}
    for name in names or VARIANTS:
        row = VARIANTS[name]
        if row.needs is not None and importlib.util.find_spec(row.needs) is None:
            extra = "learn2learn" if row.needs == "learn2learn" else "bench"
            missing = f"the package {row.needs}; pip install l2g-meta[{extra}]"
        elif row.cuda and not device.startswith("cuda"):
            missing = f"CUDA, got --device {device}; leave it out, or run it on a machine with an NVIDIA GPU"
        elif row.layers == "fused" and not ours:
            missing = "fused layers, which only conv4 and resnet12 have; leave it out"
        else:
            chosen[name] = row
            continue
        if names:
            raise L2GError(f"the variant {name!r} needs {missing}")
        if not row.cuda and (ours or row.layers != "fused"):
            say(f"left out: {name}: it needs {missing}")
    return chosen


def prepare(name: str, case: Case, model: MetricModel, stream: TaskPairs, pairs: Pairs) -> Callable[[], Any]:
    """What is timed of a row: a step on the given pairs, or a whole update, whose tasks come from the stream.

    Raises:
        L2GError: if the row is not of such cases.
    """
    variant = VARIANTS[name]
    if variant.channels_last:
        model.to(memory_format=torch.channels_last)
    step = variant.make(model, case.inner_lr, case.inner_steps)
    if not variant.whole:
        return partial(step, pairs)
    optimizer, count = torch.optim.Adam(model.parameters(), LR), itertools.count()

    def update() -> None:
        k = next(count)
        optimizer.zero_grad()
        step(stream.batch(range(k * case.pairs, (k + 1) * case.pairs)))
        optimizer.step()

    return update


def task_stream(case: Case) -> TaskPairs:
    """Pairs of tasks from random uint8 images that lie on the device."""
    generator = np.random.default_rng(0)
    per_class, classes = case.shots + case.queries, 2 * case.ways
    images = generator.integers(0, 256, (classes * per_class, case.image_size, case.image_size, 3), dtype=np.uint8)
    data = ClassDataset(images, np.repeat(np.arange(classes), per_class))
    return TaskPairs(
        data, ways=case.ways, shots=case.shots, queries=case.queries, seed=0,
        augment=Augment() if case.augment else None, device=case.device,
    )  # fmt: skip


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
