"""tieredImageNet: 608 classes, 84 x 84, whose splits (351/97/160) share no super-category; Ren et al. (2018)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from l2g_meta.data import images
from l2g_meta.data.cache import file_fingerprint
from l2g_meta.data.dataset import ClassDataset, index_by_class, integers
from l2g_meta.data.download import check_digest, check_pickle, fetch, is_html
from l2g_meta.data.pickles import load_pickle
from l2g_meta.errors import DataError

SPLITS = images.SPLITS
DEFAULTS: dict[str, Any] = {"image_size": 84}
LAYOUTS = (
    "tiered-imagenet/{train,val,test}_images_png.pkl with {train,val,test}_labels.pkl",
    "the same files directly",
    "tiered-imagenet/<split>/<class>/*.{jpg,png}",
)
URL = "https://zenodo.org/record/7978538/files/tiered-imagenet-"  # where learn2learn's TieredImagenet downloads from
MAX_BYTES = 16 * 2**30  # of encoded images
MAX_LABEL_BYTES = 2**28  # of the label file, which has some 16 bytes for each of at most 448,695 images


def load(
    split: str, *, root: Path | str | None = None, image_size: int | None = None, download: bool = False
) -> ClassDataset:
    """A split of tieredImageNet as a class-sorted, memory-mapped uint8 array (n, S, S, 3).

    The first call decodes each image of the published files ``{train,val,test}_images_png.pkl`` once. Both that file
    and the result are mapped, not held in memory. Classes come from the label file and are sorted by name.

    Args:
        split: ``"train"``, ``"validation"`` or ``"test"``.
        root: folder with ``tiered-imagenet/`` or with the files themselves.
        image_size: S; by default 84, the size the images have, where nothing is resampled. Other sizes are resized
            (bilinear, antialiased): label such runs, their numbers are not tieredImageNet's.
        download: where nothing is found, download learn2learn's files of this split into ``root``.

    Raises:
        DataError: if the data are missing or damaged, or the download fails.
    """
    root, size = images.check_request("tieredImageNet", split, root, image_size, LAYOUTS)
    files = _find_pickles(root, split)
    folder = images.find_folder(root / "tiered-imagenet", split=split)
    if files is None and folder is not None:
        return images.open_folders("tiered-imagenet", split, size, images.class_files(folder))
    if download and (files is None or any(is_html(path) for path in files)):  # a page: another tool's failed download
        for path in files or _pickles(root / "tiered-imagenet", split):
            if not path.is_file() or is_html(path):
                limit = MAX_LABEL_BYTES if path.name.endswith("_labels.pkl") else MAX_BYTES
                fetch(URL + path.name, path, max_bytes=limit, check=check_pickle)
        files = _find_pickles(root, split)
    if files is None:
        raise images.missing(f"the {split} split of tieredImageNet", root, LAYOUTS)
    source = {"files": [file_fingerprint(path) for path in files]}
    return images.open_converted("tiered-imagenet", split, size, source, partial(_convert_pickles, *files, size))


def _pickles(base: Path, split: str) -> tuple[Path, Path]:
    short = "val" if split == "validation" else split
    return base / f"{short}_images_png.pkl", base / f"{short}_labels.pkl"


def _find_pickles(root: Path, split: str) -> tuple[Path, Path] | None:
    pairs = (_pickles(base, split) for base in (root / "tiered-imagenet", root))
    return next((pair for pair in pairs if all(path.is_file() for path in pair)), None)


def _convert_pickles(images_path: Path, labels_path: Path, size: int, out: Path) -> None:
    """Convert the list of PNG files, each a uint8 array (bytes,) or (bytes, 1), and their labels."""
    classes = _read_labels(labels_path)
    check_digest(images_path)
    encoded = load_pickle(images_path, max_bytes=MAX_BYTES)
    n = sum(len(rows) for rows in classes.values())
    if not isinstance(encoded, list) or len(encoded) != n:
        got = len(encoded) if isinstance(encoded, list) else type(encoded).__name__
        raise DataError(f"need a list of {n} images, as many as labels, got {got} in {images_path}; get both again")

    def read(row: int) -> Image.Image:
        png = encoded[row]
        if not isinstance(png, np.ndarray) or png.dtype != np.uint8:
            raise DataError(f"need the bytes of a PNG file, got {type(png).__name__}, image {row} of {images_path}")
        if png.nbytes > images.MAX_BYTES:  # checked here, since the copy that is decoded takes memory
            limit = f"at most {images.MAX_BYTES} bytes"
            raise DataError(f"need a PNG file of {limit}, got {png.nbytes}, image {row} of {images_path}; get it again")
        return images.read_image(png.tobytes(), f"image {row} of {images_path}")

    images.convert(classes, read, images.stretch, size, out)


def _read_labels(path: Path) -> dict[str, list[int]]:
    """Rows of each class, classes sorted by name."""
    check_digest(path)
    data = load_pickle(path, max_bytes=MAX_LABEL_BYTES)
    column = integers(data.get("label_specific")) if isinstance(data, dict) else None
    if column is None or not len(column):
        raise DataError(f'need "label_specific", a list or array of an integer per image, in {path}; get it again')
    labels, inverse = np.unique(column, return_inverse=True)
    names = _names(data.get("label_specific_str"), labels.tolist())
    return dict(sorted(zip(names, (rows.tolist() for rows in index_by_class(inverse)), strict=True)))


def _names(names: Any, labels: list[int]) -> list[str]:
    """Names of some labels, ascending, from what the file has for all labels; where it lacks one, their numbers."""
    if isinstance(names, np.ndarray):
        names = names.tolist()
    if not isinstance(names, list | tuple) or len(names) <= labels[-1] or labels[0] < 0:
        return [str(label) for label in labels]
    if not all(isinstance(name, str | bytes) for name in names):
        raise DataError('need texts in "label_specific_str", got something else; get the label file again')
    unique = len(set(names)) == len(names)  # two ImageNet classes are called "crane"
    return [str(names[label]) if unique else f"{names[label]} {label}" for label in labels]
