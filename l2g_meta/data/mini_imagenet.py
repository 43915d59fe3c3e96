"""mini-ImageNet: 100 classes of 600 images, 84 x 84, in the 64/16/20 class split of Ravi & Larochelle (2017)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2g_meta.data import images
from l2g_meta.data.cache import file_fingerprint
from l2g_meta.data.classes import ClassDataset
from l2g_meta.data.pickles import load_pickle
from l2g_meta.errors import DataError

SPLITS = images.SPLITS
DEFAULTS: dict[str, Any] = {"image_size": 84}
LAYOUTS = ("mini-imagenet/<split>/<class>/*.jpg", "<split>/<class>/*.jpg", "mini-imagenet-cache-<split>.pkl")
URL = "https://zenodo.org/record/7978538/files/"  # where learn2learn's MiniImagenet downloads from


def load(
    split: str, *, root: Path | str | None = None, image_size: int | None = None, download: bool = False
) -> ClassDataset:
    """A split of mini-ImageNet as a class-sorted, memory-mapped uint8 array (n, S, S, 3).

    The first call converts the folders ``mini-imagenet/<split>/<class>/*.jpg`` or ``<split>/<class>/*.jpg`` of
    ``root``, or learn2learn's ``mini-imagenet-cache-<split>.pkl``; the same images give the same array from each.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: folder with one of the layouts above.
        image_size: S; by default 84, the size the images have, where nothing is resampled. Other sizes are resized
            (bilinear, antialiased): label such runs, their numbers are not mini-ImageNet's.
        download: where no layout is found, let learn2learn download the pickle into ``root``.

    Raises:
        DataError: if the data are missing or damaged, or the download fails.
        ImportError: if ``download`` needs learn2learn and it is missing.
    """
    root, size = images.check_request("mini-ImageNet", split, root, image_size, LAYOUTS)
    folder = images.find_folder(root / "mini-imagenet", root, split=split)
    if folder is not None:
        return images.open_folders("mini-imagenet", split, size, images.class_files(folder))
    path = root / f"mini-imagenet-cache-{split}.pkl"
    if download:
        images.fetch_pickle(URL + path.name, path)
    if not path.is_file():
        raise images.missing(f"the {split} split of mini-ImageNet", root, LAYOUTS)
    source = {"file": file_fingerprint(path)}
    return images.open_converted("mini-imagenet", split, size, source, partial(_convert_pickle, path, size))


def _convert_pickle(path: Path, size: int, out: Path) -> None:
    """Convert ``{"image_data": uint8 (n, H, W, 3), "class_dict": {class name: [row, ...]}}``."""
    data = load_pickle(path)
    pixels, rows = (data.get("image_data"), data.get("class_dict")) if isinstance(data, dict) else (None, None)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise DataError(f'need "image_data", uint8 (n, H, W, 3), in {path}, got {_describe(pixels)}; get it again')
    if not isinstance(rows, dict) or not all(isinstance(r, list | np.ndarray) and len(r) for r in rows.values()):
        raise DataError(f'need "class_dict", the rows of each class, in {path}, got {_describe(rows)}; get it again')
    used = np.sort(np.concatenate([np.asarray(r).reshape(-1) for r in rows.values()] or [np.empty(0)]))
    if not np.array_equal(used, np.arange(len(pixels))):
        raise DataError(f'need each of the {len(pixels)} images once in "class_dict" in {path}; get the file again')
    classes = {str(name): [pixels[row] for row in rows[name]] for name in sorted(rows, key=str)}
    images.convert(classes, Image.fromarray, images.stretch, size, out)


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
