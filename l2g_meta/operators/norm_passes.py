r"""Passes over feature maps that norms, ReLU and pooling are made of, in ATen: for any device.

Allocating a feature map costs more than a pass over it (the system maps and clears its pages), so sums are taken
without intermediate maps, by the kernel of batch normalisation's own backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def channel_sums(t: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ t and Σ t x̂ per channel, in one pass without an intermediate map."""
    ones = torch.ones_like(mean)  # CUDA's kernels take the type of the sums from a scale; they do not depend on it
    _, dot, alone = aten.native_batch_norm_backward(t, x, ones, None, None, mean, rstd, True, 0.0, [False, True, True])
    return alone, dot


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale x + shift`` per channel, in one pass: what batch normalisation does with mean 0 and variance 1."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]


def per_channel(t: Tensor, like: Tensor) -> Tensor:
    """(c,) as it broadcasts against ``like`` (n, c, ...)."""
    return t.view(-1, *[1] * (like.ndim - 2))


def take(x: Tensor, where: Tensor) -> Tensor:
    """Values of x (n, c, H, W) at the pooling's indices, (n, c, H // 2, W // 2)."""
    if x.is_contiguous():
        return x.flatten(2).gather(2, where.flatten(2)).view_as(where)
    taken = _rows(x).gather(1, _rows(where))
    return taken.unflatten(1, where.shape[2:]).permute(0, 3, 1, 2)


def add_at(x: Tensor, where: Tensor, t: Tensor) -> Tensor:
    """Adds t (n, c, H // 2, W // 2) to x (n, c, H, W) at the pooling's indices, in place."""
    if x.is_contiguous():
        x.flatten(2).scatter_add_(2, where.flatten(2), t.flatten(2))
    else:
        _rows(x).scatter_add_(1, _rows(where), _rows(t))
    return x


def _rows(x: Tensor) -> Tensor:
    """A channels-last (n, c, H, W) as (n, H W, c), the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
