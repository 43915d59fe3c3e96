"""mini-ImageNet: 100 classes of 600 images, 84 x 84, in the 64/16/20 class split of Ravi & Larochelle (2017)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2g_meta.data import images
from l2g_meta.data.cache import file_fingerprint
from l2g_meta.data.dataset import ClassDataset, integers
from l2g_meta.data.download import check_digest, check_pickle, fetch, is_html
from l2g_meta.data.pickles import load_pickle
from l2g_meta.errors import DataError

SPLITS = images.SPLITS
DEFAULTS: dict[str, Any] = {"image_size": 84}
LAYOUTS = ("mini-imagenet/<split>/<class>/*.jpg", "<split>/<class>/*.jpg", "mini-imagenet-cache-<split>.pkl")
URL = "https://zenodo.org/record/7978538/files/"  # where learn2learn's MiniImagenet downloads from
MAX_BYTES = 2 * 2**30  # the largest of the published files has 0.8 GB


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
        download: where no layout is found, download learn2learn's pickle into ``root``.

    Raises:
        DataError: if the data are missing or damaged, or the download fails.
    """
    root, size = images.check_request("mini-ImageNet", split, root, image_size, LAYOUTS)
    folder = images.find_folder(root / "mini-imagenet", root, split=split)
    if folder is not None:
        return images.open_folders("mini-imagenet", split, size, images.class_files(folder))
    path = root / f"mini-imagenet-cache-{split}.pkl"
    if download and (not path.is_file() or is_html(path)):  # a page: another tool's failed download
        fetch(URL + path.name, path, max_bytes=MAX_BYTES, check=check_pickle)
    if not path.is_file():
        raise images.missing(f"the {split} split of mini-ImageNet", root, LAYOUTS)
    source = {"file": file_fingerprint(path)}
    return images.open_converted("mini-imagenet", split, size, source, partial(_convert_pickle, path, size))


def _convert_pickle(path: Path, size: int, out: Path) -> None:
    """Convert ``{"image_data": uint8 (n, H, W, 3), "class_dict": {class name: [row, ...]}}``."""
    check_digest(path)
    data = load_pickle(path, max_bytes=MAX_BYTES)
    pixels: Any
    pixels, rows = (data.get("image_data"), data.get("class_dict")) if isinstance(data, dict) else (None, None)
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 4
    if not (is_array and pixels.shape[3] == 3 and pixels.size):
        raise DataError(f'need "image_data", uint8 (n, H, W, 3), in {path}, got {_describe(pixels)}; get it again')
    index: dict[str, np.ndarray] = {}
    given: dict[Any, Any] = rows if isinstance(rows, dict) else {}
    once = DataError(f'need each of the {len(pixels)} images once in "class_dict" in {path}; get the file again')
    count = 0
    for name, numbers in given.items():
        if isinstance(name, str) and (r := integers(numbers)) is not None and len(r):
            index[name] = r
            if (count := count + len(r)) > len(pixels):
                raise once  # now: the same list in each of many classes would take memory without end
    if not index or len(index) != len(given):
        raise DataError(f'need "class_dict", the rows of each class, in {path}, got {_describe(rows)}; get it again')
    if count != len(pixels) or not np.array_equal(np.sort(np.concatenate(list(index.values()))), np.arange(count)):
        raise once
    classes = {name: index[name].tolist() for name in sorted(index)}
    images.convert(classes, lambda row: Image.fromarray(pixels[row]), images.stretch, size, out)


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
