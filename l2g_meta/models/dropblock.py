r"""DropBlock (Ghiasi, Lin & Le 2018): dropout of whole squares of a map.

.. math:: \gamma = \frac{1 - \text{keep}}{b^2} \cdot \frac{HW}{(H - b + 1)(W - b + 1)}, \qquad
          y = x \cdot m \cdot \frac{\text{count}(m)}{\sum m}

with m = 0 in the b × b squares whose corner was drawn, each with probability γ. The keep rate falls linearly to
1 − drop rate over the first training passes, as in MetaOptNet's and FEAT's code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.errors import FitError


class DropBlock(nn.Module):
    """Drops squares of maps in training mode, for each channel on its own; in evaluation mode nothing.

    It counts its training passes in a buffer, which clones share until their first step, as they do running
    statistics: a pair of tasks counts once. Squares come from PyTorch's generator of the map's device, so that a
    resumed run draws the same.

    Args:
        rate: share of a map that is dropped in the end, in 0 … 1.
        size: side of a square; on smaller maps, theirs.
        ramp: passes over which the rate grows from 0 to ``rate``; 40,000 as published, 0 for at once.

    Shapes:
        (n, c, H, W) -> (n, c, H, W).

    Raises:
        FitError: for numbers that cannot be.

    Source:
        Ghiasi et al., *DropBlock: A regularization method for convolutional networks*, algorithm 1.

    Example:
        >>> drop, x = DropBlock(0.5, 2, ramp=0), torch.ones(1, 64, 6, 6)
        >>> bool((drop(x) == 0).any()), torch.equal(drop.eval()(x), x)
        (True, True)
    """

    passes: Tensor

    def __init__(self, rate: float, size: int = 5, *, ramp: int = 40_000):
        super().__init__()
        if not (0 <= rate < 1 and isinstance(size, int) and size >= 1 and ramp >= 0):
            raise FitError(f"need a rate in 0 … 1, a size ≥ 1 and a ramp ≥ 0, got {rate}, {size}, {ramp}")
        self.rate, self.size, self.ramp = rate, size, ramp
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Maps with squares of zeros, the rest scaled up."""
        if not self.training:
            return x
        self.passes.add_(1)  # in place: see the class
        height, width = x.shape[2:]
        b, c = min(self.size, height), min(self.size, width)
        grown = (self.passes / self.ramp).clamp(max=1) if self.ramp else 1.0
        gamma = self.rate * grown * (height * width) / (b * c * (height - b + 1) * (width - c + 1))
        corners = torch.rand(*x.shape[:2], height - b + 1, width - c + 1, device=x.device) < gamma
        dropped = F.max_pool2d(F.pad(corners.to(x.dtype), (c - 1, c - 1, b - 1, b - 1)), (b, c), stride=1)
        kept = 1 - dropped  # (n, c, H, W)
        return x * kept * (kept.numel() / kept.sum().clamp(min=1))
