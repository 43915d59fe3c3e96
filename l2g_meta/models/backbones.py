"""Encoders: images (n, C, H, W) to feature maps (n, C', H', W')."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.errors import FitError
from l2g_meta.models.blocks import ConvBlock, channels_last
from l2g_meta.models.dropblock import DropBlock


class Conv4(nn.Module):
    """Four blocks of 3×3 convolution, batch norm, ReLU and 2×2 max-pool (Vinyals et al. 2016; Snell et al. 2017).

    With ``pools=2`` only the first two blocks pool: the Relation Network's embedding (Sung et al. 2018), whose maps
    are large enough for its relation module.

    Args:
        in_channels: channels of the images.
        channels: channels of every block ("Conv4-64"), or of each of the four: (64, 128, 256, 512).
        pools: how many of the blocks, from the first, end in a pooling.
        fused: as of ``ConvBlock``.

    Shapes:
        (n, in_channels, H, W) -> (n, channels[-1], H // 2**pools, W // 2**pools).

    Raises:
        FitError: if ``pools`` is not 0 … 4, or ``channels`` are not those of 4 blocks.

    Example:
        >>> import torch
        >>> Conv4()(torch.randn(2, 3, 84, 84)).shape, Conv4(pools=2)(torch.randn(2, 3, 84, 84)).shape
        (torch.Size([2, 64, 5, 5]), torch.Size([2, 64, 21, 21]))
    """

    def __init__(self, in_channels: int = 3, channels: int | Sequence[int] = 64, *, pools: int = 4, fused: bool = True):
        super().__init__()
        if not 0 <= pools <= 4:
            raise FitError(f"need pools in 0 … 4, got {pools}")
        widths = (channels,) * 4 if isinstance(channels, int) else tuple(channels)
        if len(widths) != 4:
            raise FitError(f"need the channels of 4 blocks, got {widths}")
        inputs = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(ConvBlock(inputs[k], widths[k], pool=k < pools, fused=fused) for k in range(4)))

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


class ResNet12(nn.Module):
    """Four residual blocks of three 3×3 convolutions and a 2×2 max-pool (TADAM, Oreshkin et al. 2018).

    Leaky ReLU of slope 0.1, and the mean over the last map, unless ``pooled`` is false. With ``drop_rate``, as
    MetaOptNet's and FEAT's code have it: dropout after the first two blocks, DropBlock after the last two; in training
    mode only.

    Args:
        in_channels: channels of the images.
        widths: channels of the four blocks: (64, 160, 320, 640) in MetaOptNet and FEAT, (64, 128, 256, 512) in
            Meta-Baseline.
        drop_rate: p of dropout, and the final one of DropBlock; 0.1 in MetaOptNet and FEAT.
        dropblock: side of the blocks that DropBlock drops, at most that of the map.
        ramp: training passes over which DropBlock's rate grows from 0; 40,000 in MetaOptNet and FEAT.
        pooled: give the mean over the last map, or, for a head that compares maps, the map itself.
        fused: run in channels-last memory, whatever that of the images is.

    Shapes:
        (n, in_channels, H, W) -> (n, widths[-1], 1, 1), H and W at least 16; (n, widths[-1], H // 16, W // 16) if not
        ``pooled``.

    Example:
        >>> import torch
        >>> ResNet12(1, (4, 6, 8, 10))(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10, 1, 1])
    """

    def __init__(self, in_channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640), *, drop_rate: float = 0.0,
                 dropblock: int = 5, ramp: int = 40_000, pooled: bool = True, fused: bool = True):  # fmt: skip
        super().__init__()
        if len(widths) != 4:
            raise FitError(f"need the widths of 4 blocks, got {tuple(widths)}")
        self.pooled, self.fused = pooled, fused
        inputs = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(_ResidualBlock(i, o) for i, o in zip(inputs, widths, strict=True)))
        if drop_rate:
            late = [DropBlock(drop_rate, dropblock, ramp=ramp) for _ in range(2)]
            for block, drop in zip(self.blocks, [nn.Dropout(drop_rate), nn.Dropout(drop_rate), *late], strict=True):
                block.add_module("drop", drop)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the images."""
        x = channels_last(x) if self.fused else x
        maps = self.blocks(x)
        return maps.mean((2, 3), keepdim=True) if self.pooled else maps


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList(conv(width, outputs, 3, padding=1, bias=False) for width in widths)
        self.norms = nn.ModuleList(norm(outputs) for _ in widths)
        self.shortcut = nn.Sequential(conv(inputs, outputs, 1, bias=False), norm(outputs))
        self.drop: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = F.leaky_relu(norm(conv(y)), 0.1)
        y = self.norms[-1](self.convs[-1](y)) + self.shortcut(x)
        return self.drop(F.max_pool2d(F.leaky_relu(y, 0.1), 2))


BACKBONES = {
    "conv4": Conv4,
    "conv4-32": partial(Conv4, channels=32),  # as MAML and the LSTM meta-learner have it, against overfitting
    "conv4-relation": relation_embedding,
    "resnet12": ResNet12,
}
