"""Which statistics BatchNorm layers use where a model is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2g_meta.errors import FitError

Policy = Literal["running", "batch"]
POLICIES: tuple[Policy, ...] = ("running", "batch")


@contextmanager
def batchnorm_policy(model: nn.Module, policy: Policy) -> Iterator[nn.Module]:
    """Evaluation mode under one of two policies; modes and buffers are as before afterwards.

    Args:
        model: any module; its BatchNorm layers are found by type.
        policy: ``"running"`` uses the running statistics of training (inductive: each query is scored on its own);
            ``"batch"`` uses those of the episode's supports and queries together (transductive: published Relation
            Network numbers are of this kind).

    Raises:
        FitError: for another policy.

    Example:
        >>> import torch
        >>> norm = nn.BatchNorm1d(1)
        >>> with batchnorm_policy(norm, "batch"):
        ...     y = norm(torch.tensor([[0.0], [2.0]]))
        >>> y.flatten().round().tolist(), norm.training, norm.num_batches_tracked.item()
        ([-1.0, 1.0], True, 0)
    """
    if policy not in POLICIES:
        raise FitError(f"need a BatchNorm policy of {' or '.join(POLICIES)}, got {policy!r}")
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [(norm, norm.track_running_stats) for norm in norms]
    model.eval()
    try:
        if policy == "batch":
            for norm in norms:
                norm.training, norm.track_running_stats = True, False  # batch statistics, no update
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, tracked in tracking:
            norm.track_running_stats = tracked
