"""A user's own images: a folder per class, with or without folders per split around them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from l2g_meta.data import images
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import DataError
from l2g_meta.files.reading import read_text

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
    split_file: Path | None = None,
) -> ClassDataset:
    """A split of the image folders in ``root`` as a class-sorted, memory-mapped uint8 array (n, S, S, 3).

    ``root/<split>/<class>/*`` is taken as it is (``validation`` may be called ``val``). Of ``root/<class>/*`` the
    classes are dealt out to train, validation and test, 64/16/20%, by ``split_seed``. Images are turned upright (Exif),
    cropped to the central square and resized (bilinear, antialiased).

    Args:
        split: ``"train"``, ``"validation"``, ``"test"``, or ``"all"`` for the classes of all three.
        root: the folder.
        image_size: S, by default 84.
        download: has no effect, there is nothing to download; every data set takes it.
        split_seed: seed of the split of classes; the same names and seed give the same split everywhere.
        split_file: lists images and classes instead, see ``listed_files``; ``split`` is then their name alone.

    Raises:
        DataError: if the folder or split is missing, an image cannot be read, or a class has fewer than 2 images.
    """
    root, size = images.check_request("images", "test" if split == "all" else split, root, image_size, LAYOUTS)
    if root.is_file():
        raise DataError(f"need a folder of images, got the file {root}; unpack it (tar -xf FILE -C DIR), and name DIR")
    if not root.is_dir():
        raise images.missing("a folder of images", root, LAYOUTS)
    classes = _split_files(root, split, split_seed) if split_file is None else _enough(listed_files(split_file, root))
    return images.open_folders(root.name or "folder", split, size, classes, _read_upright, _centre_square)


def _split_files(root: Path, split: str, seed: int) -> dict[str, list[str]]:
    """The image files of each class of a split, or of all."""
    folders = {s: images.find_folder(root, split=s) for s in SPLITS}
    if not any(folder is not None and images.subfolders(folder) for folder in folders.values()):  # not a class "train"
        classes = _enough(images.class_files(root))
        names = classes if split == "all" else split_classes(list(classes), seed)[split]
        return {name: classes[name] for name in names}
    asked = [folder for name, folder in folders.items() if split in (name, "all") and folder is not None]
    if not asked:
        raise images.missing(f"the {split} split", root, LAYOUTS[:1])
    found: dict[str, list[str]] = {}
    for folder in asked:
        for name, files in images.class_files(folder).items():
            found.setdefault(name, []).extend(files)  # of one class in several splits
    return _enough(dict(sorted(found.items())))


def _enough(classes: dict[str, list[str]]) -> dict[str, list[str]]:
    if few := [name for name, files in classes.items() if len(files) < 2]:
        raise DataError(f"need 2 images per class (support and query), got 1 of {few}; add or remove them")
    return classes


def listed_files(path: Path, root: Path) -> dict[str, list[str]]:
    """The image files of each class that a split file of others names.

    A CSV file as mini-ImageNet's, ``filename,label`` (images in ``root``, ``root/images`` or a folder of the label), or
    easyfsl's, ``class_name,image_name``; or easyfsl's JSON file, ``class_names`` and ``class_roots``, folders in
    ``root``.

    Raises:
        DataError: if it is none of these, or names what is not in ``root``.
    """
    found: dict[str, list[str]] = {}
    try:
        text = read_text(path)
        if path.suffix.lower() == ".json":
            values = json.loads(text)
            for name, folder in zip(values["class_names"], values["class_roots"], strict=True):
                files = _inside(root, [folder, Path(folder).name]).iterdir()
                found[str(name)] = [str(file) for file in files if _is_image(file)]
        else:
            for row in csv.DictReader(text.lstrip("\ufeff").splitlines()):
                name, file = row.get("class_name") or row["label"], row.get("image_name") or row["filename"]
                image = _inside(root, [file, f"images/{file}", f"{name}/{file}"])
                found.setdefault(str(name), []).extend([str(image)] if _is_image(image) else [])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        raise DataError(
            "need a CSV file with filename,label or class_name,image_name, or a JSON file with class_names and "
            f"class_roots, whose images are in {root}, got {path}: {error!r}; see docs/data.md"
        ) from error
    if not found or not all(found.values()):
        raise DataError(f"need images of each class, {path} has none of {[n for n in found if not found[n]] or 'any'}")
    return {name: sorted(files) for name, files in sorted(found.items())}


def _inside(root: Path, names: Sequence[str]) -> Path:
    """The first that is there, in ``root`` and nowhere else."""
    paths = [Path(os.path.normpath(root / name)) for name in names]
    for path in paths:
        if path.is_relative_to(root) and path != root and path.exists():
            return path
    raise ValueError(f"{names[0]!r}, which is not there")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.FORMATS and not path.name.startswith(".")


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
    order = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(f"{seed}/{name}")).hexdigest())
    n_test, n_validation = max(2, round(0.20 * n)), max(2, round(0.16 * n))
    parts = order[n_test + n_validation :], order[n_test : n_test + n_validation], order[:n_test]
    return {split: sorted(part) for split, part in zip(SPLITS, parts, strict=True)}


def _read_upright(path: str) -> Image.Image:
    return images.read_image(path, upright=True)


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
