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


def positions(where: Tensor, x: Tensor) -> Tensor:
    """The pooling's indices into each map of x (n, c, H, W) as positions in the memory of x."""
    n, c, h, w = x.shape
    image, channel = (torch.arange(t, device=x.device).view(-1, *[1] * k) for t, k in ((n, 3), (c, 2)))
    step, of_channel = (c, 1) if is_channels_last(x) else (1, h * w)
    return torch.add(image * (h * w * c) + channel * of_channel, where, alpha=step)


def take(x: Tensor, at: Tensor) -> Tensor:
    """Values of x at positions in its memory, in their shape (n, c, H', W')."""
    taken = _flat(x, like=x).index_select(0, _flat(at, like=at))
    n, c, h, w = at.shape
    return taken.view(n, h, w, c).permute(0, 3, 1, 2) if is_channels_last(at) else taken.view(at.shape)


def add_at(x: Tensor, at: Tensor, t: Tensor) -> Tensor:
    """Adds t (n, c, H', W') to x at positions in its memory, in place."""
    _flat(x, like=x).scatter_add_(0, _flat(at, like=at), _flat(t, like=at))
    return x


def is_channels_last(x: Tensor) -> bool:
    """Whether maps lie in memory channel by channel, and in that order alone."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def in_format_of(x: Tensor, t: Tensor) -> Tensor:
    """T in the memory format of x, both maps or both not."""
    return t.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _flat(x: Tensor, like: Tensor) -> Tensor:
    """Maps in one row, in the order of memory of others of their kind; the same memory, if it is theirs."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(like) else x).reshape(-1)
