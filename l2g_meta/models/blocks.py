"""The convolution block that the published encoders and relation modules are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta import operators
from l2g_meta.operators.batch_norm import batch_norm, relu_and_pool


class ConvBlock(nn.Module):
    """3×3 convolution, batch norm, ReLU and, if asked for, 2×2 max-pooling (Vinyals et al. 2016).

    The convolution pads by 1 and has no bias, since a norm follows: the bias's gradient would be exactly zero and Adam
    would turn its rounding noise into steps.

    Args:
        inputs: channels of the input maps.
        outputs: channels of the output maps.
        pool: whether the block ends in a pooling.
        fused: norm, ReLU and pooling as one operator, in channels-last memory; otherwise PyTorch's layers. Values,
            gradients and the state dict are the same.

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
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = BatchNormReLU2d(outputs, pool=pool) if fused else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps."""
        if self.fused:
            return self.norm(self.conv(channels_last(x)))
        y = self.norm(self.conv(x)).relu()
        return F.max_pool2d(y, 2) if self.pool else y


def channels_last(x: Tensor) -> Tensor:
    """Maps (n, C, H, W) in the memory format that the fused operators prefer.

    One channel alone has that format already, but PyTorch goes by its strides. Where PyTorch's operators
    run instead, see ``l2g_meta.operators``, maps stay as they are.

    Example:
        >>> channels_last(torch.zeros(2, 1, 5, 5)).stride()
        (25, 1, 5, 1)
    """
    if x.device.type not in operators.DEVICES:
        return x
    if x.shape[1] == 1:
        return x.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last)


class BatchNormReLU2d(nn.BatchNorm2d):
    """Batch norm, ReLU and, if asked for, 2×2 max-pooling as one operator with a fast double backward.

    The state dict is that of ``nn.BatchNorm2d``.

    Args:
        num_features: channels c.
        pool: end in a 2×2 max-pooling of stride 2, which drops an odd row or column as ``nn.MaxPool2d(2)`` does.
        options: as of ``nn.BatchNorm2d``.

    Shapes:
        (n, c, H, W) -> (n, c, H, W), or (n, c, H // 2, W // 2) with ``pool``.

    Example:
        >>> import torch
        >>> block, x = BatchNormReLU2d(3, pool=True), torch.randn(2, 3, 5, 5)
        >>> plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
        >>> torch.allclose(block(x), plain(x), atol=1e-6)
        True
    """

    def __init__(self, num_features: int, *, pool: bool = False, **options: Any):
        super().__init__(num_features, **options)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Normalised, rectified, pooled maps."""
        self._check_input_dim(x)
        if x.device.type not in operators.DEVICES or (not self.training and self.running_mean is not None):
            return relu_and_pool(super().forward(x), relu=True, pool=self.pool)
        momentum, tracked = self.momentum, self.training and self.track_running_stats
        if tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        return batch_norm(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean if tracked else None,
            running_var=self.running_var if tracked else None,
            momentum=momentum or 0.0,
            eps=self.eps,
            relu=True,
            pool=self.pool,
        )

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{super().extra_repr()}, pool={self.pool}"
