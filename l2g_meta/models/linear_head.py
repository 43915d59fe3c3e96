r"""Supervised pre-training of an encoder on the base classes, as a metric head: one loop trains it, too.

.. math:: L(\theta, W) = -\frac{1}{n} \sum_i \log \mathrm{softmax}(W f_\theta(x_i) + b)_{y_i}

over batches of labelled images of all training classes (Chen et al. 2019; Tian et al. 2020; Chen et al. 2021). What is
kept is the encoder: tasks of unseen classes are classified by nearest prototypes of its features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.errors import FitError
from l2g_meta.models.heads import PrototypicalHead


class LinearHead(nn.Module):
    """A linear classifier of the base classes in training mode, nearest prototypes in evaluation mode.

    Args:
        dim: length of the flattened features.
        n_classes: base classes.
        distance: of the nearest prototypes: ``"cosine"``, ``"euclidean"`` or ``"squared"``.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way); in training
        mode n_way is n_classes, and supports are not looked at.

    Raises:
        FitError: in training mode, for another number of ways.

    Source:
        Chen et al. (2021), *Meta-Baseline*, the Classifier-Baseline.

    Example:
        >>> import torch
        >>> head, z = LinearHead(4, 64), torch.randn(3, 4)
        >>> head(z[:0], torch.empty(0), z, 64).shape, head.eval()(z, torch.arange(3), z, 3).shape
        (torch.Size([3, 64]), torch.Size([3, 3]))
    """

    def __init__(self, dim: int, n_classes: int, *, distance: str = "cosine"):
        super().__init__()
        self.linear = nn.Linear(dim, n_classes)
        self.nearest = PrototypicalHead(distance=distance)  # type: ignore[arg-type]

    def forward(self, support: Tensor, support_y: Tensor, query: Tensor, n_way: int) -> Tensor:  # (n_query, n_way)
        """Logits of the base classes, or closeness to the prototypes."""
        if not self.training:
            return self.nearest(support, support_y, query, n_way)
        if n_way != self.linear.out_features:
            raise FitError(
                f"need batches of all {self.linear.out_features} base classes to train on, got {n_way}; train with "
                "--method supervised, and take the encoder to --method l2g by --weights RUN"
            )
        return self.linear(query.flatten(1))

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(scores, query_y)
