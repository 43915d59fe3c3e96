r"""Averaged weights: a running mean of θ over the last part of a training, whatever its length.

Polynomial-decay averaging (Shamir & Zhang 2013, section 4), after update t with η = 9:

.. math:: \bar\theta_t = \bar\theta_{t-1} + \frac{\eta + 1}{t + \eta}\, (\theta_t - \bar\theta_{t-1})

At any t the mean age of the weights is about t / 11. An exponential average has a fixed memory instead, which would
have to be chosen anew for each length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

ETA = 9


def averaged(model: nn.Module) -> AveragedModel:
    """A copy of a model that follows it: ``update_parameters(model)`` after each update, ``module`` is the average.

    Running statistics are averaged like weights; integers and the like are those of the model.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = averaged(model)
        >>> for value in (1.0, 2.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update_parameters(model)
        >>> round(average.module.weight.item(), 4) == round(1 + 10 / 11, 4)
        True
    """
    return AveragedModel(model, multi_avg_fn=_approach, use_buffers=True)


@torch.no_grad()
def _approach(averages: Sequence[Tensor], values: Sequence[Tensor], seen: Tensor | int) -> None:
    """One step of the running mean, in place, on tensors of one type; ``seen`` is t − 1."""
    t = int(seen) + 1
    for average, value in zip(averages, values, strict=True):
        if average.is_floating_point():
            average.lerp_(value, (ETA + 1) / (t + ETA))
        else:
            average.copy_(value)
