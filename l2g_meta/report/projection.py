"""Embeddings of images as points of a plane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import FitError
from l2g_meta.evaluation.episodes import inputs_of
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.metric import MetricModel

POINTS = 300  # drawn at most
SEED = 0  # of the choice of images, and of t-SNE


def sample_rows(data: ClassDataset, classes: Sequence[int], *, points: int = POINTS) -> np.ndarray:
    """Rows of images of these classes, as many of each, at most ``points`` in all: (n,), by class.

    Example:
        >>> data = ClassDataset(torch.zeros(6, 1), [0, 0, 0, 1, 1, 1])
        >>> sample_rows(data, [1], points=2).tolist(), len(sample_rows(data, [0, 1]))
        ([4, 5], 6)
    """
    rng = np.random.default_rng(SEED)
    each = max(1, points // max(1, len(classes)))
    parts = [np.sort(rng.choice(data.index[c], min(each, len(data.index[c])), replace=False)) for c in classes]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def projected(model: nn.Module, data: ClassDataset, rows: np.ndarray) -> np.ndarray:
    """t-SNE of the rows' embeddings under θ, running statistics: (n, 2), from 0 to 1.

    Raises:
        FitError: for a model without an encoder that holds for all tasks.
        ImportError: without scikit-learn.
    """
    if not isinstance(model, MetricModel):
        raise FitError(f"{type(model).__name__} adapts to each task and has no embedding that holds for all")
    from sklearn.manifold import TSNE  # before images are embedded

    device = next(model.parameters()).device
    with torch.no_grad(), batchnorm_policy(model, "running"):
        z = torch.cat([model.encoder(x.to(device)).flatten(1).cpu() for x in inputs_of(data, rows)]).numpy()
    if len(z) < 4 or z.shape[1] < 2:
        raise FitError(f"t-SNE needs at least 4 images and 2 features, got {len(z)} and {z.shape[1]}")
    points = TSNE(random_state=SEED, init="pca", perplexity=min(30.0, (len(z) - 1) / 3)).fit_transform(z)
    low, high = points.min(0), points.max(0)
    return (points - low) / np.maximum(high - low, 1e-9)
