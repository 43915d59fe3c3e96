"""The convolution block that the published encoders and relation modules are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.conv import Conv2d
from l2g_meta.norm import BatchNormReLU2d


class ConvBlock(nn.Module):
    """3×3 convolution, batch norm, ReLU and, if asked for, 2×2 max-pooling (Vinyals et al. 2016).

    The convolution pads by 1 and has no bias, since a norm follows: the bias's gradient would be exactly zero and Adam
    would turn its rounding noise into steps.

    Args:
        inputs: channels of the input maps.
        outputs: channels of the output maps.
        pool: whether the block ends in a pooling.
        fused: run on operators with a fast double backward, in channels-last memory; otherwise on PyTorch's own.
            Values, gradients and the state dict are the same.

    Shapes:
        (n, inputs, H, W) -> (n, outputs, H, W), or (n, outputs, H // 2, W // 2) with ``pool``.

    Example:
        >>> x, fused = torch.randn(2, 3, 9, 9), ConvBlock(3, 4, pool=True)
        >>> plain = ConvBlock(3, 4, pool=True, fused=False)
        >>> plain.load_state_dict(fused.state_dict())
        <All keys matched successfully>
        >>> torch.allclose(fused(x), plain(x), atol=1e-5)
        True
    """

    def __init__(self, inputs: int, outputs: int, *, pool: bool, fused: bool = True):
        super().__init__()
        self.pool, self.fused = pool, fused
        self.conv = (Conv2d if fused else nn.Conv2d)(inputs, outputs, 3, padding=1, bias=False)
        self.norm = BatchNormReLU2d(outputs, pool=pool) if fused else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        if self.fused:
            return self.norm(self.conv(channels_last(x)))
        y = self.norm(self.conv(x)).relu()
        return F.max_pool2d(y, 2) if self.pool else y


def channels_last(x: Tensor) -> Tensor:
    """Maps (n, C, H, W) in the memory format that the fused operators prefer.

    One channel alone has that format already, but PyTorch goes by its strides.

    Example:
        >>> channels_last(torch.zeros(2, 1, 5, 5)).stride()
        (25, 1, 5, 1)
    """
    if x.shape[1] == 1:
        return x.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last)
