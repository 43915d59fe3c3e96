"""A user's own images: a folder per class, with or without folders per split around them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from l2g_meta.data import images
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import DataError

SPLITS = images.SPLITS
DEFAULTS: dict[str, Any] = {"image_size": 84}
LAYOUTS = ("<split>/<class>/*.{jpg,jpeg,png}", "<class>/*.{jpg,jpeg,png}")


def load(
    split: str,
    *,
    root: Path | str | None = None,
    image_size: int | None = None,
    download: bool = False,
    split_seed: int = 0,
) -> ClassDataset:
    """A split of the image folders in ``root`` as a class-sorted, memory-mapped uint8 array (n, S, S, 3).

    ``root/<split>/<class>/*`` is taken as it is (``validation`` may be called ``val``). Of ``root/<class>/*`` the
    classes are dealt out to train, validation and test, 64/16/20%, by ``split_seed``. Images are turned upright (Exif),
    cropped to the central square and resized (bilinear, antialiased).

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: the folder.
        image_size: S, by default 84.
        download: has no effect, there is nothing to download; every data set takes it.
        split_seed: seed of the split of classes; the same names and seed give the same split everywhere.

    Raises:
        DataError: if the folder or split is missing, an image cannot be read, or a class has fewer than 2 images.
    """
    root, size = images.check_request("images", split, root, image_size, LAYOUTS)
    if root.is_file():
        raise DataError(f"need a folder of images, got the file {root}; unpack it (tar -xf FILE -C DIR), and name DIR")
    if not root.is_dir():
        raise images.missing("a folder of images", root, LAYOUTS)
    folders = [images.find_folder(root, split=s) for s in SPLITS]
    has_splits = any(folder is not None and images.subfolders(folder) for folder in folders)  # not a class "train"
    folder = folders[SPLITS.index(split)] if has_splits else root
    if folder is None:
        raise images.missing(f"the {split} split", root, LAYOUTS[:1])
    classes = images.class_files(folder)
    few = [name for name, files in classes.items() if len(files) < 2]
    if few:
        raise DataError(f"need 2 images per class (support and query), got 1 of {few} in {folder}; add or remove them")
    if not has_splits:
        names = split_classes(list(classes), split_seed)[split]
        classes = {name: classes[name] for name in names}
    return images.open_folders(root.name or "folder", split, size, classes, _read_upright, _centre_square)


def split_classes(names: Sequence[str], seed: int = 0) -> dict[str, list[str]]:
    """Deal class names out to train, validation and test: 64/16/20%, at least two each, sorted by name.

    The order is that of the SHA-256 of seed and name, so it depends on no library's generator and on no file system.

    Raises:
        DataError: if there are fewer than 6 names.

    Example:
        >>> {split: len(names) for split, names in split_classes([f"class {i}" for i in range(100)]).items()}
        {'train': 64, 'validation': 16, 'test': 20}
    """
    n = len(names)
    if n < 6:
        raise DataError(f"need 6 classes, two each to train, validate and test, got {n}: {list(names)}; add classes")
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    n_test, n_validation = max(2, round(0.20 * n)), max(2, round(0.16 * n))
    parts = order[n_test + n_validation :], order[n_test : n_test + n_validation], order[:n_test]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def _read_upright(path: str) -> Image.Image:
    return images.read_image(path, upright=True)


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
