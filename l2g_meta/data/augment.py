"""Random crop, flip and colour jitter of images on their device, drawn on the CPU from a stream's own generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from l2g_meta.errors import DataError

GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, as in Pillow and torchvision


class Draws(NamedTuple):
    """What ``Augment`` does to each of n images, as arrays or tensors."""

    crop: Any  # (n, 2): rows and columns off centre
    flip: Any  # (n,) left to right?
    factor: Any  # (n, 3) of brightness, contrast and saturation; 1 changes nothing


@dataclass(frozen=True)
class Augment:
    """How training images are varied; the defaults are those of MetaOptNet (Lee et al. 2019).

    Args:
        padding: an image is cropped to its own size from a canvas with that many black pixels more on each side.
        flip: probability of a horizontal flip.
        jitter: brightness, contrast and saturation are each scaled by a factor from 1 − jitter … 1 + jitter, in that
            order (torchvision draws the order).

    Raises:
        DataError: for numbers that cannot be.

    Example:
        >>> draws = Augment(padding=2).draw(np.random.default_rng(0), 3, (28, 28))
        >>> draws.crop.shape, bool(np.abs(draws.crop).max() <= 2), draws.factor.shape
        ((3, 2), True, (3, 3))
    """

    padding: int = 8
    flip: float = 0.5
    jitter: float = 0.4

    def __post_init__(self) -> None:
        if not (isinstance(self.padding, int) and self.padding >= 0 and 0 <= self.flip <= 1 and 0 <= self.jitter <= 1):
            raise DataError(f"need padding of at least 0, flip and jitter in 0 … 1; got {self}")

    def draw(self, rng: np.random.Generator, n: int, size: tuple[int, int]) -> Draws:
        """Draws for n images of this height and width."""
        return Draws(
            rng.integers(-self.padding, self.padding + 1, (n, 2)),
            rng.random(n) < self.flip,
            rng.uniform(1 - self.jitter, 1 + self.jitter, (n, 3)).astype(np.float32),
        )

    def gather(self, images: Tensor, rows: Tensor, draws: Draws) -> Tensor:
        """Varied images of the given rows.

        Shapes: images (N, H, W, C) uint8, rows (n,) -> (n, H, W, C), float in 0 … 1.

        Example:
            >>> images = torch.arange(4, dtype=torch.uint8).view(1, 2, 2, 1)
            >>> draws = Draws(np.array([[1, 0]]), np.array([True]), np.ones((1, 3), np.float32))
            >>> (Augment().gather(images, torch.tensor([0]), draws) * 255).flatten().tolist()
            [3.0, 2.0, 0.0, 0.0]
        """
        crop, flip, factor = (torch.as_tensor(d, device=images.device) for d in draws)
        x = _shifted(images, rows, crop, flip)
        brightness, contrast, saturation = factor[:, :, None, None, None].unbind(1)  # (n, 1, 1, 1) each
        x = (x * brightness).clamp_(0, 1)
        x = _blend(x, _grey(x).mean((1, 2), keepdim=True), contrast)
        return _blend(x, _grey(x), saturation) if images.shape[3] == 3 else x


def _shifted(images: Tensor, rows: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    """Crops of the image's own size, black where they leave it, one read of each pixel: (n, H, W, C) in 0 … 1."""
    height, width = images.shape[1:3]
    i = torch.arange(height, device=images.device) + shift[:, :1]  # (n, H) of the source
    j = torch.arange(width, device=images.device)
    j = torch.where(flip[:, None], width - 1 - j, j) + shift[:, 1:]  # (n, W), from right to left where flipped
    inside = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None]
    pixels = images[rows[:, None, None], i.clamp(0, height - 1)[:, :, None], j.clamp(0, width - 1)[:, None]]
    return pixels.float() / 255 * inside[..., None]


def _grey(x: Tensor) -> Tensor:
    """(n, H, W, C) -> (n, H, W, 1)."""
    return x if x.shape[3] == 1 else sum(w * c for w, c in zip(GREY, x.split(1, 3), strict=True))


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(other, x, factor).clamp_(0, 1)
