"""The head that learns how to compare: the Relation Network's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError, one_of
from l2g_meta.models import functional as f
from l2g_meta.models.blocks import ConvBlock


class RelationHead(nn.Module):
    r"""Relation Network (eq. 9–11; Sung et al. 2018): a learned comparison of each query with each class.

    The feature maps of a class's supports are summed (eq. 9), concatenated with the query's map, and two convolution
    blocks and two fully connected layers give a relation score in (0, 1) (eq. 10), trained by squared error (eq. 11).

    Args:
        channels: channels C of the encoder's maps.
        map_size: their height and width; at least 4, for two 2×2 poolings.
        hidden: width of the first fully connected layer.
        reduction: ``"mean"`` over all scores, or ``"sum"`` as eq. 11 is written.
        fused: as of ``ConvBlock``.

    Shapes:
        support (n_support, C, H, W), support_y (n_support,), query (n_query, C, H, W) -> scores (n_query, n_way).

    Raises:
        FitError: if the encoder's maps have another shape.

    Example:
        >>> head = RelationHead(8, 4)
        >>> head(torch.randn(2, 8, 4, 4), torch.tensor([0, 1]), torch.randn(3, 8, 4, 4), 2).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        channels: int,
        map_size: int | tuple[int, int],
        *,
        hidden: int = 8,
        reduction: f.Reduction = "mean",
        fused: bool = True,
    ):
        super().__init__()
        height, width = (map_size, map_size) if isinstance(map_size, int) else map_size
        if min(height, width) < 4:
            raise FitError(
                f"RelationHead needs maps of at least 4×4 (two 2×2 poolings), got {height}×{width}; use the relation "
                "embedding, Conv4(pools=2) (command line: --backbone conv4-relation), ResNet12(pooled=False), or "
                "larger images"
            )
        self.feature_shape = (channels, height, width)
        self.reduction = one_of("reduction", reduction, f.REDUCTIONS)
        self.relation = nn.Sequential(
            ConvBlock(2 * channels, channels, pool=True, fused=fused),
            ConvBlock(channels, channels, pool=True, fused=fused),
            nn.Flatten(),
            nn.Linear(channels * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
            nn.Sigmoid(),
        )

    def forward(
        self,
        support: Tensor,  # (n_support, C, H, W)
        support_y: Tensor,  # (n_support,)
        query: Tensor,  # (n_query, C, H, W)
        n_way: int,
    ) -> Tensor:  # (n_query, n_way)
        """Relation scores of eq. 10."""
        if support.shape[1:] != self.feature_shape:
            raise FitError(
                f"RelationHead needs feature maps {self.feature_shape}, the encoder gives {tuple(support.shape[1:])}; "
                "build it with RelationHead(channels, map_size) of that shape"
            )
        classes = f.class_sums(support, support_y, n_way)  # (n_way, C, H, W)
        shape = (len(query), n_way, *self.feature_shape)
        pairs = torch.cat([classes.expand(shape), query[:, None].expand(shape)], dim=2)  # (n_query, n_way, 2C, H, W)
        return self.relation(pairs.flatten(0, 1)).view(len(query), n_way)

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Eq. 11."""
        return f.relation_loss(scores, query_y, reduction=self.reduction)
