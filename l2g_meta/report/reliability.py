"""How far the probability of a prediction says how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2g_meta.classify.calibration import BINS


@dataclass(frozen=True)
class Reliability:
    """Predictions in bins of equal width by their probability.

    Args:
        count: predictions, (bins,).
        confidence: their mean probability, (bins,); NaN in an empty bin.
        accuracy: share that is right, (bins,); NaN in an empty bin.
    """

    count: list[int]
    confidence: list[float]
    accuracy: list[float]


def reliability(
    confidence: Tensor,  # (n,)
    correct: Tensor,  # (n,)
    *,
    bins: int = BINS,
) -> Reliability:
    """Bins of a reliability diagram, open at the left.

    Shapes: confidence (n,), correct (n,) booleans -> three lists of length ``bins``.

    Source:
        Guo, Pleiss, Sun & Weinberger, *On Calibration of Modern Neural Networks* (2017), section 2.

    Example:
        >>> reliability(torch.tensor([0.9, 0.9, 0.3]), torch.tensor([True, False, True]), bins=2).accuracy
        [1.0, 0.5]
    """
    confidence, correct = confidence.double(), correct.double()
    b = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(b, minlength=bins)
    sums = (torch.zeros(bins, dtype=torch.float64).index_add_(0, b, v) for v in (confidence, correct))
    return Reliability(count.tolist(), *((s / count).tolist() for s in sums))
