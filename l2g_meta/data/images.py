"""Image files: found by class, decoded, and converted once to a class-sorted array."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from l2g_meta.data.cache import cached, create_images, open_dataset, write_classes
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.errors import DataError
from l2g_meta.files.reading import open_regular

SPLITS = ("train", "validation", "test")
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB on the [0, 1] scale
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 50_000_000  # per image; beyond it a small file may unpack to gigabytes
MAX_BYTES = 2**28  # per image file; more than MAX_PIXELS take, even uncompressed
MAX_SCANS = 100  # of a JPEG; encoders write some ten, and each takes the time of a whole image for a few bytes
SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")  # how each begins
SIGNATURES = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG"}  # how files begin
FORMATS = (".jpg", ".jpeg", ".png")  # which of both it is, a file's beginning says
Source = TypeVar("Source")
Resize = Callable[[Image.Image, int], Image.Image]


def stretch(image: Image.Image, size: int) -> Image.Image:
    """The image as (size, size), bilinear with antialiasing; unchanged if it has that size."""
    return image.resize((size, size), Image.Resampling.BILINEAR)


def read_image(source: str | bytes, label: str = "", *, upright: bool = False) -> Image.Image:
    """The RGB image in a JPEG or PNG file, whatever its name, or in encoded bytes; no other decoder is tried.

    Args:
        source: a file, or what one holds.
        label: what errors call the source; the path by default.
        upright: turn the image as its Exif orientation says.

    Raises:
        DataError: if it is not a readable 8-bit JPEG or PNG with at most ``MAX_PIXELS`` pixels and ``MAX_BYTES`` bytes.
    """
    remedy = "restore or remove it"
    try:
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        if size > MAX_BYTES:
            remedy = "make it smaller"
            raise ValueError(f"{size} bytes are more than {MAX_BYTES}")
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            start = file.read(4)
            file_format = next((name for name, begins in SIGNATURES.items() if start.startswith(begins)), None)
            if file_format is None:
                raise UnidentifiedImageError
            scans = len(SCAN.findall(file.read())) if file_format == "JPEG" else 0
            if scans > MAX_SCANS:
                raise ValueError(f"{scans} scans are more than {MAX_SCANS}")
            file.seek(0)
            with Image.open(file, formats=[file_format]) as image:
                if image.width * image.height > MAX_PIXELS:
                    remedy = "make it smaller"
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
                if is_deep(image):
                    remedy = "convert it to 8 bits"
                    raise ValueError(f"mode {image.mode} has more than 8 bits per channel")
                return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"need an image, got {label or source!r}, which is not there; check its path") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, ...
        why = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"need a readable 8-bit JPEG or PNG, got {label or source!r} ({why}); {remedy}") from error


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded has more than 8 bits per channel.

    Pillow would clip grey ones to white and keep the upper 8 bits of colours, whose mode does not say so.
    """
    layouts = [tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in getattr(image, "tile", ()) if tile[3]]
    return image.mode[0] in "IF" or any(";16" in str(layout) for layout in layouts)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def class_files(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class, ``folder/<class>/*.{jpg,jpeg,png}``, classes and files sorted by name.

    Raises:
        DataError: if there is no class, or a class has no image.
    """
    classes, lacks = files_by_class(folder, FORMATS)
    if lacks:
        raise DataError(f"need images <class>/*.{{jpg,jpeg,png}} in {folder}, got {lacks}; add some or remove it")
    return classes


def files_by_class(folder: Path, suffixes: Collection[str]) -> tuple[dict[str, list[str]], str]:
    """Files of these kinds in each subfolder, sorted, hidden ones left out; and what is lacking, in words, or ""."""
    classes = {}
    for name in subfolders(folder):
        with os.scandir(folder / name) as entries:
            files = sorted(e.path for e in entries if not e.is_dir() and not e.name.startswith("."))
        classes[name] = [f for f in files if os.path.splitext(f)[1].lower() in suffixes]
    empty = [name for name, files in classes.items() if not files]
    return classes, f"no image in {empty}" if empty else "" if classes else "no folder"


def find_folder(*bases: Path, split: str) -> Path | None:
    """The first of ``base/<split>`` that is a folder; ``validation`` may be called ``val``."""
    names = ("validation", "val") if split == "validation" else (split,)
    return next((base / name for base in bases for name in names if (base / name).is_dir()), None)


def missing(need: str, root: Path | str | None, layouts: Sequence[str]) -> DataError:
    """The error for data that is not there."""
    got = "no root" if root is None else f"{root} without it" if Path(root).is_dir() else f"{root}, which is no folder"
    return DataError(f"need {need}, got {got}; pass as root (--root) a folder that holds {' or '.join(layouts)}")


def check_request(
    name: str, split: str, root: Path | str | None, image_size: int | None, layouts: Sequence[str]
) -> tuple[Path, int]:
    """The root as an absolute path, and the image size, 84 by default.

    Raises:
        DataError: if the split has another name, there is no root, or the size is not positive.
    """
    if split not in SPLITS:
        raise DataError(f"need a split of {', '.join(SPLITS)}, got {split!r}; choose one of them")
    if root is None:
        raise missing(f"the folder of {name}", root, layouts)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise DataError(f"need an image size in pixels, at least 1, got {image_size!r}; leave it out for 84")
    return Path(root).expanduser().resolve(), image_size or 84


def convert(
    classes: Mapping[str, Sequence[Source]], read: Callable[[Source], Image.Image], resize: Resize, size: int, out: Path
) -> None:
    """Write the images of each class, (n, size, size, 3) uint8 in the order given, as a cache folder.

    Args:
        classes: the sources of each class, in the order of the labels.
        read: the RGB image of a source; called from several threads.
        resize: makes it (size, size).
        size: side of the images in pixels.
        out: an empty folder.
    """
    from tqdm import tqdm

    counts = [len(sources) for sources in classes.values()]
    images = create_images(out, (sum(counts), size, size, 3))

    def write(row: int, source: Source) -> None:
        images[row] = np.asarray(resize(read(source), size))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool, tqdm(total=len(images), disable=None) as progress:
        first = 0
        for sources in classes.values():  # one class at a time bounds what is queued
            list(pool.map(write, range(first, first + len(sources)), sources))
            first += len(sources)
            progress.update(len(sources))
    write_classes(out, np.repeat(np.arange(len(counts)), counts), list(classes))


def open_converted(
    name: str, split: str, size: int, source: Mapping[str, Any], build: Callable[[Path], None]
) -> ClassDataset:
    """The converted data set, built the first time; ``source`` is JSON that changes when the original data do."""
    folder = cached(f"{name}-{split}-{size}", {"conversion": 1, "size": size, **source}, build)
    return open_dataset(folder, name=name, split=split, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def open_folders(
    name: str,
    split: str,
    size: int,
    classes: Mapping[str, Sequence[str]],
    read: Callable[[str], Image.Image] = read_image,
    resize: Resize = stretch,
) -> ClassDataset:
    """The data set of the image files of each class, converted again when a path, size or time has changed."""
    digest = hashlib.sha256()
    for files in classes.values():
        for file in files:
            try:
                stat = os.stat(file)
            except OSError as error:
                raise DataError(f"need an image, got {file!r} ({error.strerror}); restore or remove it") from error
            digest.update(os.fsencode(f"{file}\n{stat.st_size} {stat.st_mtime_ns}\n"))
    source = {"files": digest.hexdigest(), "read": read.__name__, "resize": resize.__name__}
    return open_converted(name, split, size, source, partial(convert, classes, read, resize, size))
