"""Anything that holds images, as the network's input: what training did to its images, done to the user's."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from l2g_meta.data import dataset_module
from l2g_meta.data.dataset import prepared
from l2g_meta.data.images import FORMATS, IMAGENET_MEAN, IMAGENET_STD, is_deep, read_image
from l2g_meta.errors import DataError, L2GError
from l2g_meta.training.config import Config

PREPARED = "pass preparation=Preparation(size, channels, mean, std), or a run or exported folder as model"
MAX_SIDE = 2048  # of the network's input; a file that asks for more is damaged or hostile
MAX_RATIO = 50  # of an image's sides, before its shorter one is resized: a line of pixels would fill the memory
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's


@dataclass(frozen=True)
class Preparation:
    """How an image becomes the network's input.

    Args:
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey.
        mean: per channel, on the [0, 1] scale; subtracted.
        std: per channel, on the [0, 1] scale; divided by.
        square: crop to the central square before resizing (``--data folder``), instead of stretching (the others).
        resize: the shorter side is resized to this, then the central square cropped, as torchvision and timm do.
        interpolation: how pixels are resampled, with antialiasing.

    Example:
        >>> Preparation(28, 1, (0.5,), (0.5,)).pixels(Image.new("RGB", (60, 40))).shape
        (28, 28, 1)
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    square: bool = False
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        numbers = (*self.mean, *self.std)
        sides = [self.size] if self.resize is None else [self.size, self.resize]
        sound = (
            all(type(side) is int and self.size <= side <= MAX_SIDE for side in sides)
            and self.size >= 1
            and self.channels in (1, 3)
            and {len(self.mean), len(self.std)} <= {1, self.channels}
            and all(type(value) in (int, float) and abs(value) < 1e6 for value in numbers)
            and all(value > 0 for value in self.std)
            and self.interpolation in INTERPOLATIONS
        )
        if not sound:
            raise L2GError(f"need a size, 1 or 3 channels, and a mean and a positive std of each, got {self}")

    @classmethod
    def of_training(cls, config: Config, image_shape: Sequence[int]) -> Preparation:
        """What ``l2g train`` did to the images of a config's data set."""
        module = dataset_module(config.data)
        mean, std = getattr(module, "MEAN", IMAGENET_MEAN), getattr(module, "STD", IMAGENET_STD)
        return cls(image_shape[1], image_shape[0], tuple(mean), tuple(std), square=config.data == "folder")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Preparation:
        """From what ``dataclasses.asdict`` gave, through JSON.

        Raises:
            L2GError: if it is something else.
        """
        try:
            return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})
        except (TypeError, KeyError) as error:
            raise L2GError(f"need how images are prepared, got: {error!r}; export the run again") from error

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one input, (C, H, W)."""
        return self.channels, self.size, self.size

    def pixels(self, image: Image.Image) -> np.ndarray:  # (size, size, channels) uint8
        """An image turned upright (Exif), in this many channels, at this size."""
        image = ImageOps.exif_transpose(image).convert("L" if self.channels == 1 else "RGB")
        side, how = (self.size, self.size), Image.Resampling[self.interpolation.upper()]
        if self.resize is not None:
            from torchvision.transforms import InterpolationMode, functional

            most = MAX_RATIO * min(image.size)
            if max(image.size) > most:
                image = functional.center_crop(image, [min(image.height, most), min(image.width, most)])
            image = functional.resize(image, self.resize, InterpolationMode(self.interpolation))
            image = functional.center_crop(image, list(side))
        else:
            image = ImageOps.fit(image, side, how) if self.square else image.resize(side, how)
        return np.array(image).reshape(*side, self.channels)

    def read(self, path: str) -> np.ndarray:  # (size, size, channels) uint8
        """The pixels of an image file.

        Raises:
            DataError: if it is not a readable JPEG or PNG.
        """
        if os.path.splitext(path)[1].lower() not in FORMATS:
            raise DataError(f"need a file *{', *'.join(FORMATS)}, got {path!r}; convert it")
        return self.pixels(read_image(path, upright=True))

    def normalised(self, pixels: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:  # (n, C, H, W)
        """Inputs from pixels (n, size, size, channels) uint8, as training normalised them."""
        x = torch.as_tensor(pixels).to(device)
        constants = [torch.tensor(t, device=device).view(-1, 1, 1) for t in (self.mean, self.std)]
        return prepared(x, torch.arange(len(x), device=device), constants)


def check_several(images: Any) -> None:
    """That these are several images, which can be counted, not one.

    Raises:
        DataError: if they are one image, one path, none, or an iterator.
    """
    # Pixels (H, W, C) are one image: no grey images (n, H, W) are as narrow.
    narrow = isinstance(images, np.ndarray | Tensor) and images.ndim == 3 and images.shape[2] in (1, 3, 4)
    one = narrow and images.dtype in (np.dtype("uint8"), torch.uint8)
    if isinstance(images, str | bytes | os.PathLike | Image.Image) or one:
        what = f"the path {os.fspath(images)!r}" if isinstance(images, str | os.PathLike) else "one image"
        raise DataError(f"need a list of images or paths, or an array (n, ...), got {what}; pass [it], a list of one")
    if images is None or isinstance(images, Iterator | Set):
        raise DataError(f"need images with a number and an order, got a {type(images).__name__}; pass a list")
    if isinstance(images, list | tuple) and not images:
        raise DataError("need at least one image, got an empty list; check where the images are looked for")


def is_image_list(images: Any) -> bool:
    """Whether these are images one by one: paths, PIL images, tensors, or arrays (H, W) or (H, W, C)."""
    if isinstance(images, np.ndarray | Tensor) and images.dtype not in (np.dtype(object),):
        return isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "UT"
    if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str | bytes) or len(images) == 0:
        return False
    first = images[0]
    return isinstance(first, str | os.PathLike | Image.Image | Tensor) or (
        isinstance(first, np.ndarray) and first.ndim >= 2
    )


def inputs(images: Any, preparation: Preparation | None, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The network's inputs (n, ...), from images of almost any kind.

    - A list of paths, PIL images, uint8 arrays (H, W) or (H, W, C), or tensors.
    - A uint8 array or tensor (n, H, W), (n, H, W, C) or (n, C, H, W), of any size: prepared as training's images.
    - A float array or tensor (n, C, H, W) of the network's own input, already normalised; used as it is.
    - An array (n, C · H · W) of the same, flattened, uint8 or float, as scikit-learn's tools pass images on.

    Args:
        images: n images.
        preparation: of a run or an export; ``None`` for a module of which nothing is known, which gets floats as they
            are.
        device: of the result.
        dtype: of the result.

    Raises:
        DataError: if they are something else, or a file cannot be read.
    """
    if is_image_list(images):
        single = (_pixels(image, preparation)[None] for image in images)
        return torch.cat([inputs(one, preparation, device=device, dtype=dtype) for one in single])
    x = _as_tensor(images)
    if preparation is None:
        if x.dtype == torch.uint8:
            raise DataError(f"need the module's own floats where only the module is known, got uint8; {PREPARED}")
        return x.to(device, dtype)
    shape = preparation.image_shape
    flat = int(np.prod(shape))
    if x.ndim == 2 and x.shape[1] == flat:
        x = x.reshape(len(x), *shape)
    if x.dtype == torch.uint8 and x.ndim in (3, 4):
        return preparation.normalised(resized(_channels_last(x), preparation), device).to(dtype)
    if x.is_floating_point() and tuple(x.shape[1:]) == shape:
        return x.to(device, dtype)
    raise DataError(
        f"need uint8 images (n, H, W, C) or (n, C, H, W), or floats of the network's input, {shape} or {flat} each, "
        f"got {x.dtype} {tuple(x.shape)}; scale pixels to 0 … 255 and convert them with .astype('uint8'), or pass paths"
    )


def _pixels(image: Any, preparation: Preparation | None) -> Tensor:
    """Pixels (size, size, channels) of a file or PIL image; an array or tensor as it is."""
    if isinstance(image, np.ndarray | Tensor):
        return _as_tensor(image)
    if preparation is None:
        raise DataError(f"need arrays or tensors for a module alone, got {type(image).__name__}; {PREPARED}")
    if isinstance(image, str | os.PathLike):
        return torch.from_numpy(preparation.read(os.fspath(image)))
    if not isinstance(image, Image.Image):
        return _as_tensor(image)
    if is_deep(image):
        raise DataError(f"need 8-bit images, got one of mode {image.mode} with more; convert it")
    try:
        return torch.from_numpy(preparation.pixels(image))
    except (OSError, SyntaxError) as error:  # Pillow reads a file's pixels when they are asked for
        raise DataError(f"need a readable image, got {image!r} ({error}); restore or remove it") from error


def _as_tensor(values: Any) -> Tensor:
    """Values as a tensor; what may not be written (a file's map) is copied, which PyTorch would warn of."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    if array.dtype == object:
        raise DataError("need arrays of numbers, got one of objects; pass a list of images, not an array of them")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _channels_last(x: Tensor) -> Tensor:  # (n, H, W), (n, H, W, C) or (n, C, H, W) -> (n, H, W, C)
    """Where both the second and the last dimension could be the channels, the last is."""
    if x.ndim == 3:
        return x[..., None]
    if x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        return x.permute(0, 2, 3, 1)
    if x.shape[3] not in (1, 3):
        raise DataError(f"need images with 1 or 3 channels, got {tuple(x.shape)}; drop the others (alpha)")
    return x


def resized(x: Tensor, preparation: Preparation) -> np.ndarray | Tensor:
    """Pixels (n, H, W, C) at the network's size and number of channels."""
    if tuple(x.shape[1:]) == (preparation.size, preparation.size, preparation.channels):
        return x
    arrays = x.cpu().numpy()
    return np.stack([preparation.pixels(Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a)) for a in arrays])
