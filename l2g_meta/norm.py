"""Normalisation layers with a fast double backward, and which statistics a model is evaluated with.

The operators behind them, and their second derivatives in closed form, are in ``l2g_meta.operators.batch_norm``,
``group_norm`` and ``layer_norm``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from l2g_meta.convert import convert
from l2g_meta.errors import FitError
from l2g_meta.operators.batch_norm import batch_norm, instance_norm, relu_and_pool
from l2g_meta.operators.group_norm import group_norm
from l2g_meta.operators.layer_norm import layer_norm

Policy = Literal["running", "batch"]
POLICIES: tuple[Policy, ...] = ("running", "batch")


class BatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with a fast double backward, as ``BatchNorm2d``; (n, c) or (n, c, L)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised inputs, of the same shape."""
        self._check_input_dim(x)
        return _normalise(self, x)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with a fast double backward: same arguments, same state dict, same values.

    Exact to any order: the second derivative in closed form, higher ones by automatic differentiation of it. Inputs
    below float32 are normalised in float32. Evaluation mode with running statistics is PyTorch's own. Neither ``vmap``
    nor forward mode (``jvp``).

    Shapes:
        (n, c, H, W) -> (n, c, H, W), any memory format.

    Raises:
        ValueError: for one value per channel, whose variance is 0, as PyTorch does.

    Source:
        Ioffe & Szegedy (2015); the second derivative is that of ``l2g_meta.operators.batch_norm``.

    Example:
        >>> import torch
        >>> norm = BatchNorm2d(3)
        >>> norm.load_state_dict(nn.BatchNorm2d(3).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(2, 3, 4, 4)).mean().abs() < 1e-6
        tensor(True)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalised maps, of the same shape."""
        self._check_input_dim(x)
        return _normalise(self, x)


class BatchNorm3d(nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with a fast double backward, as ``BatchNorm2d``; (n, c, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalised volumes, of the same shape."""
        self._check_input_dim(x)
        return _normalise(self, x)


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
        return _normalise(self, x, relu=True, pool=self.pool)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{super().extra_repr()}, pool={self.pool}"


class InstanceNorm1d(nn.InstanceNorm1d):
    """``nn.InstanceNorm1d`` with a fast double backward, as ``InstanceNorm2d``; (n, c, L) or (c, L)."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _normalise_instances(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """``nn.InstanceNorm2d`` with a fast double backward: same arguments, same state dict, same values.

    As ``BatchNorm2d``, of which it is the case of one image: exact to any order, no ``vmap``, no ``jvp``.

    Shapes:
        (n, c, H, W) -> (n, c, H, W), or (c, H, W) -> (c, H, W).

    Raises:
        ValueError: for one value per map, whose variance is 0, as PyTorch does.

    Source:
        Ulyanov, Vedaldi & Lempitsky (2016).

    Example:
        >>> import torch
        >>> norm = InstanceNorm2d(3, affine=True)
        >>> norm.load_state_dict(nn.InstanceNorm2d(3, affine=True).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(2, 3, 4, 4)).mean((2, 3)).abs().max() < 1e-6
        tensor(True)
    """

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _normalise_instances(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d`` with a fast double backward, as ``InstanceNorm2d``; (n, c, D, H, W) or (c, D, H, W)."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _normalise_instances(self, input)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` with a fast double backward: same arguments, same state dict, same values.

    As ``BatchNorm2d``: exact to any order, no ``vmap``, no ``jvp``.

    Shapes:
        (..., normalized_shape) -> the same.

    Raises:
        RuntimeError: for inputs of another shape, as PyTorch does.

    Source:
        Ba, Kiros & Hinton (2016).

    Example:
        >>> import torch
        >>> norm = LayerNorm((4, 5))
        >>> norm.load_state_dict(nn.LayerNorm((4, 5)).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(3, 4, 5)).mean((1, 2)).abs().max() < 1e-6
        tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised inputs, of the same shape."""
        shape = self.normalized_shape
        several = math.prod(shape) > 1 and input.numel() > 0
        if not several or tuple(input.shape[input.ndim - len(shape) :]) != tuple(shape):  # its errors and zeros
            return super().forward(input)
        return layer_norm(input, shape, self.weight, self.bias, eps=self.eps)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` with a fast double backward: same arguments, same state dict, same values.

    As ``BatchNorm2d``: exact to any order, no ``vmap``, no ``jvp``.

    Shapes:
        (n, c, ...) -> the same.

    Raises:
        ValueError: for a single input of one value per group, as PyTorch does.

    Source:
        Wu & He (2018).

    Example:
        >>> import torch
        >>> norm = GroupNorm(2, 6)
        >>> norm.load_state_dict(nn.GroupNorm(2, 6).state_dict())
        <All keys matched successfully>
        >>> norm(torch.randn(3, 6, 5)).view(3, 2, -1).mean(2).abs().max() < 1e-6
        tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised inputs, of the same shape."""
        fits = input.ndim >= 2 and input.shape[1] == self.num_channels
        if not fits or input.numel() == 0 or input.shape[1:].numel() == self.num_groups:  # its errors and special cases
            return super().forward(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)


CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.LayerNorm: LayerNorm,
    nn.GroupNorm: GroupNorm,
}


def convert_batchnorm(model: nn.Module) -> nn.Module:
    """Gives every Batch-, Instance-, Layer- and GroupNorm of a model the fast double backward, in place; returns it.

    Parameters, buffers, hooks and the state dict stay as they are; subclasses (``SyncBatchNorm``, a user's own) are
    left alone.

    Raises:
        FitError: for a lazy layer that has not seen its input yet.

    Example:
        >>> type(convert_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1])
        <class 'l2g_meta.norm.BatchNorm2d'>
    """
    return convert(model, CONVERTED)


def _normalise(norm: _BatchNorm, x: Tensor, *, relu: bool = False, pool: bool = False) -> Tensor:
    """What ``_BatchNorm.forward`` does, then ReLU and pooling."""
    if not norm.training and norm.running_mean is not None:
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        return relu_and_pool(y, relu=relu, pool=pool)
    momentum = norm.momentum
    tracked = norm.training and norm.track_running_stats
    if tracked and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
    return batch_norm(
        x,
        norm.weight,
        norm.bias,
        running_mean=norm.running_mean if tracked else None,
        running_var=norm.running_var if tracked else None,
        momentum=momentum or 0.0,
        eps=norm.eps,
        relu=relu,
        pool=pool,
    )


def _normalise_instances(norm: _InstanceNorm, x: Tensor) -> Tensor:
    """What ``_InstanceNorm._apply_instance_norm`` does: unlike BatchNorm it counts no batches."""
    own = norm.training or not norm.track_running_stats
    if not own or x.shape[2:].numel() <= 1 or x.numel() == 0:  # PyTorch's own: running statistics, and its errors
        return _InstanceNorm._apply_instance_norm(norm, x)
    return instance_norm(
        x,
        norm.weight,
        norm.bias,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        momentum=norm.momentum or 0.0,
        eps=norm.eps,
    )


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
