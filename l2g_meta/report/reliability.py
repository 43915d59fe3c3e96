"""How far the probability of a prediction says how often it is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l2g_meta.classify.calibration import BINS, bin_of, in_bins


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
    at = bin_of(confidence, bins)
    count = torch.bincount(at, minlength=bins)
    means = (in_bins(values.double(), at, bins) / count for values in (confidence, correct))
    return Reliability(count.tolist(), *(mean.tolist() for mean in means))
