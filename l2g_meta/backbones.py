"""Encoders: images (n, C, H, W) to feature maps (n, C', H', W')."""

from __future__ import annotations

from torch import Tensor, nn

from l2g_meta.blocks import ConvBlock
from l2g_meta.errors import FitError


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 max-pool (Vinyals et al. 2016; Snell et al. 2017).

    With ``pools=2`` only the first two blocks pool: the Relation Network's embedding (Sung et al. 2018), whose maps
    are large enough for its relation module.

    Args:
        in_channels: channels of the images.
        channels: channels of every block ("Conv4-64").
        pools: how many of the blocks, from the first, end in a pooling.
        fused: as of ``ConvBlock``: operators with a fast double backward, or PyTorch's own.

    Shapes:
        (n, in_channels, H, W) -> (n, channels, H // 2**pools, W // 2**pools).

    Raises:
        FitError: if ``pools`` is not 0 … 4.

    Example:
        >>> import torch
        >>> Conv4()(torch.randn(2, 3, 84, 84)).shape, Conv4(pools=2)(torch.randn(2, 3, 84, 84)).shape
        (torch.Size([2, 64, 5, 5]), torch.Size([2, 64, 21, 21]))
    """

    def __init__(self, in_channels: int = 3, channels: int = 64, *, pools: int = 4, fused: bool = True):
        super().__init__()
        if not 0 <= pools <= 4:
            raise FitError(f"need pools in 0 … 4, got {pools}")
        self.blocks = nn.Sequential(
            *(ConvBlock(in_channels if k == 0 else channels, channels, pool=k < pools, fused=fused) for k in range(4))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps of the images."""
        return self.blocks(x)


def relation_embedding(in_channels: int = 3, channels: int = 64) -> Conv4:
    """The Relation Network's embedding: ``Conv4`` with pooling in the first two blocks only.

    Example:
        >>> import torch
        >>> relation_embedding(1)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 64, 7, 7])
    """
    return Conv4(in_channels, channels, pools=2)


BACKBONES = {"conv4": Conv4, "conv4-relation": relation_embedding}
