"""What frozen features are worth by themselves: three heads that need no training, beside the one that was trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.host import placed
from l2g_meta.evaluation.episodes import Evaluation, evaluate, inputs_of, scores_from_embeddings
from l2g_meta.models import functional as f
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.heads import PrototypicalHead
from l2g_meta.models.metric import MetricModel

TRAINED = "trained"  # the model's own head
HEADS = {"nearest": "nearest prototype", "simpleshot": "SimpleShot", "logistic": "logistic regression"}
CENTRE_IMAGES = 1024  # of the training classes, whose mean SimpleShot subtracts


class SimpleShotHead(nn.Module):
    """Nearest prototypes of features that are centred and normalised (CL2N).

    Args:
        centre: mean feature of the training classes, (d,); without it that of an episode's supports.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way).

    Source:
        Wang, Chao, Weinberger & van der Maaten, *SimpleShot* (2019).

    Example:
        >>> z = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
        >>> SimpleShotHead()(z, torch.tensor([0, 1]), z, 2).argmax(-1).tolist()
        [0, 1]
    """

    def __init__(self, centre: Tensor | None = None):
        super().__init__()
        self.centre = centre

    def forward(self, support: Tensor, support_y: Tensor, query: Tensor, n_way: int) -> Tensor:  # (n_query, n_way)
        """Minus the squared distances to the prototypes."""
        support, query = support.flatten(1), query.flatten(1)
        centre = support.mean(0) if self.centre is None else self.centre
        support, query = F.normalize(support - centre), F.normalize(query - centre)
        return -f.squared_euclidean(query, f.prototypes(support, support_y, n_way))


class LogisticHead(nn.Module):
    """scikit-learn's logistic regression on normalised features, fitted to the supports of each task.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way),
        log-probabilities.

    Source:
        Tian, Wang, Krishnan, Tenenbaum & Isola, *Rethinking few-shot image classification* (2020).

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> LogisticHead()(z, torch.tensor([0, 1]), z, 2).argmax(-1).tolist()
        [0, 1]
    """

    def forward(self, support: Tensor, support_y: Tensor, query: Tensor, n_way: int) -> Tensor:  # (n_query, n_way)
        """Log-probabilities of the classes."""
        from sklearn.linear_model import LogisticRegression

        s, q = (F.normalize(z.flatten(1)).double().cpu().numpy() for z in (support, query))
        fitted = LogisticRegression(max_iter=1000).fit(s, support_y.cpu().numpy())
        return torch.from_numpy(fitted.predict_log_proba(q)).to(query)


class Features:
    """A data set's features by an encoder, each image embedded once, when it is first gathered.

    Args:
        encoder: images (n, C, H, W) to features (n, ...).
        dataset: rows by class and inputs by row, as ``ClassDataset``.
        device: where the encoder is.
    """

    def __init__(self, encoder: nn.Module, dataset: Any, device: torch.device | str | None = None):
        self.dataset = placed(dataset, device) if isinstance(dataset, ClassDataset) else dataset
        self.encoder, self.device = encoder, device
        self.index: Sequence[np.ndarray] = dataset.index
        self.split: str = getattr(dataset, "split", "")
        self.image_shape = ()  # features are small, and ``gather`` bounds what it embeds
        self.kept: dict[int, Tensor] = {}

    def gather(self, rows: Tensor | np.ndarray) -> Tensor:  # (n, ...)
        """Features of the given rows, (n, ...)."""
        asked = torch.as_tensor(rows).tolist()
        if new := [row for row in dict.fromkeys(asked) if row not in self.kept]:
            with torch.no_grad(), batchnorm_policy(self.encoder, "running"):
                parts = [self.encoder(x.to(self.device)).to(x.dtype) for x in inputs_of(self.dataset, np.array(new))]
                self.kept |= zip(new, torch.cat(parts).unbind(), strict=True)
        return torch.stack([self.kept[row] for row in asked])

    def mean(self, n: int = CENTRE_IMAGES) -> Tensor:  # (d,)
        """The mean feature of ``n`` images, evenly spaced over the classes."""
        rows = np.concatenate(self.index)
        rows = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int)]
        return self.gather(rows).flatten(1).mean(0)


def evaluate_heads(
    model: nn.Module,
    dataset: Any,
    *,
    heads: Collection[str] = (TRAINED, *HEADS),
    base: Any = None,
    bn: Any = "running",
    device: torch.device | str | None = None,
    observe: Any = None,
    **options: Any,
) -> dict[str, Evaluation]:
    """``evaluate`` with several heads on the same features and episodes, so that differences can be paired.

    A model without features that hold for all tasks (one that adapts, or under ``bn="batch"``) has its own result
    alone, if that is asked for.

    Args:
        model: ``model(task) -> scores``.
        dataset: to test on.
        heads: of ``TRAINED``, the model's own, and ``HEADS``.
        base: training classes, whose mean feature SimpleShot subtracts; without them that of an episode's supports.
        bn: as of ``evaluate``, and so for the others.
        device: where the model is.
        observe: as of ``evaluate``, of the trained head.
        options: of ``evaluate``.

    Raises:
        L2GError: as ``evaluate``.

    Example:
        >>> data = ClassDataset(torch.randn(40, 1, 8, 8), torch.arange(40) // 8, split="test")
        >>> model = MetricModel(nn.Flatten(), PrototypicalHead())
        >>> list(evaluate_heads(model, data, ways=2, queries=5, episodes=4))
        ['trained', 'nearest', 'simpleshot', 'logistic']
    """
    if bn != "running" or not scores_from_embeddings(model):
        alone = {"bn": bn, "device": device, "observe": observe}
        return {TRAINED: evaluate(model, dataset, **alone, **options)} if TRAINED in heads else {}
    features, found = Features(model.encoder, dataset, device), {}
    for name in heads:
        head: nn.Module = PrototypicalHead(distance="squared") if name == "nearest" else model.head
        if name == "simpleshot":
            head = SimpleShotHead(None if base is None else Features(model.encoder, base, device).mean())
        elif name == "logistic":
            head = LogisticHead()
        seen = observe if name == TRAINED else None
        found[name] = evaluate(MetricModel(nn.Identity(), head), features, device=device, observe=seen, **options)
    return found
